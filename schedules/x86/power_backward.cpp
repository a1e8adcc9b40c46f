// x86 with AVX-512 or AVX2: four register-tiled products per chunk, of two kinds. Features by values, as in power.cpp: state from rows
// of the chunk, and values from the state. And the gradient of phi, rows by features: time stands innermost on it, as on phi, so that
// what goes from it to elements is dense. phi and its gradient are formed a tile at a time, in L1. Not parallel: the runtime spreads
// heads over threads.
//
// One core of an AMD EPYC (Zen 4), AVX-512, degree 2, normalized, chunks of 64, all gradients, in turn with the forward; the sum over
// chunks of the least time that each took, counting 4 D (V + 1) a token for the forward, twice that for the gradient, and the causal
// half of chunks. K = V = 64, 1024 tokens: 12.4 ms, 91 GFLOP/s, 2.22 times the forward's time at 101. K = V = 32: 2.0 ms, 75, 2.40
// times; K = V = 128, 256 tokens: 24.9 ms, 88, 2.13 times; K = 16, V = 64, degree 3: 5.2 ms, 85, 2.30 times. AVX2: 81, 2.28 times. Of
// K = V = 64 the initial state's gradient takes 25% of the time, that of q 27%, of k 25%, of v 22%, and that of gates 2%, as long as
// the others are wanted.
#include "../../generators/power_backward.h"
#include "../schedule.h"
#include "tile.h"

namespace {
using namespace Halide;
using namespace holdfast;

/// Features of phi of the rows, and of the gradient of phi, that are in L1 with all rows: two tiles, where that divides D. 0: none does.
int features_at_once(const PowerSizes &s, const Target &t) {
    const int D = expanded_size(s.key, s.degree), rows = tile_of(t).rows;
    return D % 16 == 0 ? 16 : D % rows == 0 ? rows : 0;
}

void apply(PowerBackwardFuncs &w, const PowerSizes &sizes, const Target &target) {
    Var b("b"), h("h"), g("g"), i("i"), j("j"), d("d"), f("f"), e("e"), u("u");
    Var eo("eo"), ei("ei"), io("io"), ii("ii"), jo("jo"), ji("ji"), fo("fo"), fi("fi"), ft("ft"), yo("yo"), yi("yi"),
        lane("lane");
    RVar blocks("blocks"), in_block("in_block"), group("group"), in_group("in_group");
    PowerFuncs &p = w.p;
    const int C = sizes.chunk, vec = target.natural_vector_size<float>();
    const int rows = tile_of(target).rows, wide = tile_of(target).columns * vec, columns = std::min(wide, sizes.value);
    const int features = features_at_once(sizes, target), some = std::min(features, vec);
    const int apart = C + vec;  // elements of some rows, or they meet in a few sets of L1

    // A product accumulated in registers for the tile that its consumer works on.
    auto order = [&](Func product, int update, std::vector<VarOrRVar> inner, const std::vector<VarOrRVar> &outer) {
        for (const RVar &r : product.rvars(update)) inner.push_back(r);
        inner.insert(inner.end(), outer.begin(), outer.end());
        return inner;
    };
    auto tile = [&](Func product, const LoopLevel &at, Var x, Var y) {
        product.compute_at(at).vectorize(x, vec).unroll(x).unroll(y);
        product.update().reorder(order(product, 0, {x, y}, {})).vectorize(x, vec).unroll(x).unroll(y);
    };
    // The same of all rows of the chunk, tile by tile, in memory.
    auto all_rows = [&](Func product, Var row, Var other) {
        product.compute_root().bound(row, 0, C).reorder_storage(row, other).reorder(row, other).vectorize(row, vec);
        for (int n = 0; n < product.num_update_definitions(); n++)
            product.update(n)
                .split(row, eo, ei, wide)
                .split(other, yo, yi, rows)
                .reorder(order(product, n, {ei, yi}, {yo, eo}))
                .vectorize(ei, vec)
                .unroll(ei)
                .unroll(yi);
    };
    auto by_rows = [&](Func stage, Var row, Var other) {
        stage.compute_root()
            .bound(row, 0, C)
            .reorder_storage(row, other)
            .align_storage(row, apart)
            .reorder(row, other)
            .vectorize(row, vec);
    };
    auto transposed = [&](Func stage, Var row, Var other) {
        stage.compute_root()
            .bound(row, 0, C)
            .reorder_storage(row, other)
            .align_storage(row, apart)
            .split(row, io, ii, vec)
            .reorder(ii, other, io)
            .vectorize(ii);
    };

    // Sums of keys in lanes of rows.
    const RVar row = w.keys_from_queries.rvars(0)[0];
    w.keys_from_queries.update().split(row, group, in_group, vec);
    Func keys_lanes = w.keys_from_queries.update().rfactor(in_group, lane);
    for (Func sums : {keys_lanes}) sums.bound_storage(h, 1).bound_storage(b, 1);
    const RVar feature = w.dvalues.rvars(1)[0];
    w.dvalues.update(1).split(feature, blocks, in_block, sizes.block);
    Func dvalues_block = w.dvalues.update(1).rfactor(blocks, u);

    // Operands, and the table.
    for (Func list : p.phi.table()) list.compute_root().vectorize(f, vec);
    for (Func factor : p.phi.searched) factor.update().reorder(f, p.phi.over_bit).vectorize(f, vec);
    for (Func decay : {p.decay_steps, p.decay_rest}) {
        decay.compute_root().bound(i, 0, C).vectorize(i, vec);
        decay.update().reorder(i, p.over_row, h, b).vectorize(i, vec);
    }
    p.chunk_decay.compute_root();
    p.row_decay.compute_root().bound(i, 0, C).vectorize(i, vec);
    p.key_decay.compute_root().bound(j, 0, C).vectorize(j, vec);
    p.unit.compute_root().bound(i, 0, C);
    p.largest.compute_at(p.unit, i).update().atomic().vectorize(p.over_element, sizes.key);
    transposed(p.queries, i, d);
    transposed(p.keys, j, d);
    by_rows(p.queries_decayed, i, d);
    by_rows(p.keys_decayed, j, d);
    Func values = p.v.in({w.dweights, w.dphi_k});
    transposed(values, values.args()[1], values.args()[0]);

    // Numerators and denominators.
    p.phi_q.clone_in({w.den_block, keys_lanes});  // a small part, formed where it is looked at
    w.den_inter.compute_root().bound(i, 0, C).vectorize(i, vec);
    w.den_inter.update().reorder(i, w.over_block.x).vectorize(i, vec);
    w.den_block.compute_at(w.den_inter, w.over_block.x).vectorize(i, vec).unroll(i);
    w.den_block.update().reorder(i, w.over_feature_weight.x).vectorize(i, vec).unroll(i);
    w.den_intra.compute_root().bound(i, 0, C).vectorize(i, vec);
    w.den_intra.update().reorder(i, w.over_key_weight.x).vectorize(i, vec).unroll(i);
    for (Func once : {w.row, w.dden}) once.compute_root().bound(i, 0, C).vectorize(i, vec);
    w.from_out.compute_at(w.dden, i);
    w.dnum.compute_root().bound(i, 0, C).vectorize(e, vec);
    Func dnum_rows = w.dnum.in({w.dphi_q, w.dweights});
    transposed(dnum_rows, i, e);

    // The chunk's own keys.
    all_rows(p.scores, i, j);
    by_rows(p.weights, i, j);
    all_rows(w.dweights, i, j);
    by_rows(w.dscores, i, j);
    Func dscores_keys = w.dscores.in(w.dkeys);
    transposed(dscores_keys, j, i);
    all_rows(w.dqueries, i, d);
    all_rows(w.dkeys, j, d);

    // Through phi.
    auto through_phi = [&](Func stage, const RDom &over, Func dphi, Var row) {
        RVar tiles("tiles"), in_tile("in_tile");
        stage.compute_root().bound(row, 0, C).reorder_storage(row, d).align_storage(row, apart).vectorize(row, vec);
        stage.update()
            .split(over.y, tiles, in_tile, features)
            .reorder(row, over.x, in_tile, tiles)
            .vectorize(row, vec)
            .unroll(row)
            .unroll(over.x);
        dphi.compute_at(stage, tiles).reorder_storage(row, f).reorder(row, f).vectorize(row, vec).unroll(row);
        dphi.update(0)
            .split(row, eo, ei, wide)
            .split(f, fo, fi, rows)
            .reorder(order(dphi, 0, {ei, fi}, {fo, eo}))
            .vectorize(ei, vec)
            .unroll(ei)
            .unroll(fi);
        for (int n = 1; n < dphi.num_update_definitions(); n++) dphi.update(n).reorder(row, f).vectorize(row, vec).unroll(row);
    };
    through_phi(w.dqueries_state, w.over_factor_q, w.dphi_q, i);
    through_phi(w.dkeys_state, w.over_factor_k, w.dphi_k, j);

    // Values: the chunk's own rows, then by blocks of features, whose sums are in registers.
    w.dvalues.compute_root().bound(j, 0, C).vectorize(e, vec);
    w.dvalues.update(0)
        .split(j, jo, ji, rows)
        .split(e, eo, ei, columns)
        .reorder(order(w.dvalues, 0, {ei, ji}, {eo, jo}))
        .vectorize(ei, vec)
        .unroll(ei)
        .unroll(ji);
    w.dvalues.update(1)
        .split(j, jo, ji, rows)
        .split(e, eo, ei, columns)
        .reorder(ei, ji, eo, jo, blocks, h, b)
        .vectorize(ei, vec)
        .unroll(ei)
        .unroll(ji);
    tile(dvalues_block, {w.dvalues, eo}, e, j);
    p.phi_k.compute_at(w.dvalues, blocks).reorder_storage(j, f).reorder(j, f).vectorize(j, vec).unroll(j);

    // The initial state.
    w.dstate_in.update()
        .split(f, fo, fi, features)
        .split(fi, ft, fi, rows)
        .split(e, eo, ei, columns, TailStrategy::GuardWithIf)
        .reorder(ei, fi, eo, ft, fo, h, w.wanted_dstate.x)
        .vectorize(ei, vec)
        .unroll(ei)
        .unroll(fi);
    tile(w.from_queries, {w.dstate_in, eo}, e, f);
    p.phi_q.compute_at(w.dstate_in, fo).reorder_storage(i, f).reorder(i, f).vectorize(i, vec).unroll(i);
    w.dkeys_in.update().split(f, fo, fi, features).reorder(fi, fo, h, w.wanted_dkeys.x).vectorize(fi, some);
    w.keys_from_queries.compute_at(w.dkeys_in, fo).vectorize(f, some);
    w.keys_from_queries.update().reorder(in_group, f).vectorize(f, some).atomic().vectorize(in_group);
    keys_lanes.compute_at(w.dkeys_in, fo).reorder_storage(lane, f).vectorize(lane);
    keys_lanes.update().reorder(order(keys_lanes, 0, {lane}, {f})).vectorize(lane);

    // Gates.
    w.along_row.compute_root().bound(i, 0, C).vectorize(i, vec);
    w.along_row.update().reorder(i, w.over_query_element.x, w.over_query_element.y).vectorize(i, vec).unroll(i);
    for (Func along : {w.along_key, w.along_end}) {
        along.compute_root().bound(j, 0, C).vectorize(j, vec);
        along.update().reorder(j, w.over_key_element.x).vectorize(j, vec).unroll(j);
    }
    w.along_state.compute_root().vectorize(e, vec).update().reorder(e, w.over_state_block.x).vectorize(e, vec).unroll(e);
    w.along_block.compute_at(w.along_state, w.over_state_block.x).vectorize(e, vec).unroll(e);
    w.along_block.update().reorder(e, w.over_state.x).vectorize(e, vec).unroll(e);
    w.along_keys.compute_root();
    w.along_keys_block.compute_at(w.along_keys, w.over_state_block.x);
    w.kept.compute_root();
    w.dgates.compute_root().bound(i, 0, C).vectorize(i, vec);
    w.dgates.update().reorder(i, w.over_row.x).vectorize(i, vec);

    // Results: rows as they lie.
    w.result_dq.update().reorder(w.wanted_dq.x, i, g, h, b).vectorize(w.wanted_dq.x, vec);
    w.result_dk.update().reorder(w.wanted_dk.x, j, h, b).vectorize(w.wanted_dk.x, vec);
    w.result_dv.update().reorder(w.wanted_dv.x, j, h, b).vectorize(w.wanted_dv.x, vec);
}

bool matches(const Target &t, const PowerSizes &s) {
    if (t.arch != Target::X86 || t.has_gpu_feature() || !t.has_feature(Target::AVX2)) return false;
    const int vec = t.natural_vector_size<float>();
    return s.degree > 0 && s.chunk % (2 * vec) == 0 && s.key > 0 && s.key % vec == 0 && s.value > 0 &&
           s.value % (2 * vec) == 0 && features_at_once(s, t) > 0 && expanded_size(s.key, s.degree) % s.block == 0;
}

const bool added = Schedule<PowerBackwardFuncs, PowerSizes>::add({"x86", 10, matches, apply});
}  // namespace
