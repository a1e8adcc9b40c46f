// Correct on every CPU that Halide has, any sizes: pair of blocks after pair, with the gradients in one loop, so that they share
// weights and their adjoints. Not parallel: the runtime spreads batch entries and heads over threads.
#include "../../generators/parallel_backward.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

void apply(ParallelBackwardFuncs &f, const ParallelSizes &, const Target &target) {
    Var b("b"), h("h"), g("g"), c("c"), n("n"), i("i"), j("j"), d("d"), e("e"), s("s"), xo("xo"), xi("xi");
    const int vec = target.natural_vector_size<float>();
    const TailStrategy tail = TailStrategy::GuardWithIf;
    ParallelWeights &w = f.f.weights;

    // A row of a product at a time, a vector of it in a register over the whole sum.
    auto product = [&](Func p, const LoopLevel &at) {
        Var x = p.args()[0], y = p.args()[1];
        p.compute_at(at).vectorize(x, vec, tail);
        p.update().split(x, xo, xi, vec, tail).reorder(xi, p.rvars()[0], xo, y).vectorize(xi);
    };

    for (Func decay : {f.f.decay_steps, f.f.decay_rest})
        decay.compute_root().update().reorder(i, f.f.over_row, n, h, b).vectorize(i, vec, tail);

    // The sums over pairs, in one loop over blocks of rows and, inside it, blocks of keys.
    const std::pair<Func, RDom> sums[] = {{f.dq, f.over_dq}, {f.dk, f.over_dk}, {f.dv, f.over_dv}};
    for (const auto &[sum, over] : sums) {
        Func of_pairs = sum;
        Var x = sum.args()[0], y = sum.args()[1];
        of_pairs.compute_root().vectorize(x, vec, tail);
        of_pairs.update().reorder(x, y, over.x, over.y, over.z, over.w, h, b).vectorize(x, vec, tail).never_partition_all();
        if (sum.name() != f.dq.name()) of_pairs.update().compute_with(f.dq.update(), over.y);
    }
    const RDom &over = f.over_gates;
    f.ddecay.compute_root().update().reorder(over.x, over.y, over.z, over.w, h, b).compute_with(f.dq.update(), over.y);
    const LoopLevel pair(f.dq, f.over_dq.y), rows(f.dq, f.over_dq.z);
    product(f.dqueries, pair), product(f.dkeys, pair), product(f.dvalues, pair);
    product(f.dweights, pair);
    for (Func by_row : {f.pair.weights.in(f.dvalues), f.dscores}) by_row.compute_at(pair).vectorize(i, vec, tail);
    f.ddecay_of_row.compute_at(pair).vectorize(i, vec, tail).update().reorder(i, f.over_key).vectorize(i, vec, tail);
    f.ddecay_of_pair.compute_at(pair);

    // Of a block of rows: what it is, its scores on all keys, and what follows from these.
    for (Func once : {w.row_decay, w.decay_before, f.sum, f.factor, f.out_dout, f.dden}) once.compute_at(rows);
    w.mask.compute_at(rows).vectorize(i, vec, tail);
    w.key_decay.compute_at(rows).vectorize(j, vec, tail);
    w.unit.compute_root();
    w.queries.clone_in(f.q_dq);  // inlined there
    w.queries.compute_at(rows);
    f.dnum.compute_at(rows).vectorize(e, vec, tail);
    product(f.pair.scores, rows);
    const Expr blocks =
        f.over_dq.y.extent();  // memory for the last block of rows from the first on: a workspace keeps each size
    f.pair.scores.bound_storage(n, blocks), w.key_decay.bound_storage(n, blocks);
    f.sum.update().reorder(i, f.over_block);
    f.pair.sum.compute_at(f.sum, f.over_block).update().reorder(i, f.pair.over_summed_key.x).vectorize(i, vec, tail);

    for (Func gates : {f.q_dq, f.k_dk, f.ddecay_after, f.ddecay_before, f.ddecay_of_later}) gates.compute_root();
    const std::pair<Func, RDom> results[] = {
        {f.result_dq, f.over_result_dq}, {f.result_dk, f.over_result_dk}, {f.result_dv, f.over_result_dv}};
    for (const auto &[result, over] : results) {
        Func rows = result;
        rows.update().reorder(result.args()[0], over.x, over.y).vectorize(result.args()[0], vec, tail).never_partition_all();
    }
}

bool matches(const Target &t, const ParallelSizes &) { return !t.has_gpu_feature(); }

const bool added = Schedule<ParallelBackwardFuncs, ParallelSizes>::add({"generic", 0, matches, apply});
}  // namespace
