// Metal, sizes of the table: the floor (schedules/gpu/chunkwise.cpp) with twice the rows for a thread, which Apple's GPUs have
// registers for. No Mac has timed it: it is by count.
//
// Apple documents 32 KiB of threadgroup memory, 1024 threads a group, in SIMD groups of 32; measured are (github.com/philipturner/
// metal-benchmarks) 128 multiply-adds a cycle and core, 384 KiB of registers, 128 for each of 768 threads, and a data cache of 8 KiB.
// A SIMD group covers 64 columns of two pieces. With 4 x 4 it reads 288 bytes, 256 of a row of states or values, for 512
// multiply-adds: 72 a cycle; with 8 x 4 320 for 1024: 40 a cycle, by 64 sums of the two products, and half as many SIMD groups read
// the same states and values. Of threadgroup memory a group takes 8 KiB, for weights.
#include "../gpu/chunkwise.h"
#include "../schedule.h"

#include <algorithm>

namespace {
using namespace holdfast;

void apply(ChunkwiseFuncs &f, const ChunkwiseSizes &sizes, const Halide::Target &) {
    gpu::schedule(f, sizes, {std::min(sizes.value, 128), gpu::strip, 4, 8},
                  {std::min(sizes.value, 64), std::min(sizes.key, 32), 4, 8});
}

// Of any sizes, known at run time only, the floor has pieces of one column.
bool matches(const Halide::Target &t, const ChunkwiseSizes &s) {
    return t.has_feature(Halide::Target::Metal) && s.key >= 32 && s.value >= 32 && gpu::fits(s);
}

const bool added = Schedule<ChunkwiseFuncs, ChunkwiseSizes>::add({"metal", 10, matches, apply});
}  // namespace
