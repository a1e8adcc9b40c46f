#include "cpu_features.h"

#include <cstdint>
#include <sstream>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace holdfast {
namespace {

#if defined(__x86_64__)

enum Register { eax, ebx, ecx, edx };

// What the operating system must save on a context switch for the registers to be usable: bits of XCR0.
enum SavedState : uint64_t { none = 0, ymm = 0x6, zmm = 0xe6, tiles = 0x60000 };

struct Feature {
    const char *name;
    uint32_t leaf, subleaf;
    Register reg;
    int bit;
    SavedState needs;
};

// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, CPUID.
constexpr Feature known_features[] = {
    {"sse41", 1, 0, ecx, 19, none},     {"avx", 1, 0, ecx, 28, ymm},         {"f16c", 1, 0, ecx, 29, ymm},
    {"fma", 1, 0, ecx, 12, ymm},        {"avx2", 7, 0, ebx, 5, ymm},         {"avx512f", 7, 0, ebx, 16, zmm},
    {"avx512dq", 7, 0, ebx, 17, zmm},   {"avx512cd", 7, 0, ebx, 28, zmm},    {"avx512bw", 7, 0, ebx, 30, zmm},
    {"avx512vl", 7, 0, ebx, 31, zmm},   {"avx512_vnni", 7, 0, ecx, 11, zmm}, {"avx512_fp16", 7, 0, edx, 23, zmm},
    {"avx512_bf16", 7, 1, eax, 5, zmm}, {"amx_tile", 7, 0, edx, 24, tiles},  {"amx_int8", 7, 0, edx, 25, tiles},
    {"amx_bf16", 7, 0, edx, 22, tiles},
};

uint64_t saved_states() {
    uint32_t r[4];
    if (!__get_cpuid(1, &r[eax], &r[ebx], &r[ecx], &r[edx]) || !(r[ecx] & (1u << 27))) return 0;  // OSXSAVE
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    uint64_t saved = ((uint64_t)high << 32) | low;
#if defined(__linux__)
    // Linux hands out tile registers on request only, for the whole process (arch_prctl, kernel 5.16).
    constexpr int request_permission = 0x1023, tile_data = 18;
    if ((saved & tiles) == tiles && syscall(SYS_arch_prctl, request_permission, tile_data) != 0) saved &= ~(uint64_t)tiles;
#endif
    return saved;
}

std::string find_features() {
    const uint64_t saved = saved_states();
    std::string list;
    for (const Feature &f : known_features) {
        uint32_t r[4] = {0, 0, 0, 0};
        if (!__get_cpuid_count(f.leaf, f.subleaf, &r[eax], &r[ebx], &r[ecx], &r[edx])) continue;
        if (!(r[f.reg] >> f.bit & 1) || (saved & f.needs) != f.needs) continue;
        list += (list.empty() ? "" : " ") + std::string(f.name);
    }
    return list;
}

#else

std::string find_features() { return ""; }

#endif

}  // namespace

const std::string &cpu_features() {
    static const std::string list = find_features();
    return list;
}

std::string missing_cpu_features(const std::string &needed) {
    const std::string have = " " + cpu_features() + " ";
    std::istringstream words(needed);
    std::string missing;
    for (std::string word; words >> word;)
        if (have.find(" " + word + " ") == std::string::npos) missing += (missing.empty() ? "" : " ") + word;
    return missing;
}

}  // namespace holdfast
