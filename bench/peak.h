// The peaks and the memory of this machine, measured: what benchmarks are compared with.
#pragma once
#include <cstddef>

namespace holdfast_bench {

struct Peak {
    double flops;      // floating point operations per second of all `threads` together; a fused multiply-add counts as two
    const char *unit;  // what was measured: "avx512", "avx2" or "baseline"; of bf16: below
};

/// Fused multiply-adds on registers alone, on `threads` threads at once, with the widest vectors that this CPU has. The best
/// of a hundred short runs per thread, about 0.1 s in all.
Peak measure_peak(int threads);

/// The same of products of bf16 summed in fp32: of tiles ("amx"), else of vectors ("avx512_bf16"); 0 flops where this CPU has
/// neither.
Peak measure_bf16_peak(int threads);

/// Bytes per second that `threads` threads together read and write when each copies one half of its share of `bytes` to the
/// other half, again and again. The best of many runs, about 0.1 s in all.
double measure_copy(size_t bytes, int threads);

/// The same when each multiplies all of its share of `bytes` by a constant, in place: no line has to be fetched only to be
/// written over, so that this can be faster.
double measure_update(size_t bytes, int threads);

}  // namespace holdfast_bench
