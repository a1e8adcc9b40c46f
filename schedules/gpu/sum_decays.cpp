// Every GPU API: a thread per block of tokens, then one per head.
#include "../../generators/sum_decays.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

void apply(SumDecaysFuncs &f, const SumDecaysSizes &, const Target &) {
    Func blocks = f.of_block.in();
    const std::vector<Var> args = blocks.args();
    Var outer("outer"), thread("thread");
    blocks.compute_root()
        .split(args[0], outer, thread, 32, TailStrategy::GuardWithIf)
        .gpu_blocks(outer, args[1], args[2])
        .gpu_threads(thread);
    f.of_block.compute_at(blocks, thread).store_in(MemoryType::Register);
    f.result.gpu_tile(f.result.args()[0], outer, thread, 32, TailStrategy::GuardWithIf);
    f.of_head.compute_at(f.result, thread).store_in(MemoryType::Register);
}

bool matches(const Target &t, const SumDecaysSizes &) { return t.has_gpu_feature(); }

const bool added = Schedule<SumDecaysFuncs, SumDecaysSizes>::add({"gpu", 0, matches, apply});
}  // namespace
