// Every GPU API that Halide has, any sizes, under the limits of chunkwise.cpp: a thread per pair of a token computes its
// rotation once and goes through the heads. Both of a pair are read before either is written: out may lie where x does.
#include "../../generators/rotate.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int pairs = 32, tokens = 2;  // of a block

void apply(RotateFuncs &f, const RotateSizes &, const Target &) {
    Var j("j"), p("p"), h("h"), t("t"), b("b"), jo("jo"), ji("ji"), to("to"), ti("ti");
    const TailStrategy tail = TailStrategy::GuardWithIf;

    f.result.split(j, jo, ji, pairs, tail)
        .split(t, to, ti, tokens, tail)
        .reorder(p, h, ji, ti, jo, to, b)
        .unroll(p)
        .gpu_blocks(jo, to, b)
        .gpu_threads(ji, ti);
    for (Func once : {f.turn, f.rotation}) once.compute_at(f.result, ji).store_in(MemoryType::Register);
    Var x_p = f.x.args()[1];
    f.x.compute_at(f.result, h).bound_extent(x_p, 2).unroll(x_p).store_in(MemoryType::Register);
}

bool matches(const Target &t, const RotateSizes &) { return t.has_gpu_feature(); }

const bool added = Schedule<RotateFuncs, RotateSizes>::add({"gpu", 5, matches, apply});
}  // namespace
