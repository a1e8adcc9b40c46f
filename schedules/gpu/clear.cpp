// Every GPU API: a thread per element, as in convert_state.cpp.
#include "../../generators/clear.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

void apply(ClearFuncs &f, const ClearSizes &, const Target &) {
    const std::vector<Var> args = f.cleared.args();
    Var x = args[0], y = args[1], h = args[2], b = args[3], xo("xo"), xt("xt"), yo("yo"), yt("yt"), block("block");
    f.cleared.split(x, xo, xt, 32, TailStrategy::GuardWithIf)
        .split(y, yo, yt, 8, TailStrategy::GuardWithIf)
        .fuse(xo, yo, block)
        .reorder(xt, yt, block, h, b)
        .gpu_blocks(block, h, b)
        .gpu_threads(xt, yt);
}

bool matches(const Target &t, const ClearSizes &) { return t.has_gpu_feature(); }

const bool added = Schedule<ClearFuncs, ClearSizes>::add({"gpu", 0, matches, apply});
}  // namespace
