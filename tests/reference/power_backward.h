// Gradients of power retention in double, in plain loops: from all pairs of tokens, with phi for states alone. The closed form, by
// hand: it shares nothing with autodiff.
#pragma once
#include "power.h"

namespace reference {

/// Gradients of L = <out, dout> + <state, dstate> + <keys, dkeys>, row-major: of q [B, T, H G, K]; k and v, summed over the group,
/// [B, T, H, K] and [B, T, H, V]; log_decay [B, T, H]; the initial state [B, H, D, V] and sum of keys [B, H, D].
struct PowerGradients {
    std::vector<double> dq, dk, dv, dlog_decay, dstate, dkeys;
    // Of each element, as in power.h: the root of the sum of the squares of what its terms are sensitive to, and half of its size.
    std::vector<double> dq_spread, dk_spread, dv_spread, dlog_decay_spread, dstate_spread, dkeys_spread;
};

/// Layouts of dout, dstate and dkeys as those of out, state and keys. `out`, where it is given, is taken for what power(in) returns,
/// though it be rounded. `chunk` (0: T): that the gradient of a gate is a sum over so many tokens around it, q_i dq_i and k_j dk_j,
/// of which it is what is left, widens its spread.
PowerGradients power_backward(const PowerInputs &in, const Strided &dout, const Strided &dstate, const Strided &dkeys,
                              const Strided &out = {}, int64_t chunk = 0);

}  // namespace reference
