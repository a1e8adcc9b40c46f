// x86 with AVX-512 or AVX2: the scan over all chunks of a call, then the output chunk by chunk. Matrix products in register
// tiles of `rows` x `columns` vectors. Not parallel: the runtime spreads batch entries and heads over threads, and calls for a
// few chunks at a time so that their rows and states stay in L2.
//
// Intel Xeon (Emerald Rapids), 2 cores, T 4096, 8 heads, AVX-512: K = V = 64 in 4.1 ms, 128 in 12.6 ms: 47% and 57% of the
// fp32 peak by useful operations, 57% and 69% from cache (bench/record/intel-xeon-emerald-rapids-2-cores). The products run
// at 95% of the peak; a fifth of the time is rows coming from memory, one miss per line, 10 to 20 GB/s a core.
#include "../../generators/chunkwise.h"
#include "../schedule.h"
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

    f.result.update(0)
        .split(row, ro, ri, rows)
        .split(e, eo, ei, wide, TailStrategy::GuardWithIf)
        .reorder(ei, ri, eo, ro, g, in, h, b)
        .vectorize(ei, vec)
        .unroll(ei)
        .unroll(ri);
    tile(f.inter, {f.result, eo}, f.over_state, e, wide, i, rows);
    tile(f.intra, {f.result, eo}, f.over_key, e, wide, i, rows);
    f.row_decay.compute_at(f.result, in).vectorize(i, vec);

    // Scores one strip of rows at a time, only up to the end of its causal tile. Columns start at 0: rounded down instead, the
    // tile would run over keys before the chunk, whatever their memory holds; denormals there are slow on Intel.
    f.weights.compute_at(f.result, ro)
        .bound_storage(j, sizes.chunk)
        .split(j, jo, ji, score_columns, TailStrategy::RoundUp)
        .reorder(ji, i, jo)
        .vectorize(ji, vec)
        .unroll(ji)
        .unroll(i);
    tile(f.scores, {f.weights, jo}, f.over_key_feature, j, score_columns, i, rows);

    // Rows of the caller's tensors are H * D apart, often a power of two: copied, they do not fight for one cache set, and
    // the clamp of the row and the widening of 16 bits are paid once. All rows of a call at once: many lines are then on their
    // way from memory together.
    Func queries = f.q.in({f.scores, f.inter}), values = f.v.in({f.intra, f.contribution});
    Func keys_transposed = f.k.in(f.scores), keys = f.k.in({keys_transposed, f.keys_decayed});
    for (Func rows : {queries, keys, values}) rows.compute_root().vectorize(rows.args()[0], vec);
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
    f.keys_decayed.compute_at(f.state, chunk).vectorize(d, vec);
    f.key_decay.compute_at(f.state, chunk).vectorize(j, vec);
    f.chunk_decay.compute_at(f.state, chunk);
    for (Func decay : {f.decay_steps, f.decay_rest}) {
        decay.compute_root().vectorize(i, vec);
        decay.update().reorder(i, f.over_row, c, h, b).vectorize(i, vec);
    }
}

bool matches(const Target &t, const ChunkwiseSizes &s) {
    if (t.arch != Target::X86 || t.has_gpu_feature() || !t.has_feature(Target::AVX2)) return false;
    const int wide = tile_of(t).columns * t.natural_vector_size<float>();
    return s.chunk % wide == 0 && s.chunk % tile_of(t).rows == 0;
}

const bool added = Schedule<ChunkwiseFuncs, ChunkwiseSizes>::add({"x86", 10, matches, apply});
}  // namespace
