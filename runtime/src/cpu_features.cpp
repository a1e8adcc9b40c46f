#include "cpu_features.h"

#include <cerrno>
#include <cstdint>
#include <cstring>
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
    {"sse41", 1, 0, ecx, 19, none},      {"avx", 1, 0, ecx, 28, ymm},           {"f16c", 1, 0, ecx, 29, ymm},
    {"fma", 1, 0, ecx, 12, ymm},         {"avx2", 7, 0, ebx, 5, ymm},           {"avx512f", 7, 0, ebx, 16, zmm},
    {"avx512dq", 7, 0, ebx, 17, zmm},    {"avx512cd", 7, 0, ebx, 28, zmm},      {"avx512bw", 7, 0, ebx, 30, zmm},
    {"avx512vl", 7, 0, ebx, 31, zmm},    {"avx512_vnni", 7, 0, ecx, 11, zmm},   {"avx512_fp16", 7, 0, edx, 23, zmm},
    {"avx512_bf16", 7, 1, eax, 5, zmm},  {"amx_tile", 7, 0, edx, 24, tiles},    {"amx_int8", 7, 0, edx, 25, tiles},
    {"amx_bf16", 7, 0, edx, 22, tiles},  {"avx512_ifma", 7, 0, ebx, 21, zmm},   {"avx512_vbmi", 7, 0, ecx, 1, zmm},
    {"avx512_vbmi2", 7, 0, ecx, 6, zmm}, {"avx512_bitalg", 7, 0, ecx, 12, zmm}, {"avx512_vpopcntdq", 7, 0, ecx, 14, zmm},
    {"gfni", 7, 0, ecx, 8, none},
};

/// Not a feature that CPUID has. Intel's processors start a vdpbf16ps of 512 bits every second cycle (measured on Emerald
/// Rapids), and two multiply-adds of fp32 in every one: twice the terms. AMD's from Zen 4 on start one a cycle, as many as
/// multiply-adds in Zen 4.
constexpr const char *fast_bf16_dot = "fast_bf16_dot";

bool made_by_intel() {
    uint32_t r[4];
    if (!__get_cpuid(0, &r[eax], &r[ebx], &r[ecx], &r[edx])) return false;
    return r[ebx] == 0x756e6547 && r[edx] == 0x49656e69 && r[ecx] == 0x6c65746e;  // GenuineIntel
}

uint64_t saved_states() {
    uint32_t r[4];
    if (!__get_cpuid(1, &r[eax], &r[ebx], &r[ecx], &r[edx]) || !(r[ecx] & (1u << 27))) return 0;  // OSXSAVE
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32) | low;
}

std::string find_features() {
    const uint64_t saved = saved_states();
    std::string list;
    for (const Feature &f : known_features) {
        uint32_t r[4] = {0, 0, 0, 0};
        if (!__get_cpuid_count(f.leaf, f.subleaf, &r[eax], &r[ebx], &r[ecx], &r[edx])) continue;
        if (!(r[f.reg] >> f.bit & 1) || (saved & f.needs) != f.needs) continue;
        list += (list.empty() ? "" : " ") + std::string(f.name);
        if (f.name == std::string("avx512_bf16") && !made_by_intel()) list += " " + std::string(fast_bf16_dot);
    }
    return list;
}

#else

std::string find_features() { return ""; }

#endif

std::string ask_for_tiles() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr int request_permission = 0x1023, tile_data = 18;
    if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0)
        return "Linux's permission for tile registers (arch_prctl: " + std::string(std::strerror(errno)) + ")";
#endif
    return "";
}

}  // namespace

const std::string &missing_permission_for_tiles() {
    static const std::string missing = ask_for_tiles();
    return missing;
}

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
