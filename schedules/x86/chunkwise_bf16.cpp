// x86 with products of bf16, whose operands are rounded (ChunkwiseSizes::operands): AVX-512 BF16, in registers, and AMX, in tile
// registers. Sums are fp32. Not parallel, and called for a few chunks at a time: chunkwise.cpp.
//
// AVX-512 BF16: the loop of a product is 16 vdpbf16ps with 10 loads. Intel starts one every second cycle (Emerald Rapids), half
// the terms of fp32's multiply-adds, so only other processors choose it (fast_bf16_dot in runtime/src/cpu_features.cpp). Zen 4
// starts one a cycle. There it is 1.31 times as fast as fp32 at K = V = 64 and 1.28 times at 128, on two threads 1.34 and 1.30
// (retention_bench, T 4096 of 8 heads); and 1.24 and 1.22 times as fast as bf16 rows with fp32 products. Keys in two parts leave
// 1.46 by count: at 64 a token is 472 cycles of vdpbf16ps in place of 688 of fp32's multiply-adds.
//
// From cache at 64, 0.194 us a token, 66% of it in those loops, at the peak: 35% contributions, 18% inter, 8% scores, 5% intra.
// Weights 6%, out 5%, keys in two parts 4%, gates 4%, transposing keys, rounding the state, and adding to it 3% each, copies 3%.
// Chunks of 16 or 64 gain nothing by count. Before roundings took one instruction, rows were asked for ahead and keys were
// transposed in registers: 0.218 us, and 0.27 from memory, 0.21 now.
//
// AMX: not measured. docs/testing-without-hardware.md has what the machine code lets expect, and where its time goes.
#include "../schedule.h"
#include "chunkwise.h"
#include "pairs.h"

namespace {
using namespace Halide;
using namespace holdfast;

// A product accumulates in registers, for the tile that its consumer works on.
struct Dot : x86::ChunkwiseLoops {
    using ChunkwiseLoops::ChunkwiseLoops;

    void product(Func p, const LoopLevel &at, const RDom &over, Var x, int x_extent, Var y, int y_extent, bool asks) override {
        p.compute_at(at).bound_extent(x, x_extent).bound_extent(y, y_extent).vectorize(x, vec).unroll(x).unroll(y);
        for (int n = 0; n < p.num_update_definitions(); n++) {
            RVar pair("pair"), two("two"), outer(x86::ask_ahead), inner("inner");
            p.update(n).split(over.x, pair, two, 2).reorder(two, x, y, pair).vectorize(x, vec).unroll(x).unroll(y);
            p.update(n).atomic().vectorize(two);
            if (const int pairs = asks && n == 0 ? terms_per_line(over) / 2 : 0)
                p.update(n).split(pair, outer, inner, pairs).unroll(inner);
        }
    }
    void apply() {
        using x86::as_bf16, x86::in_pairs, x86::interleave, x86::pairs_of, x86::replace_calls, x86::round_in_hardware;
        const LoopLevel of_result(f.result, in), of_state(f.state, chunk);
        for (const std::vector<Func> &parts : {f.weights_read, f.state_read, f.keys_read})
            for (const Func &part : parts) round_in_hardware(part);
        replace_calls(f.result, f.out_stored, [&](auto at) { return x86::rounded(f.out(at)); });
        Func contribution = x86::sum_of_parts(f.contribution, f.keys_read, f.state);
        x86::cut_at_pairs(f.intra, f.over_key.x);

        // What products read of the inputs, bf16 as they are stored; and of others, rounded.
        Func queries = as_bf16(f.q_stored), v = pairs_of(as_bf16(f.v_stored), 1), state = pairs_of(f.state_read[0], 1);
        for (Func user : {f.scores, f.inter}) replace_calls(user, f.q, [&](auto at) { return cast<float>(queries(at)); });
        for (Func user : {f.intra, contribution})
            replace_calls(user, f.v, [&](auto at) { return cast<float>(in_pairs(v, 1, at)); });
        replace_calls(f.inter, f.state_read[0], [&](auto at) { return in_pairs(state, 1, at); });
        std::vector<Func> keys;
        for (const Func &part : f.keys_read) {
            keys.push_back(pairs_of(part, 1));
            replace_calls(contribution, part, [&](auto at) { return in_pairs(keys.back(), 1, at); });
        }

        outputs(f.weights_read[0]);
        states(contribution);
        decays();

        // Rows of the caller's tensors by the chunk: chunkwise.cpp.
        Func values = v.in(f.intra), added = v.in(contribution);
        queries.compute_at(f.result, g).vectorize(d, 2 * vec).unroll(d);
        for (Func pairs : {values, state}) interleave(pairs, of_result, 2 * vec);
        for (Func pairs : {added, keys[0], keys[1]}) interleave(pairs, of_state, 2 * vec);
        queries.rename(queries.args()[1], Var(x86::rows_ahead));
        for (Func pairs : {added, keys[0], keys[1]}) pairs.rename(pairs.args()[2], Var(x86::rows_ahead));
        keys[0].compute_with(keys[1], Var(x86::rows_ahead));  // the second part reads the first
        x86::PairColumns columns(f.k_stored, vec);            // scores read keys along j
        replace_calls(f.scores, f.k, [&](auto at) { return cast<float>(columns(at)); });
        columns.compute_at(of_result);
    }
};

// A product accumulates in a tile register, 16 x 16 sums of 32 terms an instruction, and is stored in whole: a tile's numbers
// reach vectors through memory alone. Halide 21 keeps one tile of sums at a time, two loads of operands for each instruction.
struct Amx : x86::ChunkwiseLoops {
    static constexpr int rows = 16, columns = 16, terms = 32;

    using ChunkwiseLoops::ChunkwiseLoops;

    void product(Func p, const LoopLevel &at, const RDom &over, Var x, int x_extent, Var y, int y_extent,
                 bool = false) override {
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
    // Columns of `f` become its rows, four of them at a time: as many stores as a row is long become shuffles in registers.
    void transpose(Func f, const Var &column, const Var &row) {
        f.split(column, doo, di, 4).reorder(di, row, doo).vectorize(di).unroll(row);
    }
    void apply() {
        using x86::as_bf16, x86::in_pairs, x86::interleave, x86::pairs_of, x86::replace_calls;
        const int C = sizes.chunk, wide = std::min(sizes.value, 4 * vec);
        const LoopLevel outputs(f.result, g), of_chunk(f.result, in), contributions(f.state, chunk);
        Func contribution = x86::sum_of_parts(f.contribution, f.keys_read, f.state), weights = f.weights_read[0];
        // What products read, as in Dot: (d,i,...), (two,j,pair of d,...), (two,e,pair of j,...), (two,e,pair of d,...).
        Func q = as_bf16(f.q_stored), k = pairs_of(as_bf16(f.k_stored), 0), v = pairs_of(as_bf16(f.v_stored), 1),
             state = pairs_of(f.state_read[0], 1);
        for (Func user : {f.scores, f.inter}) replace_calls(user, f.q, [&](auto at) { return cast<float>(q(at)); });
        replace_calls(f.scores, f.k, [&](auto at) { return cast<float>(in_pairs(k, 0, at)); });
        for (Func user : {f.intra, contribution})
            replace_calls(user, f.v, [&](auto at) { return cast<float>(in_pairs(v, 1, at)); });
        replace_calls(f.inter, f.state_read[0], [&](auto at) { return in_pairs(state, 1, at); });

        // Rows of the caller's tensors, all those of a call at once. Pairs of features of keys become columns: once per chunk.
        Func keys_read = f.k_stored.in();
        for (Func rows : {q, keys_read}) rows.compute_root().vectorize(rows.args()[0], 2 * vec);
        interleave(v, LoopLevel::root(), vec);
        const std::vector<Var> args = k.args();
        k.compute_at(of_chunk).bound_extent(args[0], 2).vectorize(args[0]);
        k.split(args[2], doo, di, 4).reorder(args[0], di, args[1], doo).vectorize(di).unroll(args[1]);
        decays();
        f.row_decay.compute_at(of_chunk).vectorize(i, vec);

        f.result.update(0).split(e, eo, ei, wide).reorder(ei, row, eo, g, in, h, b).vectorize(ei, vec).unroll(ei);
        product(f.scores, outputs, f.over_key_feature, j, C, i, C);
        product(f.inter, outputs, f.over_state, e, sizes.value, i, C);
        product(f.intra, outputs, f.over_key, e, sizes.value, i, C);
        weights.compute_at(outputs).bound_extent(weights.args()[0], C).bound_extent(weights.args()[1], C);
        weights.vectorize(weights.args()[0], vec);
        interleave(state, of_chunk, vec);

        f.state_out.vectorize(e, vec, TailStrategy::GuardWithIf);
        f.state.compute_root();
        f.state.update(0).vectorize(e, vec);
        f.keys_decayed.compute_at(contributions).vectorize(d, vec);
        f.state.update(1).split(e, eo, ei, wide).reorder(ei, d, eo, chunk, h, b).vectorize(ei, vec).unroll(ei);
        product(contribution, contributions, f.over_token, e, sizes.value, d, sizes.key);
        for (Func part : f.keys_read) {
            Func keys = part.in(contribution);
            const Var feature = keys.args()[0], key = keys.args()[1];
            part.compute_at(contributions).vectorize(part.args()[0], vec);
            keys.compute_at(contributions).reorder_storage(key, feature);
            transpose(keys, feature, key);
        }
        // Halide 21 finds tiles where rows lie at constant distances from the start of a Func: in copies for one chunk.
        Func of_outputs = v.in(f.intra), of_contributions = v.in(contribution);
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
    const int wide = avx512_tile.columns * 16;
    return products_of_bf16(t, s) && s.key > 0 && s.key % wide == 0 && s.value > 0 && s.value % wide == 0 &&
           s.chunk % wide == 0 && s.causal_tile % 2 == 0;
}
bool matches_amx(const Target &t, const ChunkwiseSizes &s) {
    return products_of_bf16(t, s) && t.has_feature(Target::AVX512_SapphireRapids) && s.key > 0 && s.key % Amx::terms == 0 &&
           s.value > 0 && (s.value == 32 || s.value % 64 == 0) && s.chunk % Amx::terms == 0 && s.causal_tile == s.chunk;
}

void apply_dot(ChunkwiseFuncs &f, const ChunkwiseSizes &sizes, const Target &target) { Dot(f, sizes, target).apply(); }
void apply_amx(ChunkwiseFuncs &f, const ChunkwiseSizes &sizes, const Target &target) { Amx(f, sizes, target).apply(); }

const bool added = Schedule<ChunkwiseFuncs, ChunkwiseSizes>::add({"x86_bf16", 20, matches_dot, apply_dot}) &&
                   Schedule<ChunkwiseFuncs, ChunkwiseSizes>::add({"x86_amx", 30, matches_amx, apply_amx});
}  // namespace
