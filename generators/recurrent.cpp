// The stages of recurrent.h.
#include "recurrent.h"

#include "decay.h"

using namespace Halide;

namespace holdfast {

RecurrentFuncs recurrent(const Func &q, const Func &k, const Func &v, const Func &log_decay, const Expr &key_extent,
                         const Expr &scale) {
    Var b("b"), h("h"), g("g"), d("d"), e("e");
    RecurrentFuncs f;
    f.q = q, f.k = k, f.v = v, f.log_decay = log_decay;

    f.decay = Func("decay");
    f.decay(h, b) = two_part_exp(max(log_decay(h, b), least_log_decay));

    f.over_key_feature = RDom(0, key_extent, "over_key_feature");
    RVar row = f.over_key_feature;
    f.state_and_sum = Func("state_and_sum");
    f.state_and_sum(e, d, h, b) = Tuple(undef<float>(), undef<float>());  // what the buffers hold
    Expr before = f.state_and_sum(e, row, h, b)[0];
    Expr sum = select(likely(row > 0), f.state_and_sum(e, max(row - 1, 0), h, b)[1], 0.0f);
    Expr after = decayed(f.decay(h, b), before, k(row, h, b) * v(e, h, b));
    f.state_and_sum(e, row, h, b) = Tuple(after, sum + scale * q(row, 0, h, b) * after);
    f.out = Func("out_of_state");
    f.over_state = RDom(0, key_extent, "over_state");
    f.over_state.where(g > 0);
    f.others = Func("others");
    f.others(e, g, h, b) += scale * q(f.over_state, g, h, b) * f.state_and_sum(e, f.over_state, h, b)[0];
    f.out(e, g, h, b) = select(g > 0, f.others(e, g, h, b), f.state_and_sum(e, key_extent - 1, h, b)[1]);
    return f;
}

}  // namespace holdfast
