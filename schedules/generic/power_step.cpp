// Correct on every CPU that Halide has, any sizes: a vector of value columns at a time, down the rows of a block of the state. Not
// parallel: the runtime spreads batch entries and heads over threads.
#include "../../generators/power_step.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

void apply(PowerStepFuncs &p, const PowerStepSizes &, const Target &target) {
    Var h("h"), g("g"), f("f"), e("e"), u("u"), eo("eo"), ei("ei");
    const int vec = target.natural_vector_size<float>();
    const TailStrategy tail = TailStrategy::GuardWithIf;  // neither beyond the row nor anything twice: the state is in place

    p.state_and_sum.update(0).split(e, eo, ei, vec, tail).reorder(ei, p.over_others.x, eo, p.over_others.y, u, h).vectorize(ei);
    p.state_and_sum.update(1).split(e, eo, ei, vec, tail).reorder(ei, p.over_feature, eo, u, h).vectorize(ei);
    p.decay.compute_root();
    p.v.compute_root().vectorize(p.v.args()[0], vec, tail);
    p.result.reorder(e, g, h).vectorize(e, vec, tail);
    p.num.compute_at(p.result, g).vectorize(e, vec, tail).update().reorder(e, p.over_block).vectorize(e, vec, tail);
    p.keys.update().vectorize(f, vec, tail);
    for (Func of_query : {p.den, p.score}) of_query.compute_at(p.result, g);
    p.den_block.compute_at(p.den, p.over_block_weight);

    for (Func list : p.phi.table()) list.compute_root().vectorize(f, vec, tail);
    for (Func factor : p.phi.searched) factor.update().reorder(f, p.phi.over_bit).vectorize(f, vec, tail);
    for (Func once : {p.phi_q, p.phi_k, p.unit}) once.compute_root();
    for (Func features : {p.phi_q, p.phi_k}) features.vectorize(f, vec, tail);
    p.largest.compute_at(p.unit, g);
    for (Func row : {p.queries, p.k}) row.compute_root();
}

bool matches(const Target &t, const PowerStepSizes &) { return !t.has_gpu_feature(); }

const bool added = Schedule<PowerStepFuncs, PowerStepSizes>::add({"generic", 0, matches, apply});
}  // namespace
