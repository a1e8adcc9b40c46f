# The compiled variants: every combination in a row is one. The dtype is that of q, k, v and out: f32, f16 or bf16. KxV are
# the key and value sizes, `any` reads them from the tensors; kernels without SIZES know no others. chunk is the longest chunk, of
# kernels that have chunks. Within a target, rows that come first are preferred.
#
# PARAMS are further parameters of the kernel's generator. Some of them decide who gets the variant, and calls see them
# (holdfast_variant): row_alignment, the elements at whose multiples rows of q, k, v and out start, and round_operands. Calls
# with other rows run the next variant that takes them. And degree, that of the power of q.k; 0: any.
#
# COSTLY are types that a build has for the targets of HOLDFAST_COSTLY alone: large kernels take 5 seconds each, 20 with a
# sanitizer, and types differ only in how rows are read and written.
#
#   holdfast_kernel(kernel DTYPES ... [CHUNKS ...] [SIZES KxV ...] TARGETS ... [PARAMS name=value ...] [COSTLY ...])

# Work per token grows with the chunk, the traffic of states (K V floats a chunk) falls with it: measured, 32 is best up to
# 128x128 and 64 above.
holdfast_kernel(chunkwise DTYPES f32 CHUNKS 32
    SIZES 32x32 32x64 64x64 64x128 128x128
    TARGETS avx512 avx2)

holdfast_kernel(chunkwise DTYPES f32 CHUNKS 64
    SIZES 128x256 256x256 256x512
    TARGETS avx512 avx2)

holdfast_kernel(chunkwise DTYPES f16 bf16 CHUNKS 32
    SIZES 32x32 64x64 128x128
    TARGETS avx512 avx2)

# Products of bf16: sizes and types that are not here run the targets below. On tiles of 16 rows and 32 terms nothing is gained
# by leaving out what is masked.
holdfast_kernel(chunkwise DTYPES bf16 CHUNKS 32
    SIZES 64x64 128x128
    TARGETS amx
    PARAMS round_operands=true causal_tile=0)

holdfast_kernel(chunkwise DTYPES bf16 CHUNKS 32
    SIZES 64x64 128x128
    TARGETS avx512_bf16
    PARAMS round_operands=true)

holdfast_kernel(chunkwise DTYPES f32 f16 bf16 CHUNKS 32
    SIZES any
    TARGETS avx512 avx2 generic)

holdfast_kernel(chunkwise_backward DTYPES f32 CHUNKS 32
    SIZES 32x32 64x64 128x128 128x256
    TARGETS avx512 avx2)

holdfast_kernel(chunkwise_backward DTYPES f16 bf16 CHUNKS 32
    SIZES 64x64
    TARGETS avx512 avx2
    COSTLY f16 bf16)

holdfast_kernel(chunkwise_backward DTYPES bf16 CHUNKS 32
    SIZES 64x64 128x128
    TARGETS avx512_bf16
    PARAMS round_operands=true)

holdfast_kernel(chunkwise_backward DTYPES f32 f16 bf16 CHUNKS 32
    SIZES any
    TARGETS avx512 avx2 generic
    COSTLY f16 bf16)

# Small kernels: all types for all sizes that chunkwise is tuned for in fp32, and for half of their columns, which two threads share.
holdfast_kernel(recurrent DTYPES f32 f16 bf16
    SIZES 32x32 32x64 64x32 64x64 64x128 128x64 128x128 128x256 256x128 256x256 256x512
    TARGETS avx512 avx2)

holdfast_kernel(recurrent DTYPES bf16
    SIZES 64x32 64x64 128x64 128x128
    TARGETS amx avx512_bf16)

# The same for blocks of tokens, each in one pass over the state: behind those of one, which a step is for.
holdfast_kernel(recurrent DTYPES f32 f16 bf16 CHUNKS 8
    SIZES 32x32 32x64 64x32 64x64 64x128 128x64 128x128 128x256 256x128 256x256 256x512
    TARGETS avx512 avx2)

holdfast_kernel(recurrent DTYPES bf16 CHUNKS 8
    SIZES 64x32 64x64 128x64 128x128
    TARGETS amx avx512_bf16)

holdfast_kernel(recurrent DTYPES f32 f16 bf16
    SIZES any
    TARGETS avx512 avx2 generic)

# One variant for every degree and size, normalized or not, with or without states and weights: at 64x64 it is as fast as one
# compiled for that. Blocks of 64 rows: keys are read once for each of them, and a strip of weights stays in L1.
holdfast_kernel(parallel DTYPES f32 f16 bf16 CHUNKS 64
    SIZES any
    TARGETS avx512 avx2 generic
    COSTLY f16 bf16)

# Its gradient, likewise: one variant for every degree and size, of pairs of blocks.
holdfast_kernel(parallel_backward DTYPES f32 f16 bf16 CHUNKS 64
    SIZES any
    TARGETS avx512 avx2 generic
    COSTLY f16 bf16)

# On GPUs without shared memory, and so without barriers, with weights in device memory.
holdfast_kernel(parallel_backward DTYPES f32 f16 bf16 CHUNKS 32
    SIZES any
    TARGETS cuda metal opencl vulkan
    COSTLY f16 bf16)

# On GPUs a block of threads has all of a block of rows, with its weights in shared memory.
holdfast_kernel(parallel DTYPES f32 f16 bf16 CHUNKS 32
    SIZES any
    TARGETS cuda metal opencl vulkan
    PARAMS any_state_strides=true
    COSTLY f16 bf16)

# GPUs: half the traffic of states that chunks of 32 have, and the weights of 32 rows are 8 KiB of shared memory. All of a GPU's
# kernels take value-major states where they lie, any_state_strides: a CPU's would lose their vectors to it, and the library
# turns states over for them.
holdfast_kernel(chunkwise DTYPES f32 CHUNKS 64
    SIZES 64x64 128x128
    TARGETS metal opencl vulkan
    PARAMS any_state_strides=true)

holdfast_kernel(chunkwise DTYPES f16 bf16 CHUNKS 64
    SIZES 64x64
    TARGETS metal opencl vulkan
    PARAMS any_state_strides=true)

# CUDA: tensor cores, and fp32 without them. Blocks copy 16 bytes at a time; a block's products see the whole chunk.
holdfast_kernel(chunkwise DTYPES f16 bf16 CHUNKS 64
    SIZES 32x32 32x64 64x64 64x128 128x128 128x256 256x256
    TARGETS cuda
    PARAMS round_operands=true row_alignment=8 causal_tile=0 any_state_strides=true)

holdfast_kernel(chunkwise DTYPES f32 CHUNKS 64
    SIZES 32x32 64x64 128x128 256x256
    TARGETS cuda
    PARAMS row_alignment=4 causal_tile=0 any_state_strides=true)

holdfast_kernel(chunkwise DTYPES f32 f16 bf16 CHUNKS 32
    SIZES any
    TARGETS cuda metal opencl vulkan
    PARAMS any_state_strides=true)

holdfast_kernel(chunkwise_backward DTYPES f32 CHUNKS 64
    SIZES 64x64
    TARGETS cuda metal opencl vulkan
    PARAMS any_state_strides=true)

holdfast_kernel(chunkwise_backward DTYPES f32 f16 bf16 CHUNKS 32
    SIZES any
    TARGETS cuda metal opencl vulkan
    PARAMS any_state_strides=true
    COSTLY f16 bf16)

holdfast_kernel(recurrent DTYPES f32 f16 bf16
    SIZES 64x64 128x128 any
    TARGETS cuda metal opencl vulkan
    PARAMS any_state_strides=true)

# Bound by memory, for every size.
holdfast_kernel(rotate DTYPES f32 f16 bf16
    TARGETS avx512 avx2 cuda metal opencl vulkan generic)

foreach(kernel head_norm_gate head_norm_gate_backward)
  holdfast_kernel(${kernel} DTYPES f32 f16 bf16
      TARGETS avx512 avx2 cuda metal opencl vulkan generic)
endforeach()

# Power retention. The state is large: longer chunks read and write it less often, and their own work grows, and with it what a
# block of features wants to have in L1. Measured: 64 for all of these; 128 takes 4 to 6% longer. Half of the values, for two
# threads to share a head.
holdfast_kernel(power DTYPES f32 CHUNKS 64
    SIZES 32x32
    TARGETS avx512 avx2
    PARAMS degree=2)

holdfast_kernel(power DTYPES f32 CHUNKS 64
    SIZES 64x64 64x32 128x128
    TARGETS avx512 avx2
    PARAMS degree=2)

holdfast_kernel(power DTYPES f16 bf16 CHUNKS 64
    SIZES 64x64
    TARGETS avx512 avx2
    PARAMS degree=2
    COSTLY f16 bf16)

foreach(degree 3 4)
  holdfast_kernel(power DTYPES f32 CHUNKS 64
      SIZES 16x64
      TARGETS avx512 avx2
      PARAMS degree=${degree})
endforeach()

holdfast_kernel(power DTYPES f32 f16 bf16 CHUNKS 64
    SIZES any
    TARGETS avx512 avx2 generic
    PARAMS degree=0
    COSTLY f16 bf16)

holdfast_kernel(power DTYPES f32 f16 bf16 CHUNKS 64
    SIZES any
    TARGETS cuda metal opencl vulkan
    PARAMS degree=0 any_state_strides=true)

# Its gradient, for chunks of the same length.
holdfast_kernel(power_backward DTYPES f32 CHUNKS 64
    SIZES 32x32 64x64 128x128
    TARGETS avx512 avx2
    PARAMS degree=2)

holdfast_kernel(power_backward DTYPES f16 bf16 CHUNKS 64
    SIZES 64x64
    TARGETS avx512 avx2
    PARAMS degree=2
    COSTLY f16 bf16)

holdfast_kernel(power_backward DTYPES f32 CHUNKS 64
    SIZES 16x64
    TARGETS avx512 avx2
    PARAMS degree=3)

holdfast_kernel(power_backward DTYPES f32 f16 bf16 CHUNKS 64
    SIZES any
    TARGETS avx512 avx2 generic
    PARAMS degree=0
    COSTLY f16 bf16)

# On GPUs correct, not yet tuned.
holdfast_kernel(power_backward DTYPES f32 f16 bf16 CHUNKS 64
    SIZES any
    TARGETS cuda metal opencl vulkan
    PARAMS degree=0 any_state_strides=true
    COSTLY f16 bf16)

holdfast_kernel(power_step DTYPES f32 f16 bf16
    SIZES 64x32 64x64
    TARGETS avx512 avx2
    PARAMS degree=2
    COSTLY f16 bf16)

holdfast_kernel(power_step DTYPES f32 f16 bf16
    SIZES any
    TARGETS avx512 avx2 generic
    PARAMS degree=0
    COSTLY f16 bf16)

holdfast_kernel(power_step DTYPES f32 f16 bf16
    SIZES any
    TARGETS cuda metal opencl vulkan
    PARAMS degree=0 any_state_strides=true)
