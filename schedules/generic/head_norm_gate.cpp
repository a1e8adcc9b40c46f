// Every CPU that Halide has, any sizes: a row at a time, its sums in the lanes of a vector. A row is read from memory once, and
// again from the cache. Not parallel: the runtime spreads tokens over threads.
#include "../../generators/head_norm_gate.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

void apply(HeadNormGateFuncs &f, const HeadNormGateSizes &, const Target &target) {
    Var e("e"), h("h"), t("t"), lane("lane");
    RVar ro("ro"), ri("ri");
    const int vec = target.natural_vector_size<float>();
    const TailStrategy tail = TailStrategy::GuardWithIf;  // in place, nothing may be done twice

    f.result.vectorize(e, vec, tail);
    f.weight_or_one.compute_root().vectorize(e, vec, tail).update().reorder(e, f.over_weight, h).vectorize(e, vec, tail);
    f.first.compute_at(f.result, h), f.factor.compute_at(f.result, h);
    for (Func sum : {f.sum, f.squares}) {
        sum.compute_at(f.result, h);
        sum.update().split(f.over_value, ro, ri, vec, tail);
        Func lanes = sum.update().rfactor(ri, lane);
        lanes.compute_at(f.result, h).vectorize(lane).update().reorder(lane, ro).vectorize(lane);
        sum.update().atomic().vectorize(ri, vec, tail);
    }
    const Expr whole_vectors = f.value_extent >= vec;  // the sums of lanes are then added up by shuffling
    f.result.specialize(whole_vectors && f.gated);
    f.result.specialize(whole_vectors);
}

bool matches(const Target &t, const HeadNormGateSizes &) { return !t.has_gpu_feature(); }

const bool added = Schedule<HeadNormGateFuncs, HeadNormGateSizes>::add({"generic", 0, matches, apply});
}  // namespace
