// What schedules of kernels that only copy have in common on every GPU API.
#pragma once
#include "Halide.h"

namespace holdfast::gpu {

/// A thread for each element of four axes, in blocks of 32 x 8 along the first two, under the limits of chunkwise.cpp.
inline void thread_per_element(Halide::Func f) {
    using namespace Halide;
    const std::vector<Var> args = f.args();
    Var x = args[0], y = args[1], eo("eo"), ei("ei"), fo("fo"), fi("fi"), block("block");
    f.split(x, eo, ei, 32, TailStrategy::GuardWithIf)
        .split(y, fo, fi, 8, TailStrategy::GuardWithIf)
        .fuse(eo, fo, block)
        .reorder(ei, fi, block, args[2], args[3])
        .gpu_blocks(block, args[2], args[3])
        .gpu_threads(ei, fi);
}

}  // namespace holdfast::gpu
