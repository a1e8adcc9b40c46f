// Correct on every CPU that Halide has, any sizes: a vector of value columns at a time, down all rows of the state. Not
// parallel: the runtime spreads batch entries and heads over threads.
#include "../../generators/recurrent.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

void apply(RecurrentFuncs &f, const RecurrentSizes &, const Target &target) {
    Var b("b"), h("h"), g("g"), n("n"), i("i"), e("e"), eo("eo"), ei("ei");
    const int vec = target.natural_vector_size<float>();
    const TailStrategy tail = TailStrategy::GuardWithIf;  // neither beyond the row nor anything twice: the state is in place

    f.state_and_sum.update().split(e, eo, ei, vec, tail).reorder(ei, i, f.over_key_feature, eo, n, h, b).vectorize(ei);
    f.decay.compute_at(f.state_and_sum, n);
    f.left_out.compute_at(f.state_and_sum, n);
    Func first = f.q.in(f.state_and_sum), others = f.q.in(f.others);
    for (Func row : {first, f.k}) row.compute_at(f.state_and_sum, n).vectorize(row.args()[0], vec, tail);
    f.v.compute_at(f.state_and_sum, eo).vectorize(f.v.args()[0], vec, tail);
    f.result.split(e, eo, ei, vec, tail).vectorize(ei);
    f.others.compute_at(f.result, eo).vectorize(e, vec, tail).update().reorder(e, f.over_state).vectorize(e, vec, tail);
    others.compute_at(f.result, g).vectorize(others.args()[0], vec, tail);
}

bool matches(const Target &t, const RecurrentSizes &) { return !t.has_gpu_feature(); }

const bool added = Schedule<RecurrentFuncs, RecurrentSizes>::add({"generic", 0, matches, apply});
}  // namespace
