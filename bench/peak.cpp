#include "peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace holdfast_bench {
namespace {

// Each loop does `steps` steps of `accumulators` independent chains. A multiply-add takes 4 to 5 cycles and two start per
// cycle, so that 10 chains or more keep both units busy; the rest of the registers hold the two constants. The chains
// converge (x * 0.5 + 1), so that neither infinities nor denormals slow them down. The empty asm hides from the compiler
// that all start alike, and uses the results.
using Loop = void (*)(long steps);

#if defined(__x86_64__)
constexpr int avx512_accumulators = 24, avx2_accumulators = 12;

__attribute__((target("avx512f"))) void avx512_loop(long steps) {
    const __m512 half = _mm512_set1_ps(0.5f), one = _mm512_set1_ps(1.0f);
    __m512 x[avx512_accumulators];
#pragma GCC unroll 24
    for (__m512 &chain : x) asm volatile("" : "=v"(chain) : "0"(one));
    for (long n = 0; n < steps; n++) {
#pragma GCC unroll 24
        for (__m512 &chain : x) chain = _mm512_fmadd_ps(chain, half, one);
    }
#pragma GCC unroll 24
    for (__m512 &chain : x) asm volatile("" : : "v"(chain));
}

__attribute__((target("avx2,fma"))) void avx2_loop(long steps) {
    const __m256 half = _mm256_set1_ps(0.5f), one = _mm256_set1_ps(1.0f);
    __m256 x[avx2_accumulators];
#pragma GCC unroll 12
    for (__m256 &chain : x) asm volatile("" : "=x"(chain) : "0"(one));
    for (long n = 0; n < steps; n++) {
#pragma GCC unroll 12
        for (__m256 &chain : x) chain = _mm256_fmadd_ps(chain, half, one);
    }
#pragma GCC unroll 12
    for (__m256 &chain : x) asm volatile("" : : "x"(chain));
}
#endif

// Vectors of 16 bytes, which every processor we know of has; multiplication and addition apart where there is no fused one.
typedef float Float4 __attribute__((vector_size(16)));
constexpr int baseline_accumulators = 12;

void baseline_loop(long steps) {
    const Float4 half = {0.5f, 0.5f, 0.5f, 0.5f}, one = {1, 1, 1, 1};
    volatile float start[baseline_accumulators] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};  // no asm: any architecture
    Float4 x[baseline_accumulators];
#pragma GCC unroll 12
    for (int n = 0; n < baseline_accumulators; n++) x[n] = one * start[n];
    for (long n = 0; n < steps; n++) {
#pragma GCC unroll 12
        for (Float4 &chain : x) chain = chain * half + one;
    }
    Float4 sum = {0, 0, 0, 0};
    for (const Float4 &chain : x) sum += chain;
    volatile float used = sum[0] + sum[1] + sum[2] + sum[3];
    (void)used;
}

struct Unit {
    const char *name;
    Loop loop;
    int flops_per_step;
};

Unit widest_unit() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return {"avx512", avx512_loop, 2 * 16 * avx512_accumulators};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"avx2", avx2_loop, 2 * 8 * avx2_accumulators};
#endif
    return {"baseline", baseline_loop, 2 * 4 * baseline_accumulators};
}

}  // namespace

Peak measure_peak(int threads) {
    using Clock = std::chrono::steady_clock;
    constexpr long steps = 1 << 17;
    constexpr int runs = 100;  // of about a millisecond on every thread, without a pause between them
    const Unit unit = widest_unit();
    std::vector<double> best(threads, 0.0);
    std::atomic<int> waiting{threads};
    auto measure = [&](int thread) {
        waiting--;
        while (waiting > 0) std::this_thread::yield();
        for (int run = 0; run < runs; run++) {
            const auto start = Clock::now();
            unit.loop(steps);
            const std::chrono::duration<double> seconds = Clock::now() - start;
            best[thread] = std::max(best[thread], (double)unit.flops_per_step * steps / seconds.count());
        }
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; thread++) others.emplace_back(measure, thread);
    measure(0);
    for (std::thread &other : others) other.join();
    double sum = 0;
    for (double flops : best) sum += flops;
    return {sum, unit.name};
}

}  // namespace holdfast_bench
