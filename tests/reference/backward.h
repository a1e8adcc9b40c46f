// Gradients of retention in double, in plain loops, token by token, by their closed forms: what every backward kernel of degree 1
// is compared with.
#pragma once
#include "retention.h"

namespace reference {

/// Of a loss for everything that retention() reads, row-major. Those of keys, values and decays are summed over a group.
struct Gradients {
    std::vector<double> q, k, v;        // [B, T, H, K], [B, T, Hk, K], [B, T, Hk, V]
    std::vector<double> log_decay;      // [B, T, Hk]
    std::vector<double> initial_state;  // [B, Hk, K, V]
};

/// From its gradients for out and for the final state, dout [B, T, H, V] and dstate [B, Hk, K, V]; without data: zero.
///
///   dS_t += scale q_t^T dout_t,   dq_t = scale S_t dout_t,   dk_t = dS_t v_t,   dv_t = dS_t^T k_t,
///   dlog_decay_t = a_t <dS_t, S_{t-1}>,   dS_{t-1} = a_t dS_t,   a_t = exp(log_decay_t)
Gradients retention_backward(const Inputs &in, const Strided &dout, const Strided &dstate);

/// Of each element of retention_backward(): the root of the sum of the squares of its terms, as spread() is for retention(). For
/// decays kernels sum other terms, and the sum is smaller than they are: over the tokens s from t on to some end, q_s.dq_s -
/// k_s.dk_s, and what the state there adds. The squares are those of the tokens to the end of the sequence; of an earlier end
/// they are less.
Gradients spread_backward(Inputs in, Strided dout, Strided dstate);

}  // namespace reference
