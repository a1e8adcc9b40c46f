// CPU features that a test may use although the library does not see them: virtual machines often hide from CPUID what their
// processor runs, and tiles are emulated. So kernels for processors that are not at hand are tested on many that are.
#pragma once
#include "../x86/emulator.h"

#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <signal.h>
#include <sys/mman.h>
#endif

namespace test {

#if defined(__x86_64__) && defined(__linux__)

inline sigjmp_buf after_invalid_opcode;

/// This processor runs the instruction. It may change xmm0 alone.
inline bool runs(const uint8_t (&instruction)[6]) {
    void *page = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) return false;
    std::memcpy(page, instruction, sizeof instruction);
    ((uint8_t *)page)[sizeof instruction] = 0xc3;  // ret
    struct sigaction action = {}, before;
    action.sa_handler = [](int) { siglongjmp(after_invalid_opcode, 1); };
    sigaction(SIGILL, &action, &before);
    bool ran = false;
    if (mprotect(page, 4096, PROT_READ | PROT_EXEC) == 0 && sigsetjmp(after_invalid_opcode, 1) == 0)
        ((void (*)())page)(), ran = true;
    sigaction(SIGILL, &before, nullptr);
    munmap(page, 4096);
    return ran;
}

/// Kernels that need this CPU feature can be run in this process. Tiles: from now on, by emulation.
inline bool can_be_tested(const std::string &feature) {
    static const bool bf16 = runs({0x62, 0xf2, 0x7e, 0x48, 0x52, 0xc0});  // vdpbf16ps zmm0, zmm0, zmm0
    static const bool fp16 = runs({0x62, 0xf5, 0x7d, 0x08, 0x6e, 0xc0});  // vmovw xmm0, eax
    if (feature == "avx512_bf16") return bf16;
    if (feature == "avx512_fp16") return fp16;
    if (feature == "fast_bf16_dot") return true;  // slow is good enough
    if (feature != "amx_tile" && feature != "amx_bf16") return false;
    static const bool emulated = (emulate_amx(), true);
    return emulated;
}

#else

inline bool can_be_tested(const std::string &) { return false; }

#endif

}  // namespace test
