// Correct on every CPU that Halide has, any sizes: innermost axis in vectors. Not parallel: the runtime spreads batch entries
// and heads over threads.
#include "../../generators/power.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int rows = 4;  // of a product at a time

void apply(PowerFuncs &p, const PowerSizes &sizes, const Target &target) {
    Var b("b"), h("h"), g("g"), i("i"), j("j"), d("d"), f("f"), e("e"), u("u");
    Var eo("eo"), ei("ei"), io("io"), ii("ii"), fo("fo"), fi("fi");
    const int vec = target.natural_vector_size<float>();
    const TailStrategy tail = TailStrategy::GuardWithIf;

    // Some rows of a product at a time, a vector of each in a register over the whole sum.
    auto product = [&](Func p, const LoopLevel &at, const RDom &over, Var x, Var y) {
        p.compute_at(at).bound_extent(y, rows).vectorize(x, vec, tail).unroll(y);
        p.update().split(x, eo, ei, vec, tail).reorder(ei, y, over.x, eo).vectorize(ei).unroll(y);
    };

    p.result.reorder(e, i, g, h, b).vectorize(e, vec, tail);
    p.out.compute_at(p.result, g).split(i, io, ii, rows, tail).reorder(e, ii, io).vectorize(e, vec, tail);
    p.num_inter.compute_at(p.result, g).vectorize(e, vec, tail);
    p.num_inter.update().split(i, io, ii, rows, tail).reorder(e, ii, io, p.over_block.x).vectorize(e, vec, tail);
    product(p.num_block, {p.num_inter, io}, p.over_feature, e, i);
    p.phi_q.clone_in(p.den_block);
    p.phi_q.compute_at(p.num_inter, io);
    p.den_inter.compute_at(p.result, g).update().reorder(i, p.over_block.x);
    p.den_block.compute_at(p.den_inter, i);
    product(p.num_intra, {p.out, io}, p.over_key, e, i);
    p.weights.compute_at(p.out, io);
    p.scores.compute_at(p.weights, j);
    p.den_intra.compute_at(p.out, io);
    p.row.compute_at(p.out, io);

    p.state_out.split(f, fo, fi, rows, tail).reorder(e, fi, fo, h, b).vectorize(e, vec, tail);
    product(p.contribution, {p.state_out, fo}, p.over_token, e, f);
    p.phi_k.clone_in(p.keys_contribution);
    p.phi_k.compute_at(p.state_out, fo);
    p.keys_contribution.compute_at(p.keys_out, f);

    for (Func list : p.phi.table()) list.compute_root().vectorize(f, vec, tail);
    for (Func factor : p.phi.searched) factor.update().reorder(f, p.phi.over_bit).vectorize(f, vec, tail);
    for (Func decay : {p.decay_steps, p.decay_rest})
        decay.compute_root().update().reorder(i, p.over_row, h, b).vectorize(i, vec, tail);
    for (Func once : {p.chunk_decay, p.row_decay, p.key_decay, p.unit}) once.compute_root();
    p.largest.compute_at(p.unit, i);
    for (Func rows : {p.queries, p.queries_decayed, p.keys, p.keys_decayed}) rows.compute_root().vectorize(d, vec, tail);
    Func values = p.v.in({p.num_intra, p.contribution});
    values.compute_root().vectorize(values.args()[0], vec, tail);
}

bool matches(const Target &t, const PowerSizes &) { return !t.has_gpu_feature(); }

const bool added = Schedule<PowerFuncs, PowerSizes>::add({"generic", 0, matches, apply});
}  // namespace
