// Retention in double, in plain loops, token by token: what every kernel is compared with. Depends on nothing.
#pragma once
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace reference {

/// A tensor of floats in any layout: element (a, b, c, d) is `of` of data[a * stride[0] + b * stride[1] + ...]. A stride of 0
/// repeats one element along its axis.
struct Strided {
    const float *data = nullptr;
    std::array<int64_t, 4> stride = {};
    double (*of)(double) = [](double x) { return x; };

    double operator()(int64_t a, int64_t b, int64_t c, int64_t d = 0) const {
        return of(data[a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3]]);
    }
};

/// Heads of queries in groups: head h has keys, values, decay and state of head h / group, of Hk = H / group.
struct Inputs {
    int64_t B, T, H, K, V, group = 1;
    Strided q = {}, k = {}, v = {};  // [B, T, H, K], [B, T, Hk, K], [B, T, Hk, V]
    Strided log_decay = {};          // [B, T, Hk]
    Strided initial_state = {};      // [B, Hk, K, V]
    double scale = 1;
};

struct Result {
    std::vector<double> out, state;  // row-major [B, T, H, V] and [B, Hk, K, V]
};

///   S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t,   out_t = scale q_t S_t,   state = S_T
inline Result retention(const Inputs &in) {
    const int64_t B = in.B, T = in.T, H = in.H, K = in.K, V = in.V, Hk = H / in.group;
    Result result{std::vector<double>(B * T * H * V), std::vector<double>(B * Hk * K * V)};
    std::vector<double> v(V);
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < Hk; h++) {
            double *S = result.state.data() + (b * Hk + h) * K * V;
            for (int64_t d = 0; d < K; d++)
                for (int64_t e = 0; e < V; e++) S[d * V + e] = in.initial_state(b, h, d, e);
            for (int64_t t = 0; t < T; t++) {
                const double decay = std::exp(in.log_decay(b, t, h));
                for (int64_t e = 0; e < V; e++) v[e] = in.v(b, t, h, e);
                for (int64_t d = 0; d < K; d++) {
                    const double k = in.k(b, t, h, d);
                    for (int64_t e = 0; e < V; e++) S[d * V + e] = decay * S[d * V + e] + k * v[e];
                }
                for (int64_t n = h * in.group; n < (h + 1) * in.group; n++) {
                    double *out = result.out.data() + ((b * T + t) * H + n) * V;
                    for (int64_t d = 0; d < K; d++) {
                        const double q = in.scale * in.q(b, t, n, d);
                        for (int64_t e = 0; e < V; e++) out[e] += q * S[d * V + e];
                    }
                }
            }
        }
    return result;
}

/// Of each element of retention(in): the root of the sum of the squares of its terms, scale q_id k_jd v_je and so on. That is
/// its size when the terms have random signs, whether or not they happen to cancel: what rounding errors are measured by.
inline Result spread(Inputs in) {
    for (Strided *x : {&in.q, &in.k, &in.v, &in.initial_state}) x->of = [](double y) { return y * y; };
    in.log_decay.of = [](double g) { return 2 * g; };
    in.scale *= in.scale;
    Result result = retention(in);
    for (double &x : result.out) x = std::sqrt(x);
    for (double &x : result.state) x = std::sqrt(x);
    return result;
}

}  // namespace reference
