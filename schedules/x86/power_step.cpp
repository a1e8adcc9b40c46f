// x86 with AVX-512 or AVX2: as recurrent.cpp, a strip of `columns` vectors of the state at a time, down the rows of a block, with
// the strip's values and sums in registers. Not parallel: the runtime spreads batch entries and heads over threads.
//
// One core of an Intel Xeon (Emerald Rapids), AVX-512, one token of 8 heads, K = V = 64, degree 2, normalized: 212 us, 40 GB/s read
// and written in L3 (4.3 MB of states), where copying moves 29; a sixth of the time went when the table was compiled in. From memory,
// 64 batch entries: 75 to 89% of what copying moves, by how busy the machine is.
#include "../../generators/power_step.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

// Of a strip. Twice as many registers hold its sums and values; five more the decay and what passes through.
int columns(int value, const Target &t) {
    int n = t.has_feature(Target::AVX512_Skylake) ? 8 : 4;  // of 32 registers, of 16
    while (value % (n * t.natural_vector_size<float>())) n /= 2;
    return n;
}

void apply(PowerStepFuncs &p, const PowerStepSizes &sizes, const Target &target) {
    Var h("h"), g("g"), f("f"), e("e"), u("u"), eo("eo"), ei("ei"), strip("strip");
    const int vec = target.natural_vector_size<float>(), wide = columns(sizes.value, target) * vec;

    p.state_and_sum.update(0)
        .split(e, eo, ei, wide)
        .reorder(ei, p.over_others.x, eo, p.over_others.y, u, h)
        .vectorize(ei, vec)
        .unroll(ei);
    p.state_and_sum.update(1).split(e, strip, ei, wide).reorder(ei, p.over_feature, strip, u, h).vectorize(ei, vec).unroll(ei);
    Func values = p.v.in(p.state_and_sum);
    values.compute_at(p.state_and_sum, strip).vectorize(values.args()[0], vec).unroll(values.args()[0]);
    p.decay.compute_root();
    p.result.split(e, eo, ei, wide).reorder(ei, eo, g, h).vectorize(ei, vec).unroll(ei);
    p.num.compute_at(p.result, eo).vectorize(e, vec).unroll(e);
    p.num.update().reorder(e, p.over_block).vectorize(e, vec).unroll(e);
    // The sum of keys is small; a block of features at a time has its own sums, side by side.
    Var lane("lane");
    RVar wo("wo"), wi("wi");
    p.keys.update().vectorize(f, vec, TailStrategy::GuardWithIf);
    p.den.compute_at(p.result, g);
    p.score.compute_at(p.result, g).update().atomic().vectorize(p.over_key_element, vec);
    p.den_block.compute_at(p.den, p.over_block_weight);
    p.den_block.update().split(p.over_feature_weight, wo, wi, vec, TailStrategy::GuardWithIf);
    Func lanes = p.den_block.update().rfactor(wi, lane);
    p.den_block.update().atomic().vectorize(wi);
    lanes.compute_at(p.den, p.over_block_weight).vectorize(lane);
    lanes.update().reorder(lane, wo).vectorize(lane);

    for (Func list : p.phi.table()) list.compute_root().vectorize(f, vec, TailStrategy::GuardWithIf);
    for (Func factor : p.phi.searched) factor.update().reorder(f, p.phi.over_bit).vectorize(f, vec, TailStrategy::GuardWithIf);
    for (Func once : {p.phi_q, p.phi_k, p.unit}) once.compute_root();
    for (Func features : {p.phi_q, p.phi_k}) features.vectorize(f, vec, TailStrategy::GuardWithIf);
    p.largest.compute_at(p.unit, g).update().atomic().vectorize(p.over_element, vec);
    for (Func row : {p.queries, p.k, p.v}) row.compute_root().vectorize(row.args()[0], vec);
}

bool matches(const Target &t, const PowerStepSizes &s) {
    const int vec = t.natural_vector_size<float>();
    return t.arch == Target::X86 && !t.has_gpu_feature() && t.has_feature(Target::AVX2) && s.key > 0 && s.key % vec == 0 &&
           s.value > 0 && s.value % vec == 0;
}

const bool added = Schedule<PowerStepFuncs, PowerStepSizes>::add({"x86", 10, matches, apply});
}  // namespace
