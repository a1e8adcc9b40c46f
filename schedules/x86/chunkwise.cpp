// x86 with AVX-512 or AVX2: the scan over all chunks of a call, then the output chunk by chunk. Matrix products in register
// tiles of `rows` x `columns` vectors. Not parallel: the runtime spreads batch entries and heads over threads, and calls for a
// few chunks at a time so that their rows and states stay in L2.
//
// Intel Xeon (Emerald Rapids), one core, AVX-512, in turn with a loop of nothing but fused multiply-adds, useful operations:
// from cache (T 1024 of one head) 61% of that peak at K = V = 64, 70% at 128; from memory (T 4096 of 8 heads) 51 to 54% and 53
// to 56%, 57 to 58% with huge pages. Before rows were asked for ahead and strips had 16 rows: 57, 65, 43 to 45, 52%.
//
// From cache, K = V = 64: 46% of the time in products with states, at the peak, ten loads for sixteen fused multiply-adds; scores
// 12%, 17 loads for 16; intra 8%; copies 9%, two or three cycles a line of L2; the mask's exp 6%, transposing keys 4%, adding to
// states 4%, decays 3%. From memory, looking up a page for each row of 4 KiB or more: it holds up the loop that asks.
// Tried: asking in bursts of 16 lines before each tile, for L1 instead of L2, or copying with nothing asked for: 3, 1 and 15%
// slower from memory at 64; one head after the other: 7%. Transposing 8 or 16 features at a time: 3%. Longer loops of scores: the
// same.
#include "../../generators/chunkwise.h"
#include "../schedule.h"
#include "prefetch.h"
#include "tile.h"

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int score_columns = 16;  // narrower than other products: half of the scores are masked

void apply(ChunkwiseFuncs &f, const ChunkwiseSizes &sizes, const Target &target) {
    Var b("b"), h("h"), g("g"), c("c"), i("i"), j("j"), d("d"), e("e");
    Var eo("eo"), ei("ei"), doo("do"), di("di"), jo("jo"), ji("ji");
    RVar row = f.over_result.x, in = f.over_result.y, ro("ro"), ri("ri");
    RVar chunk = f.over_chunk.x;
    const int vec = target.natural_vector_size<float>();
    const int rows = tile_of(target).rows, wide = tile_of(target).columns * vec;

    // A product accumulated in registers for the tile that its consumer works on: a whole one, also where the consumer ends
    // inside it, at a size that no tile divides.
    auto tile = [&](Func p, const LoopLevel &at, const RDom &over, Var x, int x_extent, Var y, int y_extent) {
        p.compute_at(at).bound_extent(x, x_extent).bound_extent(y, y_extent).vectorize(x, vec).unroll(x).unroll(y);
        p.update().reorder(x, y, over.x).vectorize(x, vec).unroll(x).unroll(y);
    };
    // Rows of the next chunk are asked for every few steps of the products with states, a line of each tensor at a time.
    const int steps = std::min(sizes.value * (64 / 4) / (rows * wide), 16);
    auto ask_ahead = [&](Func p, const RDom &over, int extent) {
        RVar outer(x86::ask_ahead), step("step");
        if (steps > 0 && extent > 0 && extent % steps == 0) p.update().split(over.x, outer, step, steps).unroll(step);
    };

    RVar strip(x86::rows_ahead);                                   // of which the weights are at hand
    const int strip_rows = score_columns > vec ? rows : 2 * rows;  // as many sums of scores as other products have
    f.result.update(0)
        .split(row, strip, ri, strip_rows)
        .split(ri, ro, ri, rows)
        .split(e, eo, ei, wide, TailStrategy::GuardWithIf)
        .reorder(ei, ri, eo, ro, strip, g, in, h, b)
        .vectorize(ei, vec)
        .unroll(ei)
        .unroll(ri);
    Func inter = f.inter.in();  // stored: registers for two products at a time there are none
    inter.compute_at(f.result, ro)
        .bound_extent(i, rows)
        .split(e, eo, ei, wide)
        .reorder(ei, i, eo)
        .vectorize(ei, vec)
        .unroll(ei)
        .unroll(i);
    tile(f.inter, {inter, eo}, f.over_state, e, wide, i, rows);
    ask_ahead(f.inter, f.over_state, sizes.key);
    tile(f.intra, {f.result, eo}, f.over_key, e, wide, i, rows);
    f.row_decay.compute_at(f.result, in).vectorize(i, vec);

    // Scores one strip of rows at a time, only up to the end of its causal tile. Columns start at 0: rounded down instead, the
    // tile would run over keys before the chunk, whatever their memory holds; denormals there are slow on Intel.
    f.weights.compute_at(f.result, strip)
        .bound_storage(j, sizes.chunk)
        .split(j, jo, ji, score_columns, TailStrategy::RoundUp)
        .reorder(ji, i, jo)
        .vectorize(ji, vec)
        .unroll(ji)
        .unroll(i);
    tile(f.scores, {f.weights, jo}, f.over_key_feature, j, score_columns, i, strip_rows);

    // Rows of the caller's tensors are H * D apart, often a power of two: copied, they do not fight for one cache set, and
    // the clamp of the row and the widening of 16 bits are paid once. By the chunk, keys and values once for states and once for
    // outputs: while products compute the next ones come from memory. Sizes known at run time only, which are not asked for
    // ahead: all rows of a call at once, many lines are then on their way together.
    const bool sized = sizes.key > 0 && sizes.value > 0;
    using Readers = std::vector<Func>;
    Func keys_transposed = f.k.in(f.scores), queries = f.q.in({f.scores, f.inter});
    Func keys = f.k.in(sized ? Readers{keys_transposed} : Readers{keys_transposed, f.keys_decayed});
    Func values = f.v.in(sized ? Readers{f.intra} : Readers{f.intra, f.contribution});
    f.keys_decayed.compute_at(f.state, chunk);
    for (Func rows : {queries, keys, values, f.keys_decayed}) rows.vectorize(rows.args()[0], vec);
    if (sized) {
        Func added = f.v.in(f.contribution);
        queries.compute_at(f.result, g), keys.compute_at(f.result, in), values.compute_at(f.result, in);
        added.compute_at(f.state, chunk).vectorize(added.args()[0], vec);
        for (Func rows : {queries, keys, values, added, f.keys_decayed}) rows.unroll(rows.args()[0]);
        for (Func rows : {queries, added, f.keys_decayed})  // the other two find theirs in L2
            rows.rename(rows.args()[1], Var(x86::rows_ahead));
    } else {
        for (Func rows : {queries, keys, values}) rows.compute_root();
    }
    // Scores read keys along j: transposed once per chunk, four features of all keys at a time: as many stores as a row is long
    // become shuffles in registers.
    const Var key_feature = keys_transposed.args()[0], key = keys_transposed.args()[1];
    keys_transposed.compute_at(f.result, in)
        .reorder_storage(key, key_feature)
        .split(key_feature, doo, di, 4)
        .reorder(di, key, doo)
        .vectorize(di)
        .unroll(key);

    // States of all chunks, before any output.
    f.state_out.vectorize(e, vec, TailStrategy::GuardWithIf);
    f.state.compute_root().align_bounds(e, wide).align_bounds(d, rows);
    f.state.update(0).vectorize(e, vec);
    f.state.update(1)
        .split(d, doo, di, rows)
        .split(e, eo, ei, wide)
        .reorder(ei, di, eo, doo, chunk, h, b)
        .vectorize(ei, vec)
        .unroll(ei)
        .unroll(di);
    tile(f.contribution, {f.state, eo}, f.over_token, e, wide, d, rows);
    ask_ahead(f.contribution, f.over_token, sizes.chunk);
    f.key_decay.compute_at(f.state, chunk).vectorize(j, vec);
    f.chunk_decay.compute_at(f.state, chunk);
    for (Func row : {f.row_steps, f.row_rest}) row.compute_root().vectorize(i, vec);
    for (Func decay : {f.decay_steps, f.decay_rest}) {
        Func rows = decay.in();
        rows.compute_root().bound(i, 0, sizes.chunk).vectorize(i, vec).unroll(i);
        decay.compute_at(rows, c).vectorize(i, vec).unroll(i);
        decay.update().reorder(i, f.over_row.x).vectorize(i, vec).unroll(i);
    }
}

bool matches(const Target &t, const ChunkwiseSizes &s) {
    if (t.arch != Target::X86 || t.has_gpu_feature() || !t.has_feature(Target::AVX2)) return false;
    const int wide = tile_of(t).columns * t.natural_vector_size<float>();
    return s.chunk % wide == 0 && s.chunk % tile_of(t).rows == 0;
}

const bool added = Schedule<ChunkwiseFuncs, ChunkwiseSizes>::add({"x86", 10, matches, apply});
}  // namespace
