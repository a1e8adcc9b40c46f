// Correct on every CPU that Halide has, any sizes. Rows of the chunk, time, are the vectors of whatever has phi or weights in it, so
// that phi is formed and differentiated in dense loops. Not parallel: the runtime spreads batch entries and heads over threads.
#include "../../generators/power_backward.h"
#include "../schedule.h"

#include <algorithm>

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int rows = 4;  // of a product at a time

void apply(PowerBackwardFuncs &w, const PowerSizes &sizes, const Target &target) {
    Var b("b"), h("h"), g("g"), i("i"), j("j"), d("d"), f("f"), e("e"), u("u");
    Var eo("eo"), ei("ei"), io("io"), ii("ii"), jo("jo"), ji("ji"), fo("fo"), fi("fi"), yo("yo"), yi("yi");
    RVar blocks("blocks"), in_block("in_block");
    PowerFuncs &p = w.p;
    const int vec = target.natural_vector_size<float>(), lanes = std::min(vec, sizes.chunk);
    const TailStrategy tail = TailStrategy::GuardWithIf;

    // Rows innermost, all of the chunk.
    auto by_rows = [&](Func stage, Var row, Var other) {
        stage.compute_root().bound(row, 0, sizes.chunk).reorder_storage(row, other).reorder(row, other).vectorize(row, lanes);
    };
    // Some rows of a product at a time, a vector of each in a register over the whole sum, for the tile that its consumer works on.
    auto product = [&](Func stage, int update, const LoopLevel &at, Var x, Var y, int wide) {
        std::vector<VarOrRVar> order = {ei, y};
        for (const RVar &r : stage.rvars(update)) order.push_back(r);
        order.push_back(eo);
        stage.compute_at(at).bound_extent(y, rows).vectorize(x, wide, tail).unroll(y);
        stage.update(update).split(x, eo, ei, wide, tail).reorder(order).vectorize(ei).unroll(y);
    };
    // The same of all rows, in memory.
    auto all_rows = [&](Func stage, Var row, Var other) {
        by_rows(stage, row, other);
        for (int n = 0; n < stage.num_update_definitions(); n++) {
            std::vector<VarOrRVar> order = {row};
            for (const RVar &r : stage.rvars(n)) order.push_back(r);
            order.push_back(other);
            stage.update(n).reorder(order).vectorize(row, lanes);
        }
    };

    // Operands, and the table.
    for (Func list : p.phi.table()) list.compute_root().vectorize(f, vec, tail);
    for (Func factor : p.phi.searched) factor.update().reorder(f, p.phi.over_bit).vectorize(f, vec, tail);
    for (Func decay : {p.decay_steps, p.decay_rest}) {
        decay.compute_root().bound(i, 0, sizes.chunk).vectorize(i, lanes);
        decay.update().reorder(i, p.over_row, h, b).vectorize(i, lanes);
    }
    p.chunk_decay.compute_root();
    p.row_decay.compute_root().bound(i, 0, sizes.chunk).vectorize(i, lanes);
    p.key_decay.compute_root().bound(j, 0, sizes.chunk).vectorize(j, lanes);
    p.unit.compute_root().bound(i, 0, sizes.chunk);
    p.largest.compute_at(p.unit, i);
    for (Func stage : {p.queries, p.queries_decayed}) by_rows(stage, i, d);
    for (Func stage : {p.keys, p.keys_decayed}) by_rows(stage, j, d);
    Func values = p.v.in({w.dweights, w.dphi_k});
    by_rows(values, values.args()[1], values.args()[0]);

    // Numerators and denominators.
    const RVar row = w.keys_from_queries.rvars(0)[0];
    w.keys_from_queries.update().split(row, blocks, in_block, lanes);
    Func keys_lanes = w.keys_from_queries.update().rfactor(in_block, u);
    p.phi_q.clone_in({w.den_block, keys_lanes});  // a small part, formed where it is looked at
    w.den_inter.compute_root().bound(i, 0, sizes.chunk).vectorize(i, lanes);
    w.den_inter.update().split(i, io, ii, lanes).reorder(ii, w.over_block.x, io).vectorize(ii);
    w.den_block.compute_at(w.den_inter, w.over_block.x).vectorize(i).update().reorder(i, w.over_feature_weight.x).vectorize(i);
    w.den_intra.compute_root().bound(i, 0, sizes.chunk).vectorize(i, lanes);
    w.den_intra.update().reorder(i, w.over_key_weight.x).vectorize(i, lanes);
    for (Func once : {w.row, w.dden}) once.compute_root().bound(i, 0, sizes.chunk).vectorize(i, lanes);
    w.from_out.compute_at(w.dden, i);
    w.dnum.compute_root().bound(i, 0, sizes.chunk).vectorize(e, vec, tail);
    Func dnum_rows = w.dnum.in({w.dphi_q, w.dweights});
    by_rows(dnum_rows, i, e);

    // The chunk's own keys.
    all_rows(p.scores, i, j);
    by_rows(p.weights, i, j);
    all_rows(w.dweights, i, j);
    by_rows(w.dscores, i, j);
    Func dscores_keys = w.dscores.in(w.dkeys);
    by_rows(dscores_keys, j, i);
    all_rows(w.dqueries, i, d);
    all_rows(w.dkeys, j, d);

    // Through phi.
    auto through_phi = [&](Func stage, const RDom &over, Func dphi, int update, Var row) {
        RVar tiles("tiles"), in_tile("in_tile");
        stage.compute_root().bound(row, 0, sizes.chunk).reorder_storage(row, d).vectorize(row, lanes);
        stage.update().split(over.y, tiles, in_tile, rows, tail).reorder(row, over.x, in_tile, tiles).vectorize(row, lanes);
        dphi.reorder_storage(row, f).reorder(row, f);
        for (int n = 0; n < dphi.num_update_definitions(); n++)
            if (n != update) dphi.update(n).reorder(row, f).vectorize(row, lanes).unroll(f);
        product(dphi, update, {stage, tiles}, row, f, lanes);
    };
    through_phi(w.dqueries_state, w.over_factor_q, w.dphi_q, 0, i);
    through_phi(w.dkeys_state, w.over_factor_k, w.dphi_k, 0, j);

    // Values: the chunk's own rows, then by blocks of features.
    w.dvalues.compute_root().bound(j, 0, sizes.chunk).vectorize(e, vec, tail);
    w.dvalues.update(0)
        .split(j, jo, ji, rows, tail)
        .split(e, eo, ei, vec, tail)
        .reorder(ei, ji, w.dvalues.rvars(0)[0], w.dvalues.rvars(0)[1], eo, jo)
        .vectorize(ei)
        .unroll(ji);
    const RVar feature = w.dvalues.rvars(1)[0];
    w.dvalues.update(1).split(feature, blocks, in_block, sizes.block, tail);
    Func dvalues_block = w.dvalues.update(1).rfactor(blocks, u);
    w.dvalues.update(1).split(j, jo, ji, rows, tail).reorder(e, ji, jo, blocks, h, b).vectorize(e, vec, tail);
    product(dvalues_block, 0, {w.dvalues, jo}, e, j, vec);
    p.phi_k.compute_at(w.dvalues, blocks).reorder_storage(j, f).reorder(j, f).vectorize(j, lanes);

    // The initial state.
    w.dstate_in.update().split(f, fo, fi, rows, tail).reorder(e, fi, fo, h, w.wanted_dstate.x).vectorize(e, vec, tail);
    product(w.from_queries, 0, {w.dstate_in, fo}, e, f, vec);
    p.phi_q.compute_at(w.dstate_in, fo).reorder_storage(i, f).reorder(i, f).vectorize(i, lanes);
    w.dkeys_in.update().reorder(f, h, w.wanted_dkeys.x);
    keys_lanes.compute_at(w.dkeys_in, f).vectorize(u);
    keys_lanes.update().reorder(u, blocks).vectorize(u);
    w.keys_from_queries.compute_at(w.dkeys_in, f);

    // Gates.
    w.along_row.compute_root().bound(i, 0, sizes.chunk).vectorize(i, lanes);
    w.along_row.update().reorder(i, w.over_query_element.x, w.over_query_element.y).vectorize(i, lanes);
    for (Func along : {w.along_key, w.along_end}) {
        along.compute_root().bound(j, 0, sizes.chunk).vectorize(j, lanes);
        along.update().reorder(j, w.over_key_element.x).vectorize(j, lanes);
    }
    w.along_state.compute_root().vectorize(e, vec, tail).update().reorder(e, w.over_state_block.x).vectorize(e, vec, tail);
    w.along_block.compute_at(w.along_state, w.over_state_block.x).vectorize(e, vec, tail);
    w.along_block.update().reorder(e, w.over_state.x).vectorize(e, vec, tail);
    w.along_keys.compute_root();
    w.along_keys_block.compute_at(w.along_keys, w.over_state_block.x);
    w.kept.compute_root();
    w.dgates.compute_root().bound(i, 0, sizes.chunk).vectorize(i, lanes);
    w.dgates.update().reorder(i, w.over_row.x).vectorize(i, lanes);

    w.result_dq.update().reorder(w.wanted_dq.x, i, g, h, b).vectorize(w.wanted_dq.x, vec, tail);
    w.result_dk.update().reorder(w.wanted_dk.x, j, h, b).vectorize(w.wanted_dk.x, vec, tail);
    w.result_dv.update().reorder(w.wanted_dv.x, j, h, b).vectorize(w.wanted_dv.x, vec, tail);
}

bool matches(const Target &t, const PowerSizes &) { return !t.has_gpu_feature(); }

const bool added = Schedule<PowerBackwardFuncs, PowerSizes>::add({"generic", 0, matches, apply});
}  // namespace
