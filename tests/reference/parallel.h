// The parallel form in double, in plain loops, weight by weight: what kernels of it are compared with.
#pragma once
#include "power.h"
#include "retention.h"

#include <algorithm>

namespace reference {

struct ParallelInputs : Inputs {
    int degree = 1;
    bool normalized = false;
    bool initial = true;        // states are given, of expanded keys
    Strided initial_keys = {};  // [B, Hk, D]
};

struct ParallelResult {
    // [B, T, H, V] and [B, H, T, T], and the size of what rounding errors are measured by
    std::vector<double> out, out_spread, weights, weights_spread;
};

///   w_ij = (scale q_i.k_j)^p exp(g_{j+1} + ... + g_i), j <= i     out_i = sum_j w_ij v_j + phi(scale q_i) exp(g_1 + ... + g_i) S
///
/// or, normalized, out_i and w_i divided by sum_j w_ij + phi(scale q_i) exp(g_1 + ... + g_i) s.
///
/// Spread: of q.k the root of the sum of the squares of its terms, as in retention.h, or q.k itself where they are of one sign and
/// partial sums as large as the whole; of a power p x^(p-1) times that of x; of a quotient the two relative ones. A weight by
/// itself may be small for its gates alone: exp(x) has the relative error of x times x, which is added, and what is next to
/// nothing may have been nothing on the way.
inline ParallelResult parallel(const ParallelInputs &in) {
    const int64_t B = in.B, T = in.T, H = in.H, K = in.K, V = in.V;
    ParallelResult result;
    result.out.resize(B * T * H * V), result.weights.resize(B * H * T * T);
    result.out_spread = result.out, result.weights_spread = result.weights;
    auto square = [](double x) { return x * x; };
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < H; h++)
            for (int64_t i = 0; i < T; i++) {
                const int64_t key = h / in.group;
                double *weights = result.weights.data() + ((b * H + h) * T + i) * T;
                double *spreads = result.weights_spread.data() + ((b * H + h) * T + i) * T;
                double *out = result.out.data() + ((b * T + i) * H + h) * V;
                double *out_spread = result.out_spread.data() + ((b * T + i) * H + h) * V;
                double log_decay = 0, sum = 0, sum_spread = 0;
                std::vector<double> log_decays(T);
                for (int64_t j = i; j >= 0; log_decay += in.log_decay(b, j, key), j--) {
                    log_decays[j] = log_decay;
                    double x = 0, spread = 0;
                    for (int64_t d = 0; d < K; d++) {
                        const double term = in.scale * in.q(b, i, h, d) * in.k(b, j, key, d);
                        x += term, spread += term * term;
                    }
                    spread = std::max(std::sqrt(spread), std::abs(x));
                    weights[j] = std::pow(x, in.degree) * std::exp(log_decay);
                    spreads[j] = in.degree * std::pow(std::abs(x), in.degree - 1) * spread * std::exp(log_decay);
                    sum += weights[j], sum_spread += square(spreads[j]);
                    for (int64_t e = 0; e < V; e++) {
                        const double v = in.v(b, j, key, e);
                        out[e] += weights[j] * v, out_spread[e] += square(spreads[j] * v);
                    }
                }
                std::vector<double> query(K);
                for (int64_t d = 0; d < K; d++) query[d] = in.scale * in.q(b, i, h, d);
                const std::vector<double> features = in.initial ? phi(query, in.degree) : std::vector<double>();
                for (int64_t f = 0; f < (int64_t)features.size(); f++) {
                    const double q = features[f] * std::exp(log_decay), s = in.initial_keys(b, key, f);
                    sum += q * s, sum_spread += square(q * s);
                    for (int64_t e = 0; e < V; e++) {
                        const double S = in.initial_state(b, key, f, e);
                        out[e] += q * S, out_spread[e] += square(q * S);
                    }
                }
                if (!in.normalized)
                    sum = 1, sum_spread = 0;
                else
                    sum_spread = std::max(sum_spread, square(sum));
                auto divide = [&](double &x, double &spread_squared) {
                    x /= sum;
                    spread_squared = std::sqrt(spread_squared + square(x) * sum_spread) / std::abs(sum);
                };
                for (int64_t e = 0; e < V; e++) divide(out[e], out_spread[e]);
                for (int64_t j = 0; j <= i; j++) {
                    spreads[j] -= std::abs(weights[j]) * std::max(log_decays[j], -1000.0) / 16;
                    spreads[j] = square(spreads[j] + 1e-30);
                    divide(weights[j], spreads[j]);
                }
            }
    return result;
}

}  // namespace reference
