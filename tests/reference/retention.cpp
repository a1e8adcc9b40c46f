#include "retention.h"

#include <cmath>

namespace reference {

Result retention(const Inputs &in) {
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

Result spread(Inputs in) {
    for (Strided *x : {&in.q, &in.k, &in.v, &in.initial_state}) x->of = [](double y) { return y * y; };
    in.log_decay.of = [](double g) { return 2 * g; };
    in.scale *= in.scale;
    Result result = retention(in);
    for (double &x : result.out) x = std::sqrt(x);
    for (double &x : result.state) x = std::sqrt(x);
    return result;
}

}  // namespace reference
