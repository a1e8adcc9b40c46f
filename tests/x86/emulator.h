// Intel's AMX in software, for processors without it: their invalid-opcode signal (SIGILL) computes what the instruction would
// have, and the program goes on behind it. So the machine code that ships runs, some thousand times slower.
//
// After "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 2, and written without looking at LLVM, which
// made that code. Of AMX there are tiles and products of bf16. What the manual forbids ends the process: an instruction without
// a configuration, shapes that do not fit, a tile register that was never written.
#pragma once

namespace test {

/// From here on, tile instructions run in this process: on the processor if it has them, else here. One thread at a time.
void emulate_amx();

/// Products of tiles that were emulated so far.
long emulated_products();

}  // namespace test
