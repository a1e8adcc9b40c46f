// Correct on every CPU that Halide has, any sizes: a stage after the other, of all chunks of a call, innermost axis in vectors.
// Not parallel: the runtime spreads batch entries and heads over threads.
#include "../../generators/chunkwise_backward.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

void apply(ChunkwiseBackwardFuncs &r, const ChunkwiseSizes &, const Target &target) {
    const int vec = target.natural_vector_size<float>();
    const TailStrategy tail = TailStrategy::GuardWithIf;
    auto stage = [&](Func f) { return f.compute_root().vectorize(f.args()[0], vec, tail); };

    // A row of a product at a time, a vector of it in a register over the whole sum.
    auto product = [&](Func p) {
        Var x = p.args()[0], xo("xo"), xi("xi");
        stage(p);
        for (int u = 0; u < p.num_update_definitions(); u++) {
            std::vector<VarOrRVar> order = {xi};
            for (const RVar &over : p.rvars(u)) order.push_back(over);
            order.push_back(xo);
            p.update(u).split(x, xo, xi, vec, tail).reorder(order).vectorize(xi);
        }
    };
    // What a product reads along its second axis.
    auto transposed = [&](Func rows, Func user) {
        Func copy = rows.in(user);
        copy.compute_root().reorder_storage(copy.args()[1], copy.args()[0]);
    };

    const bool rounds = r.dq_from_state.defined();
    transposed(r.f.k, r.f.scores), transposed(r.f.v, r.dweights);
    transposed(rounds ? r.state_read[0] : r.f.state, rounds ? r.dq_from_state : r.dq);
    transposed(rounds ? r.dstate_read[0] : r.dcontribution, r.dkeys_decayed);
    // Rows are copied once, so that products neither clamp the row nor widen 16 bits in each of their terms.
    for (Func rows : {r.f.q, r.f.k, r.f.v, r.dout_staged, r.f.keys_decayed, r.dinter, r.f.mask, r.f.weights, r.dscores,
                      r.f.key_decay, r.f.row_decay})
        stage(rows);
    for (Func p : {r.f.scores, r.dweights, r.f.contribution, r.dstate_from_inter, r.dkeys_decayed, r.dq, r.dk, r.dv})
        product(p);
    if (rounds) product(r.dq_from_state), product(r.dv_from_state);
    for (Func decay : {r.f.decay_steps, r.f.decay_rest, r.row_product, r.key_product, r.state_product, r.added_product,
                       r.end_product, r.dlog_decay, r.f.chunk_decay})
        decay.compute_root();
    for (Func state : {r.f.state, r.dstate}) {
        Var e = state.args()[0], d = state.args()[1];
        state.compute_root();
        state.update(0).vectorize(e, vec, tail);
        state.update(1).reorder(e, d, state.rvars(1)[0]).vectorize(e, vec, tail);
    }
    for (Func result : {r.result_dq, r.result_dk, r.result_dv}) result.update(0).vectorize(result.args()[0], vec, tail);
    r.dstate_in.update(0).vectorize(r.dstate_in.args()[0], vec, tail);
}

bool matches(const Target &t, const ChunkwiseSizes &) { return !t.has_gpu_feature(); }

const bool added = Schedule<ChunkwiseBackwardFuncs, ChunkwiseSizes>::add({"generic", 0, matches, apply});
}  // namespace
