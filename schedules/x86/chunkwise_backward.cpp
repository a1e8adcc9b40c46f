// x86 with AVX-512 or AVX2: the scan over the chunks of a call, the scan back, then each gradient chunk by chunk. Matrix products
// in register tiles of `rows` x `columns` vectors. Not parallel: the runtime spreads batch entries and heads over threads, and
// calls for a few chunks at a time so that their rows and states stay in L2.
#include "../../generators/chunkwise_backward.h"
#include "../schedule.h"
#include "prefetch.h"
#include "tile.h"

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int score_columns = 16;  // narrower than other products: half of the scores are masked

void apply(ChunkwiseBackwardFuncs &r, const ChunkwiseSizes &sizes, const Target &target) {
    Var xo("xo"), xi("xi"), yo("yo"), yi("yi");
    const int vec = target.natural_vector_size<float>();
    const int rows = tile_of(target).rows, wide = tile_of(target).columns * vec;
    const int score_rows = score_columns > vec ? rows : 2 * rows;  // as many sums of scores as other products have

    // A product accumulated in registers for the tile that its consumer works on, a whole one also where that ends inside it: x is
    // its first axis, or, of what lies transposed, the second.
    auto tile_along = [&](Func p, const LoopLevel &at, Var x, int columns, Var y, int rows) {
        p.compute_at(at).reorder_storage(x, y).bound_extent(x, columns).bound_extent(y, rows);
        p.reorder(x, y).vectorize(x, vec).unroll(x).unroll(y);
        for (int u = 0; u < p.num_update_definitions(); u++) {
            std::vector<VarOrRVar> order = {x, y};
            for (const RVar &over : p.rvars(u)) order.push_back(over);
            p.update(u).reorder(order).vectorize(x, vec).unroll(x).unroll(y);
        }
    };
    auto tile = [&](Func p, const LoopLevel &at, int columns, int rows) {
        tile_along(p, at, p.args()[0], columns, p.args()[1], rows);
    };
    // Rows of the next chunk are asked for every few steps of a product, a line of each tensor at a time.
    auto ask_ahead = [&](Func p, int extent, int features) {
        const int steps = std::min(features * (64 / 4) / (rows * wide), 16);
        RVar outer(x86::ask_ahead), step("step");
        if (steps > 0 && extent > 0 && extent % steps == 0) p.update().split(p.rvars(0)[0], outer, step, steps).unroll(step);
    };

    // A stage of all chunks of a call, in tiles, a chunk after the other; the product behind it is accumulated at xo.
    auto tiles = [&](Func stage, int columns, int rows) {
        const std::vector<Var> args = stage.args();  // x, y, c, (g)
        std::vector<VarOrRVar> order = {xi, yi, xo, yo};
        if (args.size() == 6) order.push_back(args[3]);
        order.push_back(args[2]);
        stage.compute_root()
            .align_bounds(args[0], columns)
            .align_bounds(args[1], rows)
            .split(args[0], xo, xi, columns)
            .split(args[1], yo, yi, rows)
            .reorder(order)
            .vectorize(xi, vec)
            .unroll(xi)
            .unroll(yi);
    };
    auto product = [&](Func p) {
        Func stored = p.in();
        tiles(stored, wide, rows);
        tile(p, {stored, xo}, wide, rows);
        return stored;
    };

    // Rows of the caller's tensors are H * D apart, often a power of two: copied for each product, they do not fight for one cache
    // set, and the clamp of the row, the widening of 16 bits and decays are paid once. Who comes first reads them from memory, and
    // asks for those of its next chunk.
    auto copy = [&](Func source, Func user, const LoopLevel &at, const char *asked = nullptr) {
        Func copied = source.in(user);
        const std::vector<Var> args = copied.args();  // x, i, c, (g)
        copied.compute_at(at).vectorize(args[0], vec);
        if (args.size() == 6) copied.reorder(args[0], args[3], args[1]);
        if (sizes.key > 0 && sizes.value > 0) {
            copied.unroll(args[0]);
            if (asked) copied.rename(args[1], Var(asked));
        }
    };
    // For products that read it along its second axis: blocks of 4 x 16, whose elements are shuffled in registers.
    auto transposed = [&](Func source, const std::vector<Func> &users) {
        Func copied = source.in(users);
        Var x = copied.args()[0], y = copied.args()[1];
        copied.reorder_storage(y, x)
            .align_bounds(x, 4)
            .align_bounds(y, vec)
            .split(x, xo, xi, 4)
            .split(y, yo, yi, vec)
            .reorder(xi, yi, xo, yo)
            .vectorize(xi)
            .unroll(yi);
        return copied;
    };

    // Scan, and scan back. The state is read by dq alone, along d: it lies that way.
    auto scan = [&](Func state, Func added, Var x, Var y, Var added_x, Var added_y) {
        state.compute_root().align_bounds(x, wide).align_bounds(y, rows).reorder_storage(x, y);
        state.update(0).reorder(x, y).vectorize(x, vec);
        state.update(1)
            .split(x, xo, xi, wide)
            .split(y, yo, yi, rows)
            .reorder(xi, yi, xo, yo, state.rvars(1)[0])
            .vectorize(xi, vec)
            .unroll(xi)
            .unroll(yi);
        tile_along(added, {state, xo}, added_x, wide, added_y, rows);
    };
    const auto s = r.f.state.args(), a = r.f.contribution.args(), z = r.dstate.args(), w = r.dstate_from_inter.args();
    const LoopLevel chunk(r.f.state, r.f.over_chunk), back(r.dstate, r.over_chunk);
    transposed(r.f.state_in, {r.f.state}).compute_root();
    scan(r.f.state, r.f.contribution, s[1], s[0], a[1], a[0]);
    copy(r.f.keys_decayed, r.f.contribution, chunk, x86::rows_ahead), copy(r.f.v, r.f.contribution, chunk, x86::rows_ahead);
    ask_ahead(r.f.contribution, sizes.chunk, sizes.value);
    scan(r.dstate, r.dstate_from_inter, z[0], z[1], w[0], w[1]);
    copy(r.dinter, r.dstate_from_inter, back, x86::rows_behind), copy(r.f.q, r.dstate_from_inter, back, x86::rows_behind);
    ask_ahead(r.dstate_from_inter, sizes.chunk, sizes.value);
    r.dstate_in.vectorize(r.dstate_in.args()[0], vec, TailStrategy::GuardWithIf);

    // Products inside chunks. dq and dk share dscores; weights are computed for dv a strip of keys at a time, from the start of its
    // causal tile.
    const auto in = [](Func stage, int axis) { return LoopLevel(stage, stage.args()[axis]); };  // 2: a chunk; 3: and a query
    tiles(r.dscores, score_columns, score_rows);
    tile(r.dweights, {r.dscores, xo}, score_columns, score_rows);
    r.f.mask.compute_root().vectorize(r.f.mask.args()[0], vec);
    transposed(r.f.v, {r.dweights}).compute_at(in(r.dscores, 2));
    copy(r.dintra, r.dweights, in(r.dscores, 3));

    transposed(r.dcontribution, {r.dkeys_decayed, r.state_product}).compute_root();
    Func dkeys_decayed = product(r.dkeys_decayed);
    copy(r.f.v, r.dkeys_decayed, in(dkeys_decayed, 2));
    Func dq = product(r.dq), dk = product(r.dk);
    copy(r.dinter, r.dq, in(dq, 3)), copy(r.f.k, r.dq, in(dq, 2)), copy(r.f.q, r.dk, in(dk, 2));
    for (auto [result, over] : {std::make_pair(r.result_dq, r.over_dq), {r.result_dk, r.over_dk}}) {
        const std::vector<Var> args = result.args();
        result.update(0).reorder(args[0], over.x).vectorize(args[0], vec, TailStrategy::GuardWithIf);
    }

    RVar row = r.over_dv.x, rs("rs"), ro("ro"), ri("ri");
    r.result_dv.update(0)
        .split(row, rs, ri, score_columns)
        .split(ri, ro, ri, rows)
        .split(r.result_dv.args()[0], xo, xi, wide, TailStrategy::GuardWithIf)
        .reorder(xi, ri, xo, ro, rs, r.over_dv.y)
        .vectorize(xi, vec)
        .unroll(xi)
        .unroll(ri);
    const LoopLevel dv(r.result_dv, r.over_dv.y);
    tile(r.dv, {r.result_dv, xo}, wide, rows);
    copy(r.dintra, r.dv, dv), copy(r.f.keys_decayed, r.dv, dv), copy(r.f.q, r.f.scores, dv);
    transposed(r.f.k, {r.f.scores}).compute_at(dv);
    Var j = r.f.weights.args()[0], i = r.f.weights.args()[1];
    r.f.weights.compute_at(r.result_dv, rs)
        .bound_storage(i, sizes.chunk)
        .split(i, yo, yi, score_rows)
        .reorder(j, yi, yo)
        .vectorize(j, vec)
        .unroll(j)
        .unroll(yi);
    tile(r.f.scores, {r.f.weights, yo}, score_columns, score_rows);

    // Gates.
    for (Func gates : {r.f.row_decay, r.f.key_decay, r.f.row_steps, r.f.row_rest})
        gates.compute_root().vectorize(gates.args()[0], vec);
    r.f.chunk_decay.compute_root();
    for (Func sum : {r.row_product, r.key_product, r.end_product})  // over neighbours
        sum.compute_root().update().atomic().vectorize(sum.rvars(0)[0], vec);
    for (Func sum : {r.state_product, r.added_product, r.dlog_decay}) {
        Var x = sum.args()[0];
        sum.compute_root().vectorize(x, vec).update().reorder(x, sum.rvars(0)[0]).vectorize(x, vec);
    }
    for (Func decay : {r.f.decay_steps, r.f.decay_rest}) {
        Func all = decay.in();
        Var i = all.args()[0], c = all.args()[1];
        all.compute_root().bound(i, 0, sizes.chunk).vectorize(i, vec).unroll(i);
        i = decay.args()[0];
        decay.compute_at(all, c).vectorize(i, vec).unroll(i);
        decay.update().reorder(i, r.f.over_row.x).vectorize(i, vec).unroll(i);
    }
}

bool matches(const Target &t, const ChunkwiseSizes &s) {
    if (t.arch != Target::X86 || t.has_gpu_feature() || !t.has_feature(Target::AVX2)) return false;
    const int wide = tile_of(t).columns * t.natural_vector_size<float>();
    return s.chunk % wide == 0 && s.chunk % tile_of(t).rows == 0;
}

const bool added = Schedule<ChunkwiseBackwardFuncs, ChunkwiseSizes>::add({"x86", 10, matches, apply});
}  // namespace
