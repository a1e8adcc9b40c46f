# The kinds of hardware, best first: dispatch takes the first one that the machine runs. `generic` stays last.
#
#   holdfast_target(name
#       ARCH      <processor>     built where CMake's target processor is this; without it: everywhere
#       FEATURES  <Halide target features>
#       NEEDS     <CPU features, as runtime/src/cpu_features.cpp names them: all must be there at run time>)

holdfast_target(avx512
    ARCH x86-64
    FEATURES sse41 avx avx2 f16c fma avx512 avx512_skylake
    NEEDS sse41 avx avx2 f16c fma avx512f avx512cd avx512dq avx512bw avx512vl)

holdfast_target(avx2
    ARCH x86-64
    FEATURES sse41 avx avx2 f16c fma
    NEEDS sse41 avx avx2 f16c fma)

holdfast_target(generic)
