# The kinds of hardware, best first: dispatch takes the first one that the machine runs. `generic` stays last.
#
#   holdfast_target(name
#       ARCH      <processor>     built where CMake's target processor is this; without it: everywhere
#       FEATURES  <Halide target features>
#       NEEDS     <CPU features, as runtime/src/cpu_features.cpp names them: all must be there at run time>
#       PARAMS    <generator parameters>)
#
# PARAMS causal_tile is the tile of the schedule that the target picks (generators/chunkwise.h).

holdfast_target(avx512
    ARCH x86-64
    FEATURES sse41 avx avx2 f16c fma avx512 avx512_skylake
    NEEDS sse41 avx avx2 f16c fma avx512f avx512cd avx512dq avx512bw avx512vl
    PARAMS causal_tile=32)

holdfast_target(avx2
    ARCH x86-64
    FEATURES sse41 avx avx2 f16c fma
    NEEDS sse41 avx avx2 f16c fma
    PARAMS causal_tile=16)

holdfast_target(generic
    PARAMS causal_tile=8)
