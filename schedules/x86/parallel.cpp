// x86 with AVX-512 or AVX2: a block of rows against one block of keys after the other. Rows are what vectors of weights run over, so that
// a block's queries are transposed once, keys are read as they lie, one number at a time, and sums of weights need no shuffles.
// Not parallel: the runtime spreads batch entries, heads and rows over threads.
//
// One core of an Intel Xeon (Emerald Rapids), AVX-512, T 4096, 8 heads, K = V = 64 in 217 ms, 79 GFLOP/s of useful operations of a
// peak of 118, 128 in 319 ms, 108; degree 2 divided by the sum of weights takes as long (retention_bench, parallel). The two products
// are nine tenths of the time.
#include "../../generators/parallel.h"
#include "../schedule.h"
#include "tile.h"

namespace {
using namespace Halide;
using namespace holdfast;

void apply(ParallelFuncs &f, const ParallelSizes &sizes, const Target &target) {
    Var b("b"), h("h"), g("g"), c("c"), n("n"), i("i"), j("j"), d("d"), e("e"), s("s");
    Var eo("eo"), ei("ei"), doo("do"), di("di"), jo("jo"), ji("ji"), io("io"), ii("ii"), it("it"), fo("fo"), fi("fi"), ft("ft");
    RVar row = f.over_result.x, block = f.over_result.y, ro("ro"), ri("ri"), rt("rt");
    RVar j_out = f.over_weights.x, i_out = f.over_weights.y, n_out = f.over_weights.z, c_out = f.over_weights.w;
    const int vec = target.natural_vector_size<float>();
    const int tile = tile_of(target).rows, wide = tile_of(target).columns * vec;  // of keys or rows; of rows or values
    const int strip = wide;  // rows whose weights on one block of keys are there at a time
    const TailStrategy guard = TailStrategy::GuardWithIf;

    // A product accumulated in registers for the tile that its consumer works on: a whole one, also where the consumer ends
    // inside it, at a size that no tile divides.
    auto registers = [&](Func p, const LoopLevel &at, const RDom &over, Var x, Var y) {
        p.compute_at(at).bound_extent(x, wide).bound_extent(y, tile).vectorize(x, vec).unroll(x).unroll(y);
        p.update().reorder(x, y, over.x).vectorize(x, vec).unroll(x).unroll(y);
    };
    auto weights_of = [&](Func w, const LoopLevel &at, Func scores, const RDom &over) {
        w.compute_at(at).split(j, jo, ji, tile, TailStrategy::RoundUp).split(i, io, ii, wide).reorder(ii, ji, io, jo);
        w.vectorize(ii, vec).unroll(ii).unroll(ji).bound_storage(j, sizes.block).never_partition_all();
        registers(scores, {w, io}, over, i, j);
    };
    // What a block of rows needs, whose loop is at `rows`, and of the sums in it what a strip needs, whose loop is at `at`.
    auto once = [&](ParallelWeights &w, const LoopLevel &rows, const LoopLevel &at) {
        for (Func x : {w.initial_decay, w.decay_before}) x.compute_at(rows);
        for (Func x : {w.row_decay, w.unit}) x.compute_at(rows).vectorize(i, vec);
        w.queries.compute_at(rows)
            .reorder_storage(i, d)
            .bound_storage(i, sizes.block + strip)  // whole vectors: strips may end past the block
            .split(d, doo, di, 4, TailStrategy::RoundUp)
            .reorder(di, i, doo)
            .vectorize(di)
            .unroll(i, vec)
            .never_partition_all();
        w.factor.compute_at(at).vectorize(i, vec);
        w.own_sum.compute_at(at).vectorize(i, vec).update().vectorize(i, vec);
    };
    // The sum over blocks of keys that `past` goes over too: the same weights serve both.
    auto past_sum = [&](ParallelWeights &w, const LoopLevel &rows) {
        w.past_sum.compute_at(rows).vectorize(i, vec);
        w.past_sum.update(0).reorder(i, w.over_initial_block.x).vectorize(i, vec);
        w.initial_block_sum.compute_at(w.past_sum, w.over_initial_block.x).vectorize(i, vec).update().vectorize(i, vec);
        w.past_sum.update(1).split(i, io, ii, strip).vectorize(ii, vec).reorder(ii, io, w.over_past_block);
    };

    for (Func decay : {f.decay_steps, f.decay_rest}) {
        decay.compute_root().vectorize(i, vec);
        decay.update().reorder(i, f.over_row, n, h, b).vectorize(i, vec);
    }
    f.state_in.compute_root().vectorize(e, vec, TailStrategy::RoundUp).update().vectorize(e, vec, TailStrategy::RoundUp);
    f.keys_in.compute_root();
    for (Func list : f.phi.table()) list.compute_root().vectorize(f.phi.weight.args()[0], vec);
    for (Func factor : f.phi.searched) {
        Var feature = factor.args()[0];
        factor.update().reorder(feature, f.phi.over_bit).vectorize(feature, vec);
    }

    // Rows of the caller's tensors are H * D apart, often a power of two: copied, they do not fight for one cache set, and
    // the widening of 16 bits is paid once.
    Func keys = f.k.in(), values = f.v.in();
    keys.compute_root().vectorize(d, vec, TailStrategy::RoundUp);
    values.compute_root().vectorize(e, vec, TailStrategy::RoundUp);

    // Out, a block of rows at a time.
    f.result.update(0)
        .split(row, ro, ri, strip)
        .split(ri, rt, ri, tile)
        .split(e, eo, ei, wide, guard)
        .reorder(ei, ri, eo, rt, ro, block, g, h, b)
        .vectorize(ei, vec)
        .unroll(ei)
        .unroll(ri)
        .never_partition_all();  // copies of all that is inside, for what little is gained at edges
    const LoopLevel rows(f.result, block), strip_of_rows(f.result, ro);
    once(f.weights, rows, strip_of_rows);
    registers(f.own, {f.result, eo}, f.over_own_key, e, i);
    weights_of(f.weights.own, strip_of_rows, f.weights.own_scores, f.weights.over_own_key_feature);
    f.weights.mask.compute_at(f.weights.own, io).vectorize(i, vec).unroll(i).unroll(j);

    RVar past = f.weights.over_past_block;
    f.past.compute_at(rows).bound_extent(i, sizes.block).align_bounds(e, wide).vectorize(e, vec);
    f.past.update(0)
        .split(i, fo, fi, strip)
        .split(fi, ft, fi, tile)
        .split(e, eo, ei, wide)
        .reorder(ei, fi, ft, eo, fo, f.weights.over_initial_block.x)
        .vectorize(ei, vec)
        .unroll(ei)
        .unroll(fi)
        .never_partition_all();
    registers(f.initial_block, {f.past, ft}, f.over_feature, e, i);
    Func phi = f.weights.phi;
    phi.clone_in(f.weights.initial_block_sum);  // inlined there: one in so many values of the work
    phi.compute_at(f.past, fo).bound_storage(j, sizes.block).vectorize(i, vec).unroll(i);
    f.past.update(1)
        .split(i, io, ii, strip)
        .split(ii, it, ii, tile)
        .split(e, eo, ei, wide)
        .reorder(ei, ii, it, eo, io, past)
        .vectorize(ei, vec)
        .unroll(ei)
        .unroll(ii)
        .never_partition_all();
    registers(f.past_block, {f.past, it}, f.over_past_key, e, i);
    weights_of(f.weights.past, {f.past, io}, f.weights.past_scores, f.weights.over_past_key_feature);
    f.weights.key_decay.compute_at(f.past, past).vectorize(j, vec);
    past_sum(f.weights, rows);
    f.weights.past_sum.update(1).compute_with(f.past.update(1), io);
    f.weights.past_block_sum.compute_at(f.past, io)
        .vectorize(i, vec)
        .update()
        .reorder(i, f.weights.over_summed_key.x)
        .vectorize(i, vec)
        .unroll(i);

    // Weights that are written: the same without products of values.
    f.weights_out.vectorize(f.weights_out.args()[0], vec, guard);
    f.weights_out.update().never_partition_all();
    const LoopLevel rows_shown(f.weights_out, c_out);
    Func key_decay_shown = f.shown.key_decay.clone_in(f.weights_shown);
    once(f.shown, rows_shown, rows_shown);
    weights_of(f.shown.own, rows_shown, f.shown.own_scores, f.shown.over_own_key_feature);
    f.shown.mask.compute_at(rows_shown).vectorize(i, vec);
    past_sum(f.shown, rows_shown);
    f.shown.past_block_sum.compute_at(f.shown.past_sum, io)
        .vectorize(i, vec)
        .update()
        .reorder(i, f.shown.over_summed_key.x)
        .vectorize(i, vec);
    weights_of(f.shown.past, {f.shown.past_sum, io}, f.shown.past_scores, f.shown.over_past_key_feature);
    f.shown.key_decay.compute_at(f.shown.past_sum, f.shown.over_past_block).vectorize(j, vec);
    key_decay_shown.compute_at(f.weights_out, n_out).vectorize(j, vec);
    weights_of(f.weights_shown, {f.weights_out, n_out}, f.shown_scores, f.over_shown_key_feature);

    // The final state.
    for (Func x : {f.end_decay_before, f.end_decay}) x.compute_root();
    f.end_key_decay.compute_root().vectorize(j, vec);
    f.state_out.vectorize(e, vec, guard);
    f.contribution.compute_at(f.state_out, s).align_bounds(e, wide).align_bounds(d, tile).vectorize(e, vec);
    f.contribution.update()
        .split(d, doo, di, tile)
        .split(e, eo, ei, wide)
        .reorder(ei, di, eo, doo, f.over_block)
        .vectorize(ei, vec)
        .unroll(ei)
        .unroll(di);
    f.keys_decayed.in(f.contribution_block).compute_at(f.contribution, f.over_block).vectorize(d, vec, TailStrategy::RoundUp);
    registers(f.contribution_block, {f.contribution, eo}, f.over_token, e, d);
    f.keys_contribution.compute_at(f.keys_out, s);
    f.keys_block.compute_at(f.keys_contribution, f.over_keys_block).update().reorder(d, f.over_keys_token);
}

bool matches(const Target &t, const ParallelSizes &s) {
    if (t.arch != Target::X86 || t.has_gpu_feature() || !t.has_feature(Target::AVX2)) return false;
    return s.block % (tile_of(t).columns * t.natural_vector_size<float>()) == 0;
}

const bool added = Schedule<ParallelFuncs, ParallelSizes>::add({"x86", 10, matches, apply});
}  // namespace
