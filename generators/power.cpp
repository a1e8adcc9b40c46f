// The stages of power.h.
#include "power.h"

#include "decay.h"

using namespace Halide;
using Halide::Internal::can_prove, Halide::Internal::simplify;

namespace holdfast {

PowerFuncs power(const Func &q, const Func &k, const Func &v, const Func &log_decay, const Func &state_in, const Func &keys_in,
                 const Expr &key_extent, const Expr &features, const PowerOptions &options, const PowerSizes &sizes) {
    const int C = sizes.chunk;
    Var b("b"), h("h"), g("g"), i("i"), j("j"), d("d"), f("f"), e("e"), u("u");
    PowerFuncs p;
    p.q = q, p.k = k, p.v = v, p.log_decay = log_decay, p.state_in = state_in, p.keys_in = keys_in;
    p.phi = expansion(key_extent, features, sizes.degree, options.degree);
    auto raised = [&](const Expr &x) { return p.phi.power(x, options.degree); };

    // Gates, always as differences. A masked sum, as in chunkwise.cpp.
    p.over_row = RDom(0, C, "over_row");
    p.decay_steps = Func("decay_steps");
    p.decay_steps(i, h, b) += select(p.over_row <= i, decay_steps_of(log_decay(p.over_row, h, b)), 0);
    p.decay_rest = Func("decay_rest");
    p.decay_rest(i, h, b) += select(p.over_row <= i, decay_rest_of(log_decay(p.over_row, h, b)), 0.0f);
    auto steps_between = [&](const Expr &from, const Expr &to) {  // tokens from + 1 .. to
        return p.decay_steps(to, h, b) - p.decay_steps(from, h, b);
    };
    auto rest_between = [&](const Expr &from, const Expr &to) { return p.decay_rest(to, h, b) - p.decay_rest(from, h, b); };
    p.row_decay = Func("row_decay");
    p.row_decay(i, h, b) = decay_of(p.decay_steps(i, h, b), p.decay_rest(i, h, b));
    p.key_decay = Func("key_decay");
    p.key_decay(j, h, b) = decay_of(steps_between(j, C - 1), rest_between(j, C - 1));
    p.chunk_decay = Func("chunk_decay");
    p.chunk_decay(h, b) = two_part_decay_of(p.decay_steps(C - 1, h, b), p.decay_rest(C - 1, h, b));

    // Operands.
    p.over_element = RDom(0, key_extent, "over_element");
    p.largest = Func("largest");
    p.largest(i, g, h, b) = 0.0f;
    p.largest(i, g, h, b) = max(p.largest(i, g, h, b), abs(q(p.over_element, i, g, h, b)));
    p.unit = Func("unit");
    p.unit(i, g, h, b) = unit_of(p.largest(i, g, h, b));
    auto element = [&](const Expr &value) { return p.phi.open ? select(d < key_extent, value, 1.0f) : value; };
    const Expr read = p.phi.open ? min(d, key_extent - 1) : Expr(d);
    p.queries = Func("queries");
    p.queries(d, i, g, h, b) = element(q(read, i, g, h, b) * p.unit(i, g, h, b));
    p.queries_decayed = Func("queries_decayed");
    p.queries_decayed(d, i, g, h, b) = p.queries(d, i, g, h, b) * p.row_decay(i, h, b);
    p.keys = Func("keys");
    p.keys(d, j, h, b) = element(k(read, j, h, b));
    p.keys_decayed = Func("keys_decayed");
    p.keys_decayed(d, j, h, b) = p.keys(d, j, h, b) * p.key_decay(j, h, b);
    p.phi_q = Func("phi_q");
    p.phi_q(f, i, g, h, b) =
        p.phi.product(f, [&](int s, const Expr &n) { return s ? p.queries(n, i, g, h, b) : p.queries_decayed(n, i, g, h, b); });
    p.phi_k = Func("phi_k");
    p.phi_k(f, j, h, b) =
        p.phi.product(f, [&](int s, const Expr &n) { return s ? p.keys(n, j, h, b) : p.keys_decayed(n, j, h, b); });

    // Inside the chunk.
    p.over_key_element = RDom(0, key_extent, "over_key_element");
    p.scores = Func("scores");
    p.scores(j, i, g, h, b) += p.queries(p.over_key_element, i, g, h, b) * p.keys(p.over_key_element, j, h, b);
    p.weights = Func("weights");
    const Expr steps = select(j <= i, steps_between(j, i), 0);  // could overflow above the diagonal
    const Expr kept = decay_of(steps, rest_between(j, i));
    p.weights(j, i, g, h, b) = select(j <= i, raised(p.scores(j, i, g, h, b)) * kept, 0.0f);
    auto over_keys = [&](const char *name) {
        RDom over(0, C, name);
        if (sizes.causal_tile < C) over.where(over < (i / sizes.causal_tile + 1) * sizes.causal_tile);
        return over;
    };
    p.over_key = over_keys("over_key");
    p.num_intra = Func("num_intra");
    p.num_intra(e, i, g, h, b) += p.weights(p.over_key, i, g, h, b) * v(e, p.over_key, h, b);
    p.over_key_weight = over_keys("over_key_weight");
    p.den_intra = Func("den_intra");
    p.den_intra(i, g, h, b) += p.weights(p.over_key_weight, i, g, h, b);

    // From the state.
    const int block = sizes.block;
    p.num_inter = Func("num_inter");
    p.den_inter = Func("den_inter");
    if (block) {
        const Expr blocks = simplify((p.phi.features + block - 1) / block);
        const bool whole = can_prove(p.phi.features % block == 0);
        auto row_of = [&](const Expr &f) { return whole ? f : min(f, p.phi.features - 1); };  // past the last one phi is 0
        p.over_feature = RDom(0, block, "over_feature");
        p.num_block = Func("num_block");
        Expr feature = u * block + p.over_feature;
        p.num_block(e, u, i, g, h, b) += p.phi_q(feature, i, g, h, b) * state_in(e, row_of(feature), h, b);
        p.over_block = RDom(0, blocks, "over_block");
        p.num_inter(e, i, g, h, b) += p.num_block(e, p.over_block, i, g, h, b);
        p.over_feature_weight = RDom(0, block * options.normalize, "over_feature_weight");
        p.den_block = Func("den_block");
        feature = u * block + p.over_feature_weight;
        p.den_block(u, i, g, h, b) += p.phi_q(feature, i, g, h, b) * keys_in(row_of(feature), h, b);
        p.den_inter(i, g, h, b) += p.den_block(p.over_block, i, g, h, b);
    } else {
        p.over_feature = RDom(0, p.phi.features, "over_feature");
        p.num_inter(e, i, g, h, b) += p.phi_q(p.over_feature, i, g, h, b) * state_in(e, p.over_feature, h, b);
        p.over_feature_weight = RDom(0, p.phi.features * options.normalize, "over_feature_weight");
        p.den_inter(i, g, h, b) += p.phi_q(p.over_feature_weight, i, g, h, b) * keys_in(p.over_feature_weight, h, b);
    }
    p.row = Func("row");
    p.row(i, g, h, b) = select(options.normalize != 0, 1.0f / (p.den_inter(i, g, h, b) + p.den_intra(i, g, h, b)),
                               raised(options.scale / p.unit(i, g, h, b)));
    p.out = Func("out");
    p.out(e, i, g, h, b) = (p.num_inter(e, i, g, h, b) + p.num_intra(e, i, g, h, b)) * p.row(i, g, h, b);

    // Into the state.
    p.over_token = RDom(0, C, "over_token");
    p.contribution = Func("contribution");
    p.contribution(e, f, h, b) += p.phi_k(f, p.over_token, h, b) * v(e, p.over_token, h, b);
    p.state = Func("state");
    p.state(e, f, h, b) = decayed(p.chunk_decay(h, b), state_in(e, f, h, b), p.contribution(e, f, h, b));
    p.over_token_weight = RDom(0, C * options.normalize, "over_token_weight");
    p.keys_contribution = Func("keys_contribution");
    p.keys_contribution(f, h, b) += p.phi_k(f, p.over_token_weight, h, b);
    p.keys_sum = Func("keys_sum");
    p.keys_sum(f, h, b) = decayed(p.chunk_decay(h, b), keys_in(f, h, b), p.keys_contribution(f, h, b));
    return p;
}

}  // namespace holdfast
