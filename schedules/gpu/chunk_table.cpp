// Every GPU API: a thread per entry.
#include "../../generators/chunks.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

void apply(ChunkTableFuncs &f, const ChunkTableSizes &, const Target &) {
    Var n = f.entries.args()[0], block("block"), thread("thread");
    f.entries.gpu_single_thread();  // undefined
    f.entries.update().gpu_tile(n, block, thread, 64, TailStrategy::GuardWithIf);
}

bool matches(const Target &t, const ChunkTableSizes &) { return t.has_gpu_feature(); }

const bool added = Schedule<ChunkTableFuncs, ChunkTableSizes>::add({"gpu", 0, matches, apply});
}  // namespace
