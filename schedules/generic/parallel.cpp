// Correct on every CPU that Halide has, any sizes: a block of rows against one block of keys at a time, rows in vectors for
// the weights, value columns for out. Not parallel: the runtime spreads batch entries, heads and rows over threads.
#include "../../generators/parallel.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

void apply(ParallelFuncs &f, const ParallelSizes &, const Target &target) {
    Var b("b"), h("h"), g("g"), c("c"), n("n"), i("i"), j("j"), d("d"), e("e"), s("s"), xo("xo"), xi("xi");
    const int vec = target.natural_vector_size<float>();
    const TailStrategy tail = TailStrategy::GuardWithIf;

    // A row of a product at a time, a vector of it in a register over the whole sum.
    auto product = [&](Func p, const LoopLevel &at, const RVar &over, Var x, Var y) {
        p.compute_at(at).vectorize(x, vec);
        p.update().split(x, xo, xi, vec, tail).reorder(xi, over, xo, y).vectorize(xi);
    };
    // All of a block of rows, whose loop is at `rows`, but for what is past; that is summed in the loop over blocks of keys.
    auto weights = [&](ParallelWeights &w, const LoopLevel &rows) {
        for (Func once : {w.row_decay, w.initial_decay, w.decay_before, w.unit, w.factor, w.past_sum, w.own_sum})
            once.compute_at(rows);
        for (Func by_row : {w.mask, w.own}) by_row.compute_at(rows).vectorize(i, vec, tail);
        w.queries.compute_at(rows).reorder_storage(i, d);
        product(w.own_scores, rows, w.over_own_key_feature, i, j);
        w.past_sum.update(0).reorder(i, w.over_initial_block.x);
        w.past_sum.update(1).reorder(i, w.over_past_block);
        w.initial_block_sum.compute_at(w.past_sum, w.over_initial_block.x).update().reorder(i, w.over_summed_feature.x);
        w.initial_block_sum.update().vectorize(i, vec, tail);
    };
    auto past = [&](ParallelWeights &w, const LoopLevel &keys) {
        w.key_decay.compute_at(keys).vectorize(j, vec, tail);
        w.past.compute_at(keys).vectorize(i, vec, tail);
        product(w.past_scores, keys, w.over_past_key_feature, i, j);
        w.past_block_sum.compute_at(keys).update().reorder(i, w.over_summed_key.x).vectorize(i, vec, tail);
    };

    for (Func decay : {f.decay_steps, f.decay_rest})
        decay.compute_root().update().reorder(i, f.over_row, n, h, b).vectorize(i, vec, tail);
    f.state_in.compute_root().vectorize(e, vec, tail).update().vectorize(e, vec, tail);
    f.keys_in.compute_root();
    for (Func list : f.phi.table()) list.compute_root();

    RVar row = f.over_result.x, block = f.over_result.y;
    f.result.update(0)
        .reorder(e, row, block, g, h, b)
        .vectorize(e, vec, tail)
        .never_partition_all();  // there are enough copies inside
    const LoopLevel rows(f.result, block), keys(f.past, f.weights.over_past_block),
        features(f.past, f.weights.over_initial_block.x);
    Func phi = f.weights.phi;
    phi.clone_in(f.weights.initial_block_sum);  // is not stored there
    weights(f.weights, rows);
    f.past.compute_at(rows).vectorize(e, vec, tail);
    f.past.update(0).reorder(e, i, f.weights.over_initial_block.x).vectorize(e, vec, tail);
    f.past.update(1).reorder(e, i, f.weights.over_past_block).vectorize(e, vec, tail);
    f.weights.past_sum.update(1).compute_with(f.past.update(1), f.weights.over_past_block);
    phi.compute_at(features).vectorize(i, vec, tail);
    product(f.initial_block, features, f.over_feature, e, i);
    past(f.weights, keys);
    product(f.past_block, keys, f.over_past_key, e, i);
    product(f.own, rows, f.over_own_key, e, i);

    RVar j_out = f.over_weights.x, i_out = f.over_weights.y, n_out = f.over_weights.z, c_out = f.over_weights.w;
    f.weights_out.vectorize(f.weights_out.args()[0], vec, tail);
    f.weights_out.update().reorder(j_out, i_out, n_out, c_out, s, g, h, b).never_partition_all();
    Func key_decay_shown = f.shown.key_decay.clone_in(f.weights_shown);
    weights(f.shown, {f.weights_out, c_out});
    key_decay_shown.compute_at(f.weights_out, n_out);
    past(f.shown, {f.shown.past_sum, f.shown.over_past_block});
    product(f.shown_scores, {f.weights_out, n_out}, f.over_shown_key_feature, i, j);

    f.state_out.vectorize(e, vec, tail);
    for (Func once : {f.end_decay_before, f.end_decay, f.end_key_decay}) once.compute_root();
    f.contribution.compute_at(f.state_out, s).vectorize(e, vec, tail);
    f.contribution.update().reorder(e, d, f.over_block, h, b).vectorize(e, vec, tail);
    f.keys_decayed.in(f.contribution_block).compute_at(f.contribution, f.over_block).vectorize(d, vec, tail);
    product(f.contribution_block, {f.contribution, f.over_block}, f.over_token, e, d);
    f.keys_contribution.compute_at(f.keys_out, s);
    f.keys_block.compute_at(f.keys_contribution, f.over_keys_block);
}

bool matches(const Target &t, const ParallelSizes &) { return !t.has_gpu_feature(); }

const bool added = Schedule<ParallelFuncs, ParallelSizes>::add({"generic", 0, matches, apply});
}  // namespace
