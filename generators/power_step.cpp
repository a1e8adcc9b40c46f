// The stages of power_step.h.
#include "power_step.h"

#include "decay.h"

using namespace Halide;

namespace holdfast {

PowerStepFuncs power_step(const Func &q, const Func &k, const Func &v, const Func &log_decay, const Expr &key_extent,
                          const PowerStepOptions &options, const PowerStepSizes &sizes) {
    Var h("h"), g("g"), d("d"), f("f"), e("e"), w("w"), u("u");
    const Expr W = options.block, U = options.blocks;
    PowerStepFuncs p;
    p.q = q, p.k = k, p.v = v, p.log_decay = log_decay;
    const bool known = sizes.degree && sizes.key;
    p.phi = expansion(key_extent, known ? Expr(expanded_size(sizes.key, sizes.degree)) : W * U, sizes.degree, options.degree);
    p.decay = Func("decay");
    p.decay(h) = two_part_decay_of(log_decay(h));
    p.over_element = RDom(0, key_extent, "over_element");
    p.largest = Func("largest");
    p.largest(g, h) = 0.0f;
    p.largest(g, h) = max(p.largest(g, h), abs(q(p.over_element, g, h)));
    p.unit = Func("unit");
    p.unit(g, h) = unit_of(p.largest(g, h));
    p.queries = Func("queries");
    p.queries(d, g, h) = q(d, g, h) * p.unit(g, h);
    auto element = [&](const Func &x, const Expr &n, const std::vector<Expr> &others) {
        std::vector<Expr> at = others;
        at.insert(at.begin(), p.phi.open ? min(n, key_extent - 1) : n);
        return p.phi.open ? select(n < key_extent, x(at), 1.0f) : x(at);
    };
    p.phi_q = Func("phi_q");
    p.phi_q(f, g, h) = p.phi.product(f, [&](int, const Expr &n) { return element(p.queries, n, {g, h}); });
    p.phi_k = Func("phi_k");
    p.phi_k(f, h) = p.phi.product(f, [&](int, const Expr &n) { return element(k, n, {h}); });

    p.over_key_element = RDom(0, key_extent, "over_key_element");
    p.score = Func("score");
    p.score(g, h) += p.queries(p.over_key_element, g, h) * k(p.over_key_element, h);
    const Expr weight = p.phi.power(p.score(g, h), options.degree);

    // The state, and what queries read of it before. Of sums of two products the second is rounded, as in recurrent.cpp.
    p.state_and_sum = Func("state_and_sum");
    p.state_and_sum(e, w, g, u, h) = Tuple(undef<float>(), undef<float>());  // what the buffers hold
    auto read = [&](const RVar &row, const Expr &query) {
        Expr before = p.state_and_sum(e, row, query, u, h)[0];
        Expr sum = select(likely(row > 0), p.state_and_sum(e, max(row - 1, 0), query, u, h)[1], 0.0f);
        return Tuple(before, sum + p.phi_q(u * W + row, query, h) * before);
    };
    const Expr last = options.group - 1;
    p.over_others = RDom(0, W, 0, last, "over_others");
    p.state_and_sum(e, p.over_others.x, p.over_others.y, u, h) = read(p.over_others.x, p.over_others.y);
    p.over_feature = RDom(0, W, "over_feature");
    RVar row = p.over_feature;
    Tuple of_last = read(row, last);
    of_last[0] = decayed(p.decay(h), of_last[0], strict_float(p.phi_k(u * W + row, h) * v(e, h)));
    p.state_and_sum(e, row, last, u, h) = of_last;
    p.over_block = RDom(0, U, "over_block");
    p.num = Func("num");
    p.num(e, g, h) += p.state_and_sum(e, W - 1, g, p.over_block, h)[1];

    // The sum of keys.
    p.keys = Func("keys");
    p.keys(f, h) = Tuple(undef<float>(), undef<float>());
    Expr keys_before = p.keys(f, h)[0];
    p.keys(f, h) = Tuple(decayed(p.decay(h), keys_before, p.phi_k(f, h)), keys_before);
    p.over_feature_weight = RDom(0, W, "over_feature_weight");
    p.den_block = Func("den_block");
    p.den_block(g, u, h) += p.phi_q(u * W + p.over_feature_weight, g, h) * p.keys(u * W + p.over_feature_weight, h)[1];
    p.over_block_weight = RDom(0, U * options.normalize, "over_block_weight");
    p.den = Func("den");
    p.den(g, h) += p.den_block(g, p.over_block_weight, h);

    p.out = Func("out_of_state");
    p.out(e, g, h) = decayed(p.decay(h), p.num(e, g, h), strict_float(weight * v(e, h))) *
                     select(options.normalize != 0, 1.0f / decayed(p.decay(h), p.den(g, h), weight),
                            p.phi.power(options.scale / p.unit(g, h), options.degree));
    return p;
}

}  // namespace holdfast
