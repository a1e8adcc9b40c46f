# The kinds of hardware, best first: dispatch takes the first one of the backend in use that runs here. `generic` stays last.
#
#   holdfast_target(name
#       BACKEND   cpu (default) | cuda | metal | opencl | vulkan: what runs it; each compiled one is in the Halide runtime too
#       ARCH      <processor>     built where CMake's target processor is this; without it: everywhere
#       SYSTEMS   <Halide's names of operating systems>   built for these; without it: for all
#       FEATURES  <Halide target features>
#       NEEDS     <CPU features, as runtime/src/cpu_features.cpp names them: all must be there at run time>
#       TESTED_ON <what runs its kernels in the tests>   TESTED <the kernels, where not all>: for README's table)

# Products of bf16 in tile registers. Of Halide's features one stands for all of Sapphire Rapids; LLVM may use any of them.
holdfast_target(amx
    ARCH x86-64
    SYSTEMS linux
    FEATURES sse41 avx avx2 f16c fma avx512 avx512_skylake avx512_cannonlake avx512_zen4 avx512_sapphirerapids
    NEEDS sse41 avx avx2 f16c fma avx512f avx512cd avx512dq avx512bw avx512vl avx512_ifma avx512_vbmi avx512_vbmi2
        avx512_vnni avx512_bitalg avx512_vpopcntdq gfni avx512_bf16 avx512_fp16 amx_tile amx_bf16
    TESTED_ON "AVX-512 CPUs, tiles emulated")

# Products of bf16 in vectors, where they are faster than widening. All of Zen 4 behind one feature, likewise.
holdfast_target(avx512_bf16
    ARCH x86-64
    FEATURES sse41 avx avx2 f16c fma avx512 avx512_skylake avx512_cannonlake avx512_zen4
    NEEDS sse41 avx avx2 f16c fma avx512f avx512cd avx512dq avx512bw avx512vl avx512_ifma avx512_vbmi avx512_vbmi2
        avx512_vnni avx512_bitalg avx512_vpopcntdq gfni avx512_bf16 fast_bf16_dot
    TESTED_ON CPUs)

holdfast_target(avx512
    ARCH x86-64
    FEATURES sse41 avx avx2 f16c fma avx512 avx512_skylake
    NEEDS sse41 avx avx2 f16c fma avx512f avx512cd avx512dq avx512bw avx512vl
    TESTED_ON CPUs)

holdfast_target(avx2
    ARCH x86-64
    FEATURES sse41 avx avx2 f16c fma
    NEEDS sse41 avx avx2 f16c fma
    TESTED_ON CPUs)

# Host code of the GPUs' targets runs on any processor. CUDA, OpenCL and Vulkan are loaded at run time, where they are;
# Metal is linked.
holdfast_target(cuda
    BACKEND cuda
    SYSTEMS linux
    FEATURES cuda cuda_capability_80
    TESTED_ON "a PTX interpreter" TESTED chunkwise chunkwise_backward recurrent parallel parallel_backward power_backward)

holdfast_target(metal
    BACKEND metal
    SYSTEMS osx ios
    FEATURES metal
    TESTED_ON "a stand-in")

holdfast_target(opencl
    BACKEND opencl
    SYSTEMS linux
    FEATURES opencl
    TESTED_ON PoCL)

# vk_int16: vectors of bool become 16-bit integers. Signed >> and / of negative numbers are wrong in Halide 21.
holdfast_target(vulkan
    BACKEND vulkan
    SYSTEMS linux
    FEATURES vulkan vk_int8 vk_int16
    TESTED_ON lavapipe)

holdfast_target(generic
    TESTED_ON CPUs)
