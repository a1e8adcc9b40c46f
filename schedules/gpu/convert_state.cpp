// Every GPU API: a thread per element, under the limits of chunkwise.cpp.
#include "../../generators/expansion.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

void apply(ConvertStateFuncs &s, const ConvertStateSizes &, const Target &) {
    const std::vector<Var> args = s.converted.args();
    Var e = args[0], f = args[1], h = args[2], b = args[3], eo("eo"), ei("ei"), fo("fo"), fi("fi"), block("block");
    s.converted.split(e, eo, ei, 32, TailStrategy::GuardWithIf)
        .split(f, fo, fi, 8, TailStrategy::GuardWithIf)
        .fuse(eo, fo, block)
        .reorder(ei, fi, block, h, b)
        .gpu_blocks(block, h, b)
        .gpu_threads(ei, fi);
}

bool matches(const Target &t, const ConvertStateSizes &) { return t.has_gpu_feature(); }

const bool added = Schedule<ConvertStateFuncs, ConvertStateSizes>::add({"gpu", 0, matches, apply});
}  // namespace
