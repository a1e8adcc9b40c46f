#include "emulator.h"

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

namespace test {
namespace {

constexpr int tiles = 8, most_rows = 16, most_bytes = 64;  // palette 1

struct Tile {
    int rows, bytes;  // of a row
    bool written;
    uint8_t data[most_rows][most_bytes];
};
struct {
    bool configured;
    Tile tile[tiles];
} state;
long products = 0;

[[noreturn]] void refuse(const char *why) {
    const auto say = [](const char *text) { (void)!write(STDERR_FILENO, text, std::strlen(text)); };
    say("AMX: "), say(why), say("\n");
    std::abort();
}

struct Instruction {
    const uint8_t *next;
    uint8_t opcode;
    int prefix;                  // 0: none, 1: 66, 2: F3, 3: F2
    int reg, rm, vvvv;           // as numbers of tiles
    bool registers;              // rm is one, not memory
    uint8_t *address = nullptr;  // of memory
    int64_t stride = 0;          // from row to row

    /// False if it is none of AMX.
    bool decode(const uint8_t *code, const greg_t *registers_of_thread) {
        if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || code[2] & 0x84) return false;  // VEX, map 0F38, W0, 128 bits
        opcode = code[3], prefix = code[2] & 3, vvvv = (~code[2] >> 3) & 15;
        if (opcode != 0x49 && opcode != 0x4b && opcode != 0x5c) return false;
        const int mod = code[4] >> 6, base_high = code[1] & 0x20 ? 0 : 8, index_high = code[1] & 0x40 ? 0 : 8;
        reg = (code[4] >> 3 & 7), rm = code[4] & 7, registers = mod == 3;
        next = code + 5;
        if (registers) return true;
        static const int order[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                    REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
        const auto value = [&](int n) { return (int64_t)registers_of_thread[order[n]]; };
        int base = rm, index = 4, scale = 0;
        if (rm == 4) base = *next & 7, index = (*next >> 3 & 7) + index_high, scale = *next >> 6, next++;
        int64_t at = 0;
        const bool no_base = base == 5 && mod == 0, relative = no_base && rm != 4;
        if (!no_base) at = value(base + base_high);
        if (mod == 1) at += (int8_t)*next, next += 1;
        if (mod == 2 || no_base) {
            int32_t far;
            std::memcpy(&far, next, 4);
            at += far, next += 4;
        }
        if (relative) at += (int64_t)next;
        stride = index == 4 ? 0 : value(index) << scale;
        address = (uint8_t *)at;
        return true;
    }
};

float flushed(float x) { return std::abs(x) < std::numeric_limits<float>::min() ? x * 0 : x; }

struct Matrix {
    float of[most_rows][most_bytes / 2];
    explicit Matrix(const Tile &t) {
        for (int row = 0; row < t.rows; row++)
            for (int n = 0; n < t.bytes / 2; n++) {
                uint16_t half;
                std::memcpy(&half, &t.data[row][2 * n], 2);
                const uint32_t bits = (uint32_t)half << 16;
                std::memcpy(&of[row][n], &bits, 4);
                of[row][n] = flushed(of[row][n]);
            }
    }
};

void configure(const uint8_t *c) {
    if (c[0] != 1) refuse("ldtilecfg: the palette is not 1");
    state = {};
    for (int n = 0; n < tiles; n++) {
        uint16_t bytes;
        std::memcpy(&bytes, c + 16 + 2 * n, 2);
        const int rows = c[48 + n];
        if (rows > most_rows || bytes > most_bytes || !rows != !bytes)
            refuse("ldtilecfg: a tile has a shape that there is not");
        state.tile[n].rows = rows, state.tile[n].bytes = bytes;
    }
    state.configured = true;
}

Tile &tile(int n) {
    if (n >= tiles || !state.configured || !state.tile[n].rows) refuse("a tile is used that is not configured");
    return state.tile[n];
}
const Tile &written(int n) {
    if (!tile(n).written) refuse("a tile is read that was not written");
    return tile(n);
}

// Sums of even and of odd terms apart, each by fused multiply-adds; numbers below the normal ones are zero.
__attribute__((target("avx2,fma"))) void multiply(Tile &sum, const Tile &a, const Tile &b) {
    const int columns = sum.bytes / 4, pairs = a.bytes / 4;
    if (a.rows != sum.rows || b.bytes != sum.bytes || b.rows != pairs) refuse("tdpbf16ps: the shapes do not fit");
    const Matrix x(a), y(b);
    for (int m = 0; m < sum.rows; m++) {
        float parts[most_bytes / 2] = {}, s[most_bytes / 4];
        for (int k = 0; k < pairs; k++)
            for (int n = 0; n < 2 * columns; n++)
                parts[n] = flushed(__builtin_fmaf(x.of[m][2 * k + n % 2], y.of[k][n], parts[n]));
        std::memcpy(s, sum.data[m], sum.bytes);
        for (int n = 0; n < columns; n++) s[n] = flushed(flushed(s[n]) + flushed(parts[2 * n] + parts[2 * n + 1]));
        std::memcpy(sum.data[m], s, sum.bytes);
    }
    products++;
}

bool run(const Instruction &i) {
    switch (i.opcode << 8 | i.prefix << 4 | i.registers) {
    case 0x4900: configure(i.address); return true;
    case 0x4901: state = {}; return true;  // tilerelease
    case 0x4931: {                         // tilezero
        Tile &t = tile(i.reg);
        std::memset(t.data, 0, sizeof t.data), t.written = true;
        return true;
    }
    case 0x4b10:    // tileloaddt1
    case 0x4b30: {  // tileloadd
        Tile &t = tile(i.reg);
        std::memset(t.data, 0, sizeof t.data), t.written = true;
        for (int row = 0; row < t.rows; row++) std::memcpy(t.data[row], i.address + row * i.stride, t.bytes);
        return true;
    }
    case 0x4b20: {  // tilestored
        const Tile &t = written(i.reg);
        for (int row = 0; row < t.rows; row++) std::memcpy(i.address + row * i.stride, t.data[row], t.bytes);
        return true;
    }
    case 0x5c21: {  // tdpbf16ps
        if (i.reg == i.rm || i.reg == i.vvvv || i.rm == i.vvvv) refuse("tdpbf16ps: two operands are one register");
        written(i.reg);
        multiply(tile(i.reg), written(i.rm), written(i.vvvv));
        return true;
    }
    default: return false;
    }
}

void on_invalid_opcode(int, siginfo_t *, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    Instruction i;
    if (i.decode((const uint8_t *)registers[REG_RIP], registers) && run(i)) {
        registers[REG_RIP] = (greg_t)i.next;
        return;
    }
    signal(SIGILL, SIG_DFL);  // ends the process, at that instruction
}

}  // namespace

void emulate_amx() {
    struct sigaction action = {};
    action.sa_sigaction = on_invalid_opcode;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
}

long emulated_products() { return products; }

}  // namespace test
