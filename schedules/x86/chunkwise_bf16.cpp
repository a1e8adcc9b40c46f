// x86 with products of bf16, whose operands are rounded (ChunkwiseSizes::operands): AVX-512 BF16, in registers, and AMX, in tile
// registers. Sums are fp32. Not parallel, and called for a few chunks at a time: chunkwise.cpp.
//
// AVX-512 BF16: the loop of a product is 16 vdpbf16ps with 10 loads. Intel Xeon (Emerald Rapids), one core, in cache: a token of
// one head in 0.44 us at K = V = 64, 72% of it in these loops, against 0.21 with the fp32 products of chunkwise.cpp: it starts one
// every second cycle, half the terms of fp32's multiply-adds. So only other processors choose it (fast_bf16_dot in
// runtime/src/cpu_features.cpp). Zen 4, which starts one a cycle, one core, in cache: 0.24 us at 64 and 0.72 at 128, against 0.26 and
// 0.81; from memory 0.27 and 0.77, against 0.26 and 0.85 (retention_bench): rows are not asked for ahead here.
//
// AMX: not measured. docs/testing-without-hardware.md has what the machine code lets expect, and where its time goes.
#include "../../generators/chunkwise.h"
#include "../schedule.h"
#include "pairs.h"

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int vec = 16;  // fp32 in a vector

struct Stages {
    ChunkwiseFuncs &f;
    const ChunkwiseSizes &sizes;
    Func q;         // (d,i,...): what products read of the inputs, bf16 as they are stored; and of others, rounded
    Func k;         // (two,j,pair of d,...)
    Func v, state;  // (two,e,pair of j,...), (two,e,pair of d,...)
    Func weights;   // (j,i,...)
    Var b{"b"}, h{"h"}, g{"g"}, c{"c"}, i{"i"}, j{"j"}, d{"d"}, e{"e"};
    Var eo{"eo"}, ei{"ei"}, doo{"do"}, di{"di"}, jo{"jo"}, ji{"ji"};
    RVar row = f.over_result.x, in = f.over_result.y, chunk = f.over_chunk.x, ro{"ro"}, ri{"ri"};

    Stages(ChunkwiseFuncs &f, const ChunkwiseSizes &sizes) : f(f), sizes(sizes) {
        using x86::in_pairs, x86::pairs_of, x86::replace_calls;
        auto as_bf16 = [](const Func &stored) {
            Func bits(stored.name() + "_bf16");
            bits(stored.args()) = reinterpret(BFloat(16), stored(stored.args()));
            return bits;
        };
        f.contribution = x86::sum_of_parts(f.contribution, f.keys_read, f.state);
        q = as_bf16(f.q_stored), k = pairs_of(as_bf16(f.k_stored), 0), v = pairs_of(as_bf16(f.v_stored), 1);
        weights = f.weights_read[0], state = pairs_of(f.state_read[0], 1);
        for (Func user : {f.scores, f.inter}) replace_calls(user, f.q, [&](auto at) { return cast<float>(q(at)); });
        replace_calls(f.scores, f.k, [&](auto at) { return cast<float>(in_pairs(k, 0, at)); });
        for (Func user : {f.intra, f.contribution})
            replace_calls(user, f.v, [&](auto at) { return cast<float>(in_pairs(v, 1, at)); });
        replace_calls(f.inter, f.state_read[0], [&](auto at) { return in_pairs(state, 1, at); });
    }

    // Two rows of bf16 become one of pairs, in registers.
    void interleave(Func pairs, const LoopLevel &at) {
        const std::vector<Var> args = pairs.args();
        pairs.compute_at(at).bound_extent(args[0], 2).reorder(args[0], args[1]).vectorize(args[1], vec).unroll(args[0]);
    }
    // Columns of `f` become its rows, four of them at a time: as many stores as a row is long become shuffles in registers.
    void transpose(Func f, const Var &column, const Var &row) {
        f.split(column, doo, di, 4).reorder(di, row, doo).vectorize(di).unroll(row);
    }
    // Rows of the caller's tensors, all those of a call at once: chunkwise.cpp.
    void copy_rows() {
        Func keys = f.k_stored.in();
        for (Func rows : {q, keys}) rows.compute_root().vectorize(rows.args()[0], 2 * vec);
        interleave(v, LoopLevel::root());
    }
    // Pairs of features become columns: once per chunk.
    void transpose_keys() {
        const std::vector<Var> args = k.args();
        k.compute_at(f.result, in).bound_extent(args[0], 2).vectorize(args[0]);
        k.split(args[2], doo, di, 4).reorder(args[0], di, args[1], doo).vectorize(di).unroll(args[1]);
    }
    void decays() {
        f.row_decay.compute_at(f.result, in).vectorize(i, vec);
        f.key_decay.compute_at(f.state, chunk).vectorize(j, vec);
        f.chunk_decay.compute_at(f.state, chunk);
        for (Func decay : {f.decay_steps, f.decay_rest}) {
            decay.compute_root().vectorize(i, vec);
            decay.update().reorder(i, f.over_row, c, h, b).vectorize(i, vec);
        }
    }
    void states() {
        f.state_out.vectorize(e, vec, TailStrategy::GuardWithIf);
        f.state.compute_root();
        f.state.update(0).vectorize(e, vec);
        f.keys_decayed.compute_at(f.state, chunk).vectorize(d, vec);
    }
};

// A product accumulates in registers, `rows` x `columns` vectors at a time, for the tile that its consumer works on.
struct Dot : Stages {
    static constexpr int rows = 8, columns = 2;
    static constexpr int score_columns = vec;  // narrower: half of the scores are masked

    using Stages::Stages;

    void product(Func p, const LoopLevel &at, const RDom &over, Var x, int x_extent, Var y) {
        RVar pair("pair"), two("two");
        p.compute_at(at).bound_extent(x, x_extent).bound_extent(y, rows).vectorize(x, vec).unroll(x).unroll(y);
        for (int n = 0; n < p.num_update_definitions(); n++)
            p.update(n)
                .split(over.x, pair, two, 2)
                .reorder(two, x, y, pair)
                .vectorize(x, vec)
                .unroll(x)
                .unroll(y)
                .atomic()
                .vectorize(two);
    }
    void apply() {
        x86::end_at_pairs(f.intra, f.over_key);
        copy_rows(), transpose_keys(), decays(), states();

        const int wide = columns * vec;
        f.result.update(0)
            .split(row, ro, ri, rows)
            .split(e, eo, ei, wide)
            .reorder(ei, ri, eo, ro, g, in, h, b)
            .vectorize(ei, vec)
            .unroll(ei)
            .unroll(ri);
        product(f.inter, {f.result, eo}, f.over_state, e, wide, i);
        product(f.intra, {f.result, eo}, f.over_key, e, wide, i);
        interleave(state, {f.result, in});
        const Var key = weights.args()[0], query = weights.args()[1];
        weights.compute_at(f.result, ro)
            .bound_storage(key, sizes.chunk)
            .split(key, jo, ji, score_columns, TailStrategy::RoundUp)
            .reorder(ji, query, jo)
            .vectorize(ji)
            .unroll(query);
        product(f.scores, {weights, jo}, f.over_key_feature, j, score_columns, i);

        f.state.update(1)
            .split(d, doo, di, rows)
            .split(e, eo, ei, wide)
            .reorder(ei, di, eo, doo, chunk, h, b)
            .vectorize(ei, vec)
            .unroll(ei)
            .unroll(di);
        for (const Func &part : f.keys_read) {
            Func keys = x86::pairs_of(part, 1);
            x86::replace_calls(f.contribution, part, [&](auto at) { return x86::in_pairs(keys, 1, at); });
            interleave(keys, {f.state, chunk});
        }
        product(f.contribution, {f.state, eo}, f.over_token, e, wide, d);
    }
};

// A product accumulates in a tile register, 16 x 16 sums of 32 terms an instruction, and is stored in whole: a tile's numbers
// reach vectors through memory alone. Halide 21 keeps one tile of sums at a time, two loads of operands for each instruction.
struct Amx : Stages {
    static constexpr int rows = 16, columns = 16, terms = 32;

    using Stages::Stages;

    void product(Func p, const LoopLevel &at, const RDom &over, Var x, int x_extent, Var y, int y_extent) {
        Var xo("xo"), yo("yo"), xi("xi"), yi("yi");
        RVar step("step"), term("term");
        Func all = p.in();
        all.compute_at(at).bound_extent(x, x_extent).bound_extent(y, y_extent);
        all.tile(x, y, xo, yo, xi, yi, columns, rows).vectorize(xi).vectorize(yi);
        p.compute_at(all, xo).store_in(MemoryType::AMXTile).tile(x, y, xi, yi, columns, rows).vectorize(xi).vectorize(yi);
        for (int n = 0; n < p.num_update_definitions(); n++)
            p.update(n)
                .tile(x, y, xi, yi, columns, rows)
                .split(over.x, step, term, terms)
                .reorder({term, xi, yi, step, x, y})
                .atomic()
                .vectorize(term)
                .vectorize(xi)
                .vectorize(yi);
    }
    void apply() {
        copy_rows(), transpose_keys(), decays(), states();
        const int C = sizes.chunk, wide = std::min(sizes.value, 4 * vec);
        const LoopLevel outputs(f.result, g), of_chunk(f.result, in), contributions(f.state, chunk);

        f.result.update(0).split(e, eo, ei, wide).reorder(ei, row, eo, g, in, h, b).vectorize(ei, vec).unroll(ei);
        product(f.scores, outputs, f.over_key_feature, j, C, i, C);
        product(f.inter, outputs, f.over_state, e, sizes.value, i, C);
        product(f.intra, outputs, f.over_key, e, sizes.value, i, C);
        weights.compute_at(outputs).bound_extent(weights.args()[0], C).bound_extent(weights.args()[1], C);
        weights.vectorize(weights.args()[0], vec);
        interleave(state, of_chunk);

        f.state.update(1).split(e, eo, ei, wide).reorder(ei, d, eo, chunk, h, b).vectorize(ei, vec).unroll(ei);
        product(f.contribution, contributions, f.over_token, e, sizes.value, d, sizes.key);
        for (Func part : f.keys_read) {
            Func keys = part.in(f.contribution);
            const Var feature = keys.args()[0], key = keys.args()[1];
            part.compute_at(contributions).vectorize(part.args()[0], vec);
            keys.compute_at(contributions).reorder_storage(key, feature);
            transpose(keys, feature, key);
        }
        // Halide 21 finds tiles where rows lie at constant distances from the start of a Func: in copies for one chunk.
        Func of_outputs = v.in(f.intra), of_contributions = v.in(f.contribution);
        of_outputs.compute_at(of_chunk), of_contributions.compute_at(contributions);
        for (Func values : {of_outputs, of_contributions}) {
            const std::vector<Var> args = values.args();
            values.bound_extent(args[0], 2).bound_extent(args[1], sizes.value).vectorize(args[0]).vectorize(args[1], vec);
        }
    }
};

bool products_of_bf16(const Target &t, const ChunkwiseSizes &s) {
    return t.arch == Target::X86 && !t.has_gpu_feature() && t.has_feature(Target::AVX512_Zen4) && s.operands == Dtype::bf16;
}

bool matches_dot(const Target &t, const ChunkwiseSizes &s) {
    const int wide = Dot::columns * vec;
    return products_of_bf16(t, s) && s.key > 0 && s.key % Dot::rows == 0 && s.value > 0 && s.value % wide == 0 &&
           s.chunk % wide == 0 && s.causal_tile % 2 == 0;
}
bool matches_amx(const Target &t, const ChunkwiseSizes &s) {
    return products_of_bf16(t, s) && t.has_feature(Target::AVX512_SapphireRapids) && s.key > 0 && s.key % Amx::terms == 0 &&
           s.value > 0 && (s.value == 32 || s.value % 64 == 0) && s.chunk % Amx::terms == 0 && s.causal_tile == s.chunk;
}

void apply_dot(ChunkwiseFuncs &f, const ChunkwiseSizes &sizes, const Target &) { Dot(f, sizes).apply(); }
void apply_amx(ChunkwiseFuncs &f, const ChunkwiseSizes &sizes, const Target &) { Amx(f, sizes).apply(); }

const bool added = Schedule<ChunkwiseFuncs, ChunkwiseSizes>::add({"x86_bf16", 20, matches_dot, apply_dot}) &&
                   Schedule<ChunkwiseFuncs, ChunkwiseSizes>::add({"x86_amx", 30, matches_amx, apply_amx});
}  // namespace
