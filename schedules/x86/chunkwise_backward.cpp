// x86 with AVX-512 or AVX2: the scan over the chunks of a call, the scan back, then each gradient for all of them. Matrix products
// in register tiles of `rows` x `columns` vectors. Not parallel: the runtime spreads batch entries and heads over threads, and
// calls for a few chunks at a time so that all of their rows and states stay in L2.
//
// AMD EPYC (Zen 4), one core, AVX-512, in turn with the forward kernel over the same rows, useful operations, of which there are
// 2.5 times the forward's; calls of 4 chunks at K = V = 64, of 2 at 128. From cache (T 512 of one head): 80 GFLOP/s at 64, 2.54
// times the forward's time; 92 at 128, 2.49 times. With rows from L3 (T 1024 of 8 heads), while others used the machine: 65 to
// 69, 2.6 to 2.8 times; 80 to 83, 2.4 to 2.55 times. AVX2: 68, 2.6 times. No gradient of q, k, v and decays wanted: 20% of it.
//
// The whole call, two threads, T 4096 of 8 heads, calls of 8 chunks: 13.4 to 14.2 ms at 64, 3.0 to 3.2 times the forward's time, where
// it was 14.7 to 15.0 ms and 3.3 times before rows were asked for and results of q and k written chunk by chunk; 43 to 45 ms at 128,
// 3.1 times, 1% less than before. The products with states are six to the forward's two: the runtime's states, those again here, and
// the four of gradients.
//
// Products take 57% of the time at 64, near the peak. The rest: adding to states and their gradients 9%, rows in 8% and results out 5%,
// transposing 6%, products of gates 4%, the mask's exp 2%, memory for stages 2%. Tried: copies for each product by the chunk, the
// next chunk's rows asked for ahead, as chunkwise.cpp does: 5% slower from cache, no faster from L3. Nothing asked for behind rows:
// 8% slower at 64; into L1 instead of L2: the same. Chunks of 64: 9% slower at 64, 4% at 128. Calls of 1, 2, 3, 4 chunks, which
// recompute fewer states: 20, 10, 6, 4% slower at 64; of 6 to 16 there, and of 3 to 8 at 128: the same. Rows of states a line further
// apart, and a strip of columns of theirs for all rows of a chunk, to read them from L1: the same at 128, 1 to 3% slower at 64.
#include "../../generators/chunkwise_backward.h"
#include "../schedule.h"
#include "prefetch.h"
#include "tile.h"

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int score_columns = 16;  // narrower than other products: half of the scores are masked

void apply(ChunkwiseBackwardFuncs &r, const ChunkwiseSizes &sizes, const Target &target) {
    Var xi("xi"), yo("yo"), yi("yi");
    const bool sized = sizes.key > 0 && sizes.value > 0;
    // The loop over tiles of a product, in which rows are asked for: of a gradient during the product before it, of inputs for the
    // next head.
    auto asking = [&](const std::vector<std::string> &tensors, bool behind = false) {
        return sized ? Var(x86::ask_for(tensors, sizes.chunk, behind)) : Var("xo");
    };
    const Var xo("xo");
    const int vec = target.natural_vector_size<float>();
    const int rows = tile_of(target).rows, wide = tile_of(target).columns * vec;
    const int score_rows = score_columns > vec ? rows : 2 * rows;  // as many sums of scores as other products have

    // A product accumulated in registers for the tile that its consumer works on, a whole one also where that ends inside it.
    auto tile = [&](Func p, const LoopLevel &at, int columns, int rows) {
        Var x = p.args()[0], y = p.args()[1];
        p.compute_at(at).bound_extent(x, columns).bound_extent(y, rows).vectorize(x, vec).unroll(x).unroll(y);
        for (int u = 0; u < p.num_update_definitions(); u++) {
            std::vector<VarOrRVar> order = {x, y};
            for (const RVar &over : p.rvars(u)) order.push_back(over);
            p.update(u).reorder(order).vectorize(x, vec).unroll(x).unroll(y);
        }
    };
    // Tiles of a stage of whole chunks; returns where the product behind it is accumulated.
    auto tiles = [&](Func stage, int columns, int rows, const Var &xo = Var("xo")) {
        Var x = stage.args()[0], y = stage.args()[1];
        stage.compute_root()
            .align_bounds(x, columns)
            .align_bounds(y, rows)
            .split(x, xo, xi, columns)
            .split(y, yo, yi, rows)
            .reorder(xi, yi, xo, yo)
            .vectorize(xi, vec)
            .unroll(xi)
            .unroll(yi);
        return LoopLevel(stage, xo);
    };
    // A product of whole chunks.
    auto product = [&](Func p, const Var &xo) {
        Func stored = p.in();
        tile(p, tiles(stored, wide, rows, xo), wide, rows);
        return stored;
    };
    auto elementwise = [&](Func f) { return f.compute_root().vectorize(f.args()[0], vec); };
    // For products that read it along its second axis: blocks of 4 x 16, whose elements are shuffled in registers.
    auto transposed = [&](Func source, const std::vector<Func> &users) {
        Func copy = source.in(users);
        Var x = copy.args()[0], y = copy.args()[1];
        copy.compute_root()
            .reorder_storage(y, x)
            .align_bounds(x, 4)
            .align_bounds(y, vec)
            .split(x, xo, xi, 4)
            .split(y, yo, yi, vec)
            .reorder(xi, yi, xo, yo)
            .vectorize(xi)
            .unroll(yi);
        return copy;
    };

    // Rows of the caller's tensors are H * D apart, often a power of two: copied, they do not fight for one cache set, and the
    // clamp of the row and the widening of 16 bits are paid once.
    for (Func copy : {r.f.q, r.f.k, r.f.v, r.dout_staged, r.dinter, r.f.keys_decayed}) {
        elementwise(copy);
        if (sized) copy.unroll(copy.args()[0]);
    }

    // Scan and scan back. The state is read by dq along d alone: it lies that way.
    auto scan = [&](Func state, Func summed, Var x, Var y, const Var &xo) {
        RVar over = state.rvars(1)[0];
        state.compute_root().align_bounds(x, wide).align_bounds(y, rows);
        state.update(0).vectorize(x, vec);
        state.update(1)
            .split(x, xo, xi, wide)
            .split(y, yo, yi, rows)
            .reorder(xi, yi, xo, yo, over)
            .vectorize(xi, vec)
            .unroll(xi)
            .unroll(yi);
        Var px = summed.args()[0], py = summed.args()[1];
        if (x.name() != state.args()[0].name()) std::swap(px, py);
        summed.compute_at(state, xo).reorder_storage(px, py).bound_extent(px, wide).bound_extent(py, rows).reorder(px, py);
        summed.vectorize(px, vec).unroll(px).unroll(py);
        std::vector<VarOrRVar> order = {px, py};
        for (const RVar &sum : summed.rvars(0)) order.push_back(sum);
        summed.update().reorder(order).vectorize(px, vec).unroll(px).unroll(py);
    };
    Var e = r.f.state.args()[0], d = r.f.state.args()[1];
    transposed(r.f.state_in, {r.f.state});
    r.f.state.reorder_storage(d, e);
    scan(r.f.state, r.f.contribution, d, e, asking({"dq"}));
    scan(r.dstate, r.dstate_from_inter, e, d, asking({"dk"}));
    r.dstate_in.vectorize(r.dstate_in.args()[0], vec, TailStrategy::GuardWithIf);

    // Products inside chunks. dq and dk share dscores, all of the square; weights are computed for dv a strip of keys at a time,
    // from the start of its causal tile.
    elementwise(r.f.mask);
    transposed(r.f.k, {r.f.scores}), transposed(r.f.v, {r.dweights});
    tile(r.dweights, tiles(r.dscores, score_columns, score_rows), score_columns, score_rows);
    transposed(r.dcontribution, {r.dkeys_decayed, r.state_product});
    product(r.dkeys_decayed, asking({"dv"}));
    product(r.dq, asking({"dout"}, true)), product(r.dk, asking({"q"}, true));
    for (auto [result, over] : {std::make_pair(r.result_dq, r.over_dq), {r.result_dk, r.over_dk}}) {
        Var x = result.args()[0];
        result.update(0).reorder(x, over.x, over.y).vectorize(x, vec, TailStrategy::GuardWithIf);
    }
    RVar row = r.over_dv.x, rs("rs"), ro("ro"), ri("ri");
    Var x = r.result_dv.args()[0], dv_columns = asking({"k", "v"}, true);
    r.result_dv.update(0)
        .split(row, rs, ri, score_columns)
        .split(ri, ro, ri, rows)
        .split(x, dv_columns, xi, wide, TailStrategy::GuardWithIf)
        .reorder(xi, ri, dv_columns, ro, rs, r.over_dv.y)
        .vectorize(xi, vec)
        .unroll(xi)
        .unroll(ri);
    tile(r.dv, {r.result_dv, dv_columns}, wide, rows);
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
    for (Func gates :
         {r.f.row_decay, r.f.key_decay, r.f.row_steps, r.f.row_rest, r.state_product, r.added_product, r.dlog_decay})
        elementwise(gates);
    r.f.chunk_decay.compute_root();
    for (Func product : {r.row_product, r.key_product, r.end_product})
        product.compute_root().update().atomic().vectorize(product.rvars(0)[0], vec);
    for (Func sum : {r.state_product, r.added_product, r.dlog_decay})
        sum.update().reorder(sum.args()[0], sum.rvars(0)[0]).vectorize(sum.args()[0], vec);
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
