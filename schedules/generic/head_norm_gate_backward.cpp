// Every CPU that Halide has, any sizes: each gradient a row at a time, from what is known of all rows, a mean and a factor
// each, and of all gates. The sums over tokens go through the rows as they lie. Calls of as many tokens as L2 holds read
// memory once. Not parallel: the runtime spreads tokens over threads.
//
// AMD EPYC (Zen 4), one core, AVX-512, 51 tokens of 8 heads, V = 64, fp32, RMS norm: 2.0 ns an element for all three
// gradients, of which dx 1.1, dgate 0.7 and dweight 0.6 alone; exponentials in each of them were 3.0.
#include "../../generators/head_norm_gate_backward.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

void apply(HeadNormGateBackwardFuncs &f, const HeadNormGateBackwardSizes &, const Target &target) {
    Var e("e"), h("h"), t("t"), b("b"), w("w"), lane("lane");
    RVar ro("ro"), ri("ri");
    const int vec = target.natural_vector_size<float>();
    const TailStrategy tail = TailStrategy::GuardWithIf;  // rows end where others, or the caller's other memory, begin
    HeadNormGateFuncs &y = f.forward;

    y.weight_or_one.compute_root().vectorize(e, vec, tail).update().reorder(e, y.over_weight, h).vectorize(e, vec, tail);
    auto sum_over_row = [&](Func sum) {  // in the lanes of a vector
        const RVar row = sum.rvars(0)[0];
        sum.update().split(row, ro, ri, vec, tail);
        Func lanes = sum.update().rfactor(ri, lane);
        lanes.compute_at(sum, h).vectorize(lane).update().reorder(lane, ro).vectorize(lane);
        sum.update().atomic().vectorize(ri, vec, tail);
    };
    const Expr whole_vectors = y.value_extent >= vec;  // the sums of lanes are then added up by shuffling
    y.sum.compute_root(), y.squares.compute_root(), y.factor.compute_root();
    for (Func sum : {y.sum, y.squares}) sum_over_row(sum), sum.update().specialize(whole_vectors);

    f.through_gate.compute_root().vectorize(e, vec, tail);  // most of the work: once for all three
    f.through_gate.specialize(y.gated);

    for (Func of_row : {f.dfactor, f.dsquares, f.dsum}) of_row.compute_at(f.result_dx, h);
    sum_over_row(f.dsum), sum_over_row(f.dfactor);
    f.result_dx.update().reorder(e, f.want_dx, h, t, b).vectorize(e, vec, tail);
    f.result_dx.update().specialize(whole_vectors && y.gated);
    f.result_dx.update().specialize(whole_vectors);
    f.result_dgate.update().reorder(e, f.want_dgate, h, t, b).vectorize(e, vec, tail).specialize(y.gated);

    f.result_dweight.update(0).reorder(e, f.want_dweight, w).vectorize(e, vec, tail);
    f.result_dweight.update(1).reorder(e, f.over_heads, w).vectorize(e, vec, tail);
    const RVar over_t = f.dweight.rvars(0)[0], over_b = f.dweight.rvars(0)[1];
    f.dweight.compute_root().vectorize(e, vec, tail).update().reorder(e, h, over_t, over_b).vectorize(e, vec, tail);
    f.dweight.update().specialize(y.gated);
}

bool matches(const Target &t, const HeadNormGateBackwardSizes &) { return !t.has_gpu_feature(); }

const bool added = Schedule<HeadNormGateBackwardFuncs, HeadNormGateBackwardSizes>::add({"generic", 0, matches, apply});
}  // namespace
