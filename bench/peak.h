// The fp32 peak of this machine, measured: what benchmarks are compared with.
#pragma once

namespace holdfast_bench {

struct Peak {
    double flops;      // floating point operations per second of all `threads` together; a fused multiply-add counts as two
    const char *unit;  // what was measured: "avx512", "avx2" or "baseline"
};

/// Fused multiply-adds on registers alone, on `threads` threads at once, with the widest vectors that this CPU has. The best
/// of a hundred short runs per thread, about 0.1 s in all.
Peak measure_peak(int threads);

}  // namespace holdfast_bench
