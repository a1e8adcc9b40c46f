// Every CPU that Halide has, any sizes: the rotation of a token once for all heads, then a vector of pairs at a time. Both of a
// pair are read before either is written, so that out may lie where x does. Not parallel: the runtime spreads tokens over
// threads.
#include "../../generators/rotate.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

void apply(RotateFuncs &f, const RotateSizes &, const Target &target) {
    Var j("j"), p("p"), h("h"), t("t"), b("b"), jo("jo"), ji("ji");
    const int vec = target.natural_vector_size<float>();
    const TailStrategy tail = TailStrategy::GuardWithIf;  // in place, nothing may be done twice

    f.turn.compute_root().vectorize(j, vec, tail);
    f.result.split(j, jo, ji, vec, tail).reorder(ji, p, jo, h, t, b).vectorize(ji).unroll(p);
    f.rotation.compute_at(f.result, t).vectorize(j, vec, tail);
    Var x_j = f.x.args()[0], x_p = f.x.args()[1];
    f.x.compute_at(f.result, jo).bound_storage(x_j, vec).bound_extent(x_p, 2).vectorize(x_j, vec, tail).unroll(x_p);
    for (const Expr &layout : {f.half_split, f.interleaved}) f.result.specialize(layout);
}

bool matches(const Target &t, const RotateSizes &) { return !t.has_gpu_feature(); }

const bool added = Schedule<RotateFuncs, RotateSizes>::add({"generic", 0, matches, apply});
}  // namespace
