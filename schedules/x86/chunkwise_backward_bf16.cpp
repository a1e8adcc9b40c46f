// x86 with products of bf16, whose operands are rounded (ChunkwiseSizes::operands): AVX-512 BF16, in registers; as in
// chunkwise_bf16.cpp, which says for whom. Not parallel, and called for a few chunks at a time: chunkwise_backward.cpp.
//
// What is added to states and to their gradients is of fp32: two of the five products with states. The other three, and the five
// inside chunks, are loops of 16 vdpbf16ps with 10 loads, scores with 17. By count all products take 0.65 of fp32's time.
//
// AMD EPYC (Zen 4), one core, in turn with fp32 products of the same rows of bf16; calls of 8 chunks at K = V = 64, 4 at 128. From
// cache (one head of a call): 0.50 us a token at 64, 1.28 times as fast; 1.56 us at 128, 1.30 times. With rows from L3 (T 512 of 8
// heads): 0.52 us, 1.28 times; 1.71 us, 1.28 times, 1.38 times as fast as the kernel for any size. Calls of 2 and 4 chunks: the
// same. The whole call, T 4096 of 8 heads, with the forward's kernel for states: 1.19 times as fast on one thread and 1.21 times
// on two at 64 (24.8 and 12.3 ms), 1.29 and 1.30 times at 128, there beside the kernel for any size (74.4 and 37.3 ms).
//
// From cache at 64, 58% of the time in products, at the peak but for scores, at three quarters of it: 25% those of fp32, 20% the
// three others with states, 13% inside chunks. Rounding and pairs 7%, pairs as columns 6%, gates 6%, rows in 3% and widened 3%,
// the mask's exp 2%, memory for stages 2%. Chunks of 64 gain nothing by count: products inside them grow by more than what is
// done for each element of a state falls.
#include "../schedule.h"
#include "chunkwise_backward.h"
#include "pairs.h"

namespace {
using namespace Halide;
using namespace holdfast;

struct Dot : x86::ChunkwiseBackwardLoops {
    using ChunkwiseBackwardLoops::ChunkwiseBackwardLoops;

    void sum(Func p, int u, const Var &x, const Var &y) const override {
        const std::vector<RVar> over = p.rvars(u);
        if (over.empty()) return ChunkwiseBackwardLoops::sum(p, u, x, y);
        RVar pair("pair"), two("two");
        std::vector<VarOrRVar> order = {two, x, y, pair};
        order.insert(order.end(), over.begin() + 1, over.end());
        p.update(u).split(over[0], pair, two, 2).reorder(order).vectorize(x, vec).unroll(x).unroll(y).atomic().vectorize(two);
    }
    void apply() const {
        using x86::as_bf16, x86::in_pairs, x86::interleave, x86::pairs_of, x86::replace_calls;
        const LoopLevel root = LoopLevel::root();
        Func weights_read = r.weights_read[0], dscores_read = r.dscores_read[0], state_read = r.state_read[0],
             dstate_read = r.dstate_read[0];
        for (Func part : {weights_read, dscores_read, state_read, dstate_read}) x86::round_in_hardware(part);
        replace_calls(r.result_dq, r.dq_stored, [&](auto at) { return x86::rounded(r.dq(at)); });
        replace_calls(r.result_dk, r.dk_stored, [&](auto at) { return x86::rounded(r.dk(at)); });
        replace_calls(r.result_dv, r.dv_stored, [&](auto at) { return x86::rounded(r.dv(at)); });
        for (Func sum : {r.dq, r.dk, r.dv})
            for (int u = 0; u < sum.num_update_definitions(); u++)
                if (!sum.rvars(u).empty()) x86::cut_at_pairs(sum, sum.rvars(u)[0]);

        // What products read: rows as they are stored, (d,i,...), for the factor that is the same for all columns; rows of pairs,
        // (two,d,pair of i,...), and where it is the other axis that is summed over, columns of pairs.
        const Func q = as_bf16(r.q_stored), k = as_bf16(r.k_stored), v = as_bf16(r.v_stored), dout = as_bf16(r.dout_stored);
        Func q_pairs = pairs_of(q, 1), k_pairs = pairs_of(k, 1), dout_pairs = pairs_of(dout, 1),
             weights = pairs_of(weights_read, 1), dscores = pairs_of(dscores_read, 1), dstate = pairs_of(dstate_read, 1);
        x86::PairColumns k_columns(r.k_stored, vec), v_columns(r.v_stored, vec), state_columns(state_read, vec),
            dstate_columns(dstate_read, vec);
        replace_calls(r.f.scores, r.f.q, [&](auto at) { return cast<float>(q(at)); });
        replace_calls(r.f.scores, r.f.k, [&](auto at) { return cast<float>(k_columns(at)); });
        replace_calls(r.dweights, r.dintra, [&](auto at) { return cast<float>(dout(at)); });
        replace_calls(r.dweights, r.f.v, [&](auto at) { return cast<float>(v_columns(at)); });
        replace_calls(r.dkeys_decayed, r.f.v, [&](auto at) { return cast<float>(v(at)); });
        replace_calls(r.dq, r.f.k, [&](auto at) { return cast<float>(in_pairs(k_pairs, 1, at)); });
        replace_calls(r.dq_from_state, r.dout_staged, [&](auto at) { return cast<float>(dout(at)); });
        replace_calls(r.dk, r.f.q, [&](auto at) { return cast<float>(in_pairs(q_pairs, 1, at)); });
        replace_calls(r.dk, dscores_read, [&](auto at) { return in_pairs(dscores, 1, at); });
        replace_calls(r.dv, r.dintra, [&](auto at) { return cast<float>(in_pairs(dout_pairs, 1, at)); });
        replace_calls(r.dv, weights_read, [&](auto at) { return in_pairs(weights, 1, at); });
        replace_calls(r.dv_from_state, r.f.k, [&](auto at) { return cast<float>(k(at)); });
        replace_calls(r.dv_from_state, dstate_read, [&](auto at) { return in_pairs(dstate, 1, at); });
        replace_calls(r.dq_from_state, state_read, [&](auto at) { return state_columns(at); });
        replace_calls(r.dkeys_decayed, dstate_read, [&](auto at) { return dstate_columns(at); });

        // Copies of the caller's rows: chunkwise_backward.cpp. In fp32 for sums that go into states.
        for (Func rows : {r.q_stored, r.k_stored, r.v_stored, r.dout_stored, dscores_read, state_read, dstate_read})
            rows.compute_root().vectorize(rows.args()[0], 2 * vec).unroll(rows.args()[0]);
        for (Func rows : {r.f.q, r.f.v, r.dinter, r.f.keys_decayed}) elementwise(rows).unroll(rows.args()[0]);
        for (Func pairs : {q_pairs, k_pairs, dout_pairs, dscores, dstate}) interleave(pairs, root, 2 * vec);
        for (x86::PairColumns *columns : {&k_columns, &v_columns, &state_columns, &dstate_columns}) columns->compute_at(root);
        scans(false);

        gradients_of_rows(2 * vec);
        const LoopLevel strip = gradient_of_values(2 * vec);
        const Var two = weights.args()[0], j = weights.args()[1], pair = weights.args()[2];
        weights.compute_at(strip)
            .bound_extent(two, 2)
            .bound_storage(pair, sizes.chunk / 2)
            .split(pair, yo, yi, score_rows / 2)
            .reorder(two, j, yi, yo)
            .vectorize(j, vec)
            .unroll(j)
            .unroll(two)
            .unroll(yi);
        tile(r.f.scores, {weights, yo}, score_columns, score_rows);

        gates();
        // States and their gradients both lie along e.
        const int columns = 4 * vec;
        r.state_product.compute_root().update().atomic().vectorize(r.over_value.x, sizes.value % columns ? wide : columns);
    }
};

void apply(ChunkwiseBackwardFuncs &r, const ChunkwiseSizes &sizes, const Target &target) { Dot(r, sizes, target).apply(); }

bool matches(const Target &t, const ChunkwiseSizes &s) {
    const int wide = avx512_tile.columns * 16;
    return t.arch == Target::X86 && !t.has_gpu_feature() && t.has_feature(Target::AVX512_Zen4) && s.operands == Dtype::bf16 &&
           s.key > 0 && s.key % wide == 0 && s.value > 0 && s.value % wide == 0 && s.chunk % wide == 0 &&
           s.causal_tile % 2 == 0;
}

const bool added = Schedule<ChunkwiseBackwardFuncs, ChunkwiseSizes>::add({"x86_bf16", 20, matches, apply});
}  // namespace
