// The stages of parallel.h.
#include "parallel.h"

#include "decay.h"

using namespace Halide;

namespace holdfast {
namespace {

static const Var b("b"), h("h"), g("g"), c("c"), n("n"), i("i"), j("j"), d("d"), e("e"), s("s"), u("u");

/// x^p.
Expr power(const Expr &x, const Expr &degree) {
    Expr square = x * x;
    return select(degree == 1, x, degree == 2, square, degree == 3, square * x, square * square);
}

/// Log decay of the `distance` blocks before block `at`, as steps and rest, from what it is for one less. Below least_log_decay
/// it stays there. The rest is kept below a step: thousands of them would lose what they are there for.
Tuple decay_before(const Tuple &nearer, const Expr &block_steps, const Expr &block_rest) {
    const int least = (int)(least_log_decay / decay_step);
    Expr rest = nearer[1] + block_rest;
    Expr carry = cast<int32_t>(round(rest / decay_step));
    return {max(nearer[0] + block_steps + carry, least), rest - cast<float>(carry) * decay_step};
}

ParallelWeights weights(const ParallelFuncs &f, const ParallelCall &call, const ParallelSizes &sizes,
                        const std::string &suffix) {
    const int C = sizes.block;
    const Expr blocks = (call.tokens + C - 1) / C, sums = select(call.normalized != 0, 1, 0);
    auto name = [&](const char *stage) { return stage + suffix; };
    ParallelWeights w;

    w.over_distance = RDom(1, blocks, name("over_distance"));
    RVar distance = w.over_distance;
    w.decay_before = Func(name("decay_before"));
    w.decay_before(s, c, h, b) = Tuple(0, 0.0f);
    const Expr block = clamp(c - distance, 0, max(blocks - 1, 0));
    w.decay_before(distance, c, h, b) = decay_before(w.decay_before(distance - 1, c, h, b), f.decay_steps(C - 1, block, h, b),
                                                     f.decay_rest(C - 1, block, h, b));
    w.row_decay = Func(name("row_decay"));
    w.row_decay(i, c, h, b) = decay_of(f.decay_steps(i, c, h, b), f.decay_rest(i, c, h, b));
    w.initial_decay = Func(name("initial_decay"));
    Tuple all = w.decay_before(c, c, h, b);
    w.initial_decay(c, h, b) = decay_of(all[0], all[1]);
    w.key_decay = Func(name("key_decay"));
    Tuple between = w.decay_before(max(c - n - 1, 0), c, h, b);
    w.key_decay(j, n, c, h, b) = decay_of(between[0] + f.decay_steps(C - 1, n, h, b) - f.decay_steps(j, n, h, b),
                                          between[1] + f.decay_rest(C - 1, n, h, b) - f.decay_rest(j, n, h, b));
    // Masked before exp, which could overflow above the diagonal, and after.
    w.mask = Func(name("mask"));
    Expr steps = select(j <= i, f.decay_steps(i, c, h, b) - f.decay_steps(j, c, h, b), 0);
    Expr rest = f.decay_rest(i, c, h, b) - f.decay_rest(j, c, h, b);
    w.mask(i, j, c, h, b) = select(j <= i, decay_of(steps, rest), 0.0f);

    // 2^-floor(log2 max_d |q|), from the exponent's bits: exact, and divided out again in full. Zeros, infinities and NaN get
    // what fp32 has at its ends.
    w.over_size = RDom(0, call.key_extent, "over_size");
    Func size(name("size"));
    size(i, c, g, h, b) = 0.0f;
    size(i, c, g, h, b) = max(size(i, c, g, h, b), abs(f.q(w.over_size, i, c, g, h, b)));
    w.unit = Func(name("unit"));
    Expr exponent = (reinterpret<int32_t>(size(i, c, g, h, b)) >> 23) & 255;
    w.unit(i, c, g, h, b) = reinterpret<float>(clamp(254 - exponent, 1, 254) << 23);
    w.queries = Func(name("queries"));
    w.queries(d, i, c, g, h, b) = f.q(d, i, c, g, h, b) * w.unit(i, c, g, h, b);
    w.phi = Func(name("phi"));
    w.phi(i, j, u, c, g, h, b) = f.phi.product(u * C + j, [&](int factor, const Expr &element) {
        const Expr x = w.queries(min(element, call.key_extent - 1), i, c, g, h, b);
        return factor ? select(factor < call.degree, x, 1.0f) : x;
    });

    auto queries = [&](const Expr &d) { return w.queries(d, i, c, g, h, b); };
    const ParallelPair past = parallel_pair(
        {n, c, g, h, b}, queries, [&](const Expr &d) { return f.k(d, j, n, h, b); }, w.key_decay(j, n, c, h, b), call, sizes,
        "past", suffix);
    w.past_scores = past.scores, w.past = past.weights, w.past_block_sum = past.sum;
    w.over_past_key_feature = past.over_key_feature, w.over_summed_key = past.over_summed_key;
    const ParallelPair own = parallel_pair(
        {c, g, h, b}, queries, [&](const Expr &d) { return f.k(d, j, c, h, b); }, w.mask(i, j, c, h, b), call, sizes, "own",
        suffix);
    w.own_scores = own.scores, w.own = own.weights, w.own_sum = own.sum;
    w.over_own_key_feature = own.over_key_feature, w.over_summed_own_key = own.over_summed_key;

    w.over_summed_feature = RDom(0, C, 0, sums, name("over_summed_feature"));
    w.initial_block_sum = Func(name("initial_block_sum"));
    w.initial_block_sum(i, u, c, g, h, b) +=
        w.phi(i, w.over_summed_feature.x, u, c, g, h, b) * f.keys_in(u * C + w.over_summed_feature.x, h, b);
    w.over_past_block = RDom(0, blocks, name("over_past_block"));
    w.over_past_block.where(w.over_past_block < opaque(c));
    w.over_initial_block = RDom(0, (call.features + C - 1) / C, 0, call.states_in, name("over_initial_block"));
    w.past_sum = Func(name("past_sum"));
    w.past_sum(i, c, g, h, b) += w.initial_decay(c, h, b) * w.initial_block_sum(i, w.over_initial_block.x, c, g, h, b);
    w.past_sum(i, c, g, h, b) += w.past_block_sum(i, w.over_past_block, c, g, h, b);
    Expr sum = w.row_decay(i, c, h, b) * w.past_sum(i, c, g, h, b) + w.own_sum(i, c, g, h, b);
    w.factor = Func(name("factor"));
    w.factor(i, c, g, h, b) = select(call.normalized != 0, 1.0f / sum, scale_of_row(w, call));
    return w;
}

}  // namespace

ParallelPair parallel_pair(const std::vector<Var> &blocks, const ParallelOperand &query, const ParallelOperand &key,
                           const Expr &decay, const ParallelCall &call, const ParallelSizes &sizes, const std::string &prefix,
                           const std::string &suffix) {
    auto name = [&](const char *stage) { return prefix + stage + suffix; };
    auto at = [&](std::vector<Expr> args) {
        args.insert(args.end(), blocks.begin(), blocks.end());
        return args;
    };
    ParallelPair p;
    p.over_key_feature = RDom(0, call.key_extent, "over_" + name("_key_feature"));
    p.scores = Func(name("_scores"));
    p.scores(at({i, j})) += query(p.over_key_feature) * key(p.over_key_feature);
    p.weights = Func(name("_weights"));
    p.weights(at({i, j})) = power(p.scores(at({i, j})), call.degree) * decay;
    p.over_summed_key = RDom(0, sizes.block, 0, select(call.normalized != 0, 1, 0), "over_" + name("_summed_key"));
    p.sum = Func(name("_block_sum"));
    p.sum(at({i})) += p.weights(at({i, p.over_summed_key.x}));
    return p;
}

Expr decay_of_key(const ParallelWeights &w) {
    return select(n < c, w.row_decay(i, c, h, b) * w.key_decay(j, n, c, h, b), w.mask(i, j, c, h, b));
}

Expr scale_of_row(const ParallelWeights &w, const ParallelCall &call) {
    return power(call.scale / w.unit(i, c, g, h, b), call.degree);
}

ParallelFuncs parallel(const Func &q, const Func &k, const Func &v, const Func &log_decay, const Func &state_in,
                       const Func &keys_in, const ParallelCall &call, const ParallelSizes &sizes) {
    const int C = sizes.block;
    const Expr blocks = (call.tokens + C - 1) / C;
    ParallelFuncs f;
    f.q = q, f.k = k, f.v = v, f.log_decay = log_decay;

    // Gates inside a block, summed as in chunkwise.cpp.
    f.over_row = RDom(0, C, "over_row");
    f.decay_steps = Func("decay_steps");
    f.decay_steps(i, n, h, b) += select(f.over_row <= i, decay_steps_of(log_decay(f.over_row, n, h, b)), 0);
    f.decay_rest = Func("decay_rest");
    f.decay_rest(i, n, h, b) += select(f.over_row <= i, decay_rest_of(log_decay(f.over_row, n, h, b)), 0.0f);

    f.over_initial = RDom(0, call.states_in, "over_initial");
    f.state_in = Func("state_given");
    f.state_in(e, d, h, b) += state_in(e, d, f.over_initial, h, b);
    f.keys_in = Func("keys_given");
    f.keys_in(d, h, b) += keys_in(d, f.over_initial, h, b);
    f.phi = expansion(call.key_extent, call.features, 0, call.degree);

    f.weights = weights(f, call, sizes, "");
    const ParallelWeights &w = f.weights;
    f.over_past_key = RDom(0, C, "over_past_key");
    f.over_feature = RDom(0, C, "over_feature");
    f.initial_block = Func("initial_block");
    f.initial_block(e, i, u, c, g, h, b) +=
        w.phi(i, f.over_feature, u, c, g, h, b) * f.state_in(e, u * C + f.over_feature, h, b);
    f.past_block = Func("past_block");
    f.past_block(e, i, n, c, g, h, b) += w.past(i, f.over_past_key, n, c, g, h, b) * v(e, f.over_past_key, n, h, b);
    f.past = Func("past");
    f.past(e, i, c, g, h, b) += w.initial_decay(c, h, b) * f.initial_block(e, i, w.over_initial_block.x, c, g, h, b);
    f.past(e, i, c, g, h, b) += f.past_block(e, i, w.over_past_block, c, g, h, b);
    f.over_own_key = RDom(0, C, "over_own_key");
    if (sizes.causal_tile < C) f.over_own_key.where(f.over_own_key < (i / sizes.causal_tile + 1) * sizes.causal_tile);
    f.own = Func("own");
    f.own(e, i, c, g, h, b) += w.own(i, f.over_own_key, c, g, h, b) * v(e, f.over_own_key, c, h, b);
    f.out = Func("out");
    Expr before = w.row_decay(i, c, h, b) * f.past(e, i, c, g, h, b);
    f.out(e, i, c, g, h, b) = (before + f.own(e, i, c, g, h, b)) * w.factor(i, c, g, h, b);

    f.shown = weights(f, call, sizes, "_shown");
    f.over_shown_key_feature = RDom(0, call.key_extent, "over_shown_key_feature");
    f.shown_scores = Func("shown_scores");
    f.shown_scores(i, j, n, c, g, h, b) +=
        f.shown.queries(f.over_shown_key_feature, i, c, g, h, b) * k(f.over_shown_key_feature, j, n, h, b);
    f.weights_shown = Func("weights_shown");
    f.weights_shown(i, j, n, c, g, h, b) =
        power(f.shown_scores(i, j, n, c, g, h, b), call.degree) * decay_of_key(f.shown) * f.shown.factor(i, c, g, h, b);

    // The final state: keys as a row after the last one would see them.
    f.over_end_distance = RDom(1, blocks, "over_end_distance");
    RVar distance = f.over_end_distance;
    f.end_decay_before = Func("end_decay_before");
    f.end_decay_before(s, h, b) = Tuple(0, 0.0f);
    f.end_decay_before(distance, h, b) =
        decay_before(f.end_decay_before(distance - 1, h, b), f.decay_steps(C - 1, blocks - distance, h, b),
                     f.decay_rest(C - 1, blocks - distance, h, b));
    f.end_decay = Func("end_decay");
    Tuple all = f.end_decay_before(blocks, h, b);
    f.end_decay(h, b) = two_part_decay_of(all[0], all[1]);
    f.end_key_decay = Func("end_key_decay");
    Tuple between = f.end_decay_before(blocks - n - 1, h, b);
    Expr kept = decay_of(between[0] + f.decay_steps(C - 1, n, h, b) - f.decay_steps(j, n, h, b),
                         between[1] + f.decay_rest(C - 1, n, h, b) - f.decay_rest(j, n, h, b));
    f.end_key_decay(j, n, h, b) = select(n * C + j < call.tokens, kept, 0.0f);
    f.keys_decayed = Func("keys_decayed");
    f.keys_decayed(d, j, n, h, b) = k(d, j, n, h, b) * f.end_key_decay(j, n, h, b);
    f.over_token = RDom(0, C, "over_token");
    f.contribution_block = Func("contribution_block");
    f.contribution_block(e, d, n, h, b) += f.keys_decayed(d, f.over_token, n, h, b) * v(e, f.over_token, n, h, b);
    f.over_block = RDom(0, blocks, "over_block");
    f.contribution = Func("contribution");
    f.contribution(e, d, h, b) += f.contribution_block(e, d, f.over_block, h, b);
    Tuple decay = f.end_decay(h, b);
    f.state = Func("state");
    f.state(e, d, h, b) = decayed(decay, f.state_in(e, d, h, b), f.contribution(e, d, h, b));
    f.over_keys_token = RDom(0, C, "over_keys_token");
    f.keys_block = Func("keys_block");
    f.keys_block(d, n, h, b) += f.keys_decayed(d, f.over_keys_token, n, h, b);
    f.over_keys_block = RDom(0, blocks, "over_keys_block");
    f.keys_contribution = Func("keys_contribution");
    f.keys_contribution(d, h, b) += f.keys_block(d, f.over_keys_block, h, b);
    f.keys = Func("keys");
    f.keys(d, h, b) = decayed(decay, f.keys_in(d, h, b), f.keys_contribution(d, h, b));
    return f;
}

}  // namespace holdfast
