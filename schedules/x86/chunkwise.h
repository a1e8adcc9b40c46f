// What chunkwise schedules on x86 have in common: products of fp32 (chunkwise.cpp, which says how fast) and of pairs of bf16
// (chunkwise_bf16.cpp), both in registers.
#pragma once
#include "../../generators/chunkwise.h"
#include "prefetch.h"
#include "tile.h"

#include <algorithm>

namespace holdfast::x86 {

struct ChunkwiseLoops {
    static constexpr int score_columns = 16;  // narrower than other products: half of the scores are masked

    ChunkwiseFuncs &f;
    const ChunkwiseSizes &sizes;
    const int vec, rows, wide;
    Halide::Var b{"b"}, h{"h"}, g{"g"}, c{"c"}, i{"i"}, j{"j"}, d{"d"}, e{"e"};
    Halide::Var eo{"eo"}, ei{"ei"}, doo{"do"}, di{"di"}, jo{"jo"}, ji{"ji"};
    Halide::RVar row = f.over_result.x, in = f.over_result.y, chunk = f.over_chunk.x, ro{"ro"}, ri{"ri"};
    Halide::RVar strip{rows_ahead};  // rows of which the weights are at hand

    ChunkwiseLoops(ChunkwiseFuncs &f, const ChunkwiseSizes &sizes, const Halide::Target &target)
        : f(f), sizes(sizes), vec(target.natural_vector_size<float>()), rows(tile_of(target).rows),
          wide(tile_of(target).columns * vec) {}
    virtual ~ChunkwiseLoops() = default;

    /// A product accumulated in registers for the tile that its consumer works on: a whole one, also where the consumer ends
    /// inside it, at a size that no tile divides. Where `asks`, rows of the next chunk are asked for meanwhile.
    virtual void product(Halide::Func p, const Halide::LoopLevel &at, const Halide::RDom &over, Halide::Var x, int x_extent,
                         Halide::Var y, int y_extent, bool asks = false) = 0;

    /// Terms of a product with states after which to ask for a line of each tensor; 0: for none.
    int terms_per_line(const Halide::RDom &over) const {
        const int elements = f.q_stored.types()[0].bytes() == 2 ? 32 : 16;  // of a line
        const int terms = std::min(sizes.value * elements / (rows * wide), 16);
        const auto extent = Halide::Internal::as_const_int(over.x.extent());
        return terms > 0 && extent && *extent % terms == 0 ? terms : 0;
    }
    void outputs(Halide::Func weights) {
        const int strip_rows = score_columns > vec ? rows : 2 * rows;  // as many sums of scores as other products have
        f.result.update(0)
            .split(row, strip, ri, strip_rows)
            .split(ri, ro, ri, rows)
            .split(e, eo, ei, wide, Halide::TailStrategy::GuardWithIf)
            .reorder(ei, ri, eo, ro, strip, g, in, h, b)
            .vectorize(ei, vec)
            .unroll(ei)
            .unroll(ri);
        Halide::Func inter = f.inter.in();  // stored: registers for two products at a time there are none
        inter.compute_at(f.result, ro)
            .bound_extent(i, rows)
            .split(e, eo, ei, wide)
            .reorder(ei, i, eo)
            .vectorize(ei, vec)
            .unroll(ei)
            .unroll(i);
        product(f.inter, {inter, eo}, f.over_state, e, wide, i, rows, true);
        product(f.intra, {f.result, eo}, f.over_key, e, wide, i, rows);
        f.row_decay.compute_at(f.result, in).vectorize(i, vec);

        // Scores one strip of rows at a time, only up to the end of its causal tile. Columns start at 0: rounded down instead, the
        // tile would run over keys before the chunk, whatever their memory holds; denormals there are slow on Intel.
        const Halide::Var key = weights.args()[0], query = weights.args()[1];
        weights.compute_at(f.result, strip)
            .bound_storage(key, sizes.chunk)
            .split(key, jo, ji, score_columns, Halide::TailStrategy::RoundUp)
            .reorder(ji, query, jo)
            .vectorize(ji, vec)
            .unroll(ji)
            .unroll(query);
        product(f.scores, {weights, jo}, f.over_key_feature, j, score_columns, i, strip_rows);
    }
    /// States of all chunks, before any output; `contribution` is f's, or what has taken its place.
    void states(Halide::Func contribution) {
        f.state_out.vectorize(e, vec, Halide::TailStrategy::GuardWithIf);
        f.state.compute_root().align_bounds(e, wide).align_bounds(d, rows);
        f.state.update(0).vectorize(e, vec);
        f.state.update(1)
            .split(d, doo, di, rows)
            .split(e, eo, ei, wide)
            .reorder(ei, di, eo, doo, chunk, h, b)
            .vectorize(ei, vec)
            .unroll(ei)
            .unroll(di);
        product(contribution, {f.state, eo}, f.over_token, e, wide, d, rows, true);
    }
    void decays() {
        f.key_decay.compute_at(f.state, chunk).vectorize(j, vec);
        f.chunk_decay.compute_at(f.state, chunk);
        for (Halide::Func row : {f.row_steps, f.row_rest}) row.compute_root().vectorize(i, vec);
        for (Halide::Func decay : {f.decay_steps, f.decay_rest}) {
            Halide::Func rows = decay.in();
            rows.compute_root().bound(i, 0, sizes.chunk).vectorize(i, vec).unroll(i);
            decay.compute_at(rows, c).vectorize(i, vec).unroll(i);
            decay.update().reorder(i, f.over_row.x).vectorize(i, vec).unroll(i);
        }
    }
};

}  // namespace holdfast::x86
