// The stages of recurrent.h.
#include "recurrent.h"

#include "decay.h"

using namespace Halide;

namespace holdfast {

RecurrentFuncs recurrent(const Func &q, const Func &k, const Func &v, const Func &log_decay, const Expr &key_extent, int tokens,
                         const Expr &scale) {
    Var b("b"), h("h"), g("g"), n("n"), i("i"), d("d"), e("e");
    RecurrentFuncs f;
    f.q = q, f.k = k, f.v = v, f.log_decay = log_decay;

    f.decay = Func("decay");
    Tuple decay = two_part_decay_of(log_decay(i, n, h, b));
    if (tokens > 1) {
        decay = rounded_first(decay);
        const Expr below_1 = 1.0f - decay[0];  // by at most 0.3 where it has left out anything
        decay = Tuple(decay[0], decay[1] * (1.0f + below_1 + below_1 * below_1));  // divided by decay[0], to 3%
    }
    f.decay(i, n, h, b) = decay;
    RDom over_token(0, tokens, "over_token");
    f.left_out = Func("left_out");
    f.left_out(n, h, b) += f.decay(over_token, n, h, b)[1];

    f.over_key_feature = RDom(0, key_extent, "over_key_feature");
    RVar row = f.over_key_feature;
    f.state_and_sum = Func("state_and_sum");
    f.state_and_sum(e, i, d, n, h, b) = Tuple(undef<float>(), undef<float>());  // what the buffers hold
    Expr before = f.state_and_sum(e, i, row, n, h, b)[0], rounded = f.decay(i, n, h, b)[0];
    Expr sum = select(likely(row > 0), f.state_and_sum(e, i, max(row - 1, 0), n, h, b)[1], 0.0f);
    // The product that is rounded before the sum, by which a compiler would decide for each size anew: strips of columns have the
    // same bits.
    Expr added = strict_float(k(row, i, n, h, b) * v(e, i, n, h, b));
    Expr after = select(i == 0, decayed({rounded, rounded * f.left_out(n, h, b)}, before, added), rounded * before + added);
    f.state_and_sum(e, i, row, n, h, b) = Tuple(after, sum + q(row, i, n, 0, h, b) * after);
    f.out = Func("out_of_state");
    f.over_state = RDom(0, key_extent, "over_state");
    f.over_state.where(g > 0);
    f.others = Func("others");
    f.others(e, i, n, g, h, b) += q(f.over_state, i, n, g, h, b) * f.state_and_sum(e, i, f.over_state, n, h, b)[0];
    f.out(e, i, n, g, h, b) =
        scale * select(g > 0, f.others(e, i, n, g, h, b), f.state_and_sum(e, i, key_extent - 1, n, h, b)[1]);
    return f;
}

}  // namespace holdfast
