#include "peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace holdfast_bench {
namespace {

// Each loop does `steps` steps of `accumulators` independent chains. A multiply-add takes 4 to 5 cycles and two start per
// cycle, so that 10 chains or more keep both units busy; the rest of the registers hold the two constants. The chains
// converge (x * 0.5 + 1), so that neither infinities nor denormals slow them down. The empty asm hides from the compiler
// that all start alike, and uses the results.
using Loop = void (*)(long steps);
constexpr int amx_flops_per_step = 4 * 2 * 16 * 16 * 32;

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

__attribute__((target("avx512f,avx512bf16"))) void avx512_bf16_loop(long steps) {
    __m512bh one = (__m512bh)_mm512_set1_epi16(0x3f80);
    __m512 x[avx512_accumulators];
#pragma GCC unroll 24
    for (__m512 &chain : x) asm volatile("" : "=v"(chain) : "0"(_mm512_setzero_ps()));
    for (long n = 0; n < steps; n++) {
#pragma GCC unroll 24
        for (__m512 &chain : x) chain = _mm512_dpbf16_ps(chain, one, one);
    }
#pragma GCC unroll 24
    for (__m512 &chain : x) asm volatile("" : : "v"(chain));
}

// 2 x 2 tiles of sums, from two tiles of operands on each side: all zeros, which take as long as others.
__attribute__((target("amx-tile,amx-bf16"))) void amx_loop(long steps) {
    struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (long n = 0; n < steps; n++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
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

// Changes signs alone, so that numbers stay what they are however often.
template<class Vector>
inline __attribute__((always_inline)) void turn(float *data, size_t count) {
    constexpr size_t lanes = sizeof(Vector) / sizeof(float), unrolled = 4 * lanes;
    for (size_t n = 0; n + unrolled <= count; n += unrolled) {
#pragma GCC unroll 4
        for (size_t m = 0; m < unrolled; m += lanes) {
            Vector x;
            std::memcpy(&x, data + n + m, sizeof x);
            x = -x;
            std::memcpy(data + n + m, &x, sizeof x);
        }
    }
}
using Update = void (*)(float *data, size_t count);
#if defined(__x86_64__)
__attribute__((target("avx512f"))) void avx512_update(float *data, size_t count) { turn<__m512>(data, count); }
__attribute__((target("avx2"))) void avx2_update(float *data, size_t count) { turn<__m256>(data, count); }
#endif
void baseline_update(float *data, size_t count) { turn<Float4>(data, count); }

struct Unit {
    const char *name;
    Loop loop;
    int flops_per_step;
    Update update;
};

Unit widest_unit() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return {"avx512", avx512_loop, 2 * 16 * avx512_accumulators, avx512_update};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return {"avx2", avx2_loop, 2 * 8 * avx2_accumulators, avx2_update};
#endif
    return {"baseline", baseline_loop, 2 * 4 * baseline_accumulators, baseline_update};
}

/// No flops where there is none. Tiles are to be asked for: runtime/src/cpu_features.cpp.
Unit widest_bf16_unit() {
#if defined(__x86_64__) && defined(__linux__)
    unsigned a, b, c, d;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & 1u << 22) && (d & 1u << 24) && !syscall(SYS_arch_prctl, 0x1023, 18))
        return {"amx", amx_loop, amx_flops_per_step, nullptr};
#endif
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bf16")) return {"avx512_bf16", avx512_bf16_loop, 2 * 32 * avx512_accumulators, nullptr};
#endif
    return {"none", nullptr, 0, nullptr};
}

/// The sum over threads of the best rate that each reaches: run() does work and says how much, on all threads at once.
template<class Run>
double best_rates(int threads, int runs, const Run &run) {
    using Clock = std::chrono::steady_clock;
    std::vector<double> best(threads, 0.0);
    std::atomic<int> waiting{threads};
    auto measure = [&](int thread) {
        auto work = run();
        waiting--;
        while (waiting > 0) std::this_thread::yield();
        for (int n = 0; n < runs; n++) {
            const auto start = Clock::now();
            const double done = work();
            const std::chrono::duration<double> seconds = Clock::now() - start;
            best[thread] = std::max(best[thread], done / seconds.count());
        }
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; thread++) others.emplace_back(measure, thread);
    measure(0);
    for (std::thread &other : others) other.join();
    return std::accumulate(best.begin(), best.end(), 0.0);
}

}  // namespace

static Peak measure(const Unit &unit, int threads) {
    constexpr int runs = 100;  // of about a millisecond on every thread, without a pause between them
    const long steps = unit.flops_per_step < amx_flops_per_step ? 1 << 17 : 1 << 15;
    const double flops = best_rates(threads, runs, [&] {
        return [&] {
            unit.loop(steps);
            return (double)unit.flops_per_step * steps;
        };
    });
    return {flops, unit.name};
}

Peak measure_peak(int threads) { return measure(widest_unit(), threads); }

Peak measure_bf16_peak(int threads) {
    const Unit unit = widest_bf16_unit();
    return unit.loop ? measure(unit, threads) : Peak{0, unit.name};
}

/// work(memory of `bytes`) on each of `threads`, which moves twice `moved` bytes and takes turns of half a millisecond or more.
template<class Work>
static double bandwidth(size_t bytes, size_t moved, int threads, const Work &work) {
    constexpr size_t bytes_in_a_run = 8 << 20;
    constexpr int runs = 100;
    const int times = (int)((bytes_in_a_run + moved - 1) / moved);
    return best_rates(threads, moved > bytes_in_a_run ? runs / 10 : runs, [&] {
        constexpr size_t line = 64;
        return [=, memory = std::make_shared<std::vector<char>>(bytes + line, 1)] {
            char *data = memory->data() + (line - (uintptr_t)memory->data() % line);
            for (int n = 0; n < times; n++) work(data, n);
            volatile char used = data[bytes / 2];
            (void)used;
            return 2.0 * moved * times;
        };
    });
}

double measure_copy(size_t bytes, int threads) {
    const size_t half = std::max<size_t>(bytes / threads / 2, 64);
    return bandwidth(2 * half, half, threads,
                     [half](char *data, int n) { std::memcpy(data + (n & 1 ? 0 : half), data + (n & 1 ? half : 0), half); });
}

double measure_update(size_t bytes, int threads) {
    constexpr size_t step = 4 * 64;  // of the widest vectors
    const size_t share = std::max(bytes / threads / step, (size_t)1) * step;
    return bandwidth(share, share, threads,
                     [share, update = widest_unit().update](char *data, int) { update((float *)data, share / sizeof(float)); });
}

}  // namespace holdfast_bench
