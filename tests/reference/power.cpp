#include "power.h"

#include <algorithm>
#include <cmath>

namespace reference {

std::vector<Monomial> monomials(int64_t K, int degree) {
    std::vector<Monomial> all;
    std::vector<int> a(degree);  // a_p first
    double factorial = 1;
    for (int n = 2; n <= degree; n++) factorial *= n;
    auto add = [&](auto &&self, int n, double orders, int run) -> void {
        if (n == degree) return all.push_back({a, std::sqrt(orders)});
        for (a[n] = 0; a[n] < K && (n == 0 || a[n] <= a[n - 1]); a[n]++) {
            const int length = n && a[n] == a[n - 1] ? run + 1 : 1;
            self(self, n + 1, orders / length, length);
        }
    };
    add(add, 0, factorial, 0);
    return all;
}

std::vector<double> phi(const std::vector<double> &x, int degree) {
    std::vector<double> features;
    for (const Monomial &m : monomials((int64_t)x.size(), degree)) {
        features.push_back(m.weight);
        for (int a : m.elements) features.back() *= x[a];
    }
    return features;
}

PowerResult power(const PowerInputs &in) {
    const int64_t B = in.B, T = in.T, H = in.H, G = in.G, K = in.K, V = in.V;
    const int p = in.degree;
    const double scale = std::pow(in.scale, p);
    const int64_t D = (int64_t)phi(std::vector<double>(K), p).size();
    PowerResult r{D, {}, {}, {}, {}, {}, {}};
    r.out.resize(B * T * H * G * V), r.state.resize(B * H * D * V), r.keys.resize(B * H * D);
    r.out_spread = r.out, r.state_spread = r.state, r.keys_spread = r.keys;
    auto row = [](const Strided &x, int64_t b, int64_t t, int64_t h, int64_t size) {
        std::vector<double> values(size);
        for (int64_t n = 0; n < size; n++) values[n] = x(b, t, h, n);
        return values;
    };
    auto square = [](double x) { return x * x; };
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < H; h++) {
            std::vector<std::vector<double>> k, v;
            std::vector<double> decay;
            for (int64_t t = 0; t < T; t++) {
                k.push_back(row(in.k, b, t, h, K)), v.push_back(row(in.v, b, t, h, V));
                decay.push_back(std::exp(in.log_decay(b, t, h)));
            }
            for (int64_t t = 0; t < T; t++)
                for (int64_t g = 0; g < G; g++) {
                    const std::vector<double> q = row(in.q, b, t, h * G + g, K);
                    std::vector<double> num(V), num_spread(V);
                    double den = 0, den_spread = 0, since = 1;  // decay since token j
                    for (int64_t j = t; j >= 0; since *= decay[j--]) {
                        double dot = 0, of_dot = 0;
                        for (int64_t d = 0; d < K; d++) dot += q[d] * k[j][d], of_dot += square(q[d] * k[j][d]);
                        of_dot = std::sqrt(of_dot);
                        const double weight = std::pow(dot, p) * since;
                        const double spread = p * of_dot * std::pow(std::max(std::abs(dot), of_dot), p - 1) * since;
                        for (int64_t e = 0; e < V; e++) num[e] += weight * v[j][e], num_spread[e] += square(spread * v[j][e]);
                        den += weight, den_spread += square(spread);
                    }
                    const std::vector<double> feature = in.states ? phi(q, p) : std::vector<double>();
                    for (int64_t f = 0; in.states && f < D; f++) {
                        const double of_q = feature[f] * since;
                        for (int64_t e = 0; e < V; e++) {
                            const double term = of_q * in.initial_state(b, h, f, e);
                            num[e] += term, num_spread[e] += square(term);
                        }
                        const double term = in.normalize ? of_q * in.initial_keys(b, h, f) : 0;
                        den += term, den_spread += square(term);
                    }
                    const int64_t at = ((b * T + t) * H * G + h * G + g) * V;
                    for (int64_t e = 0; e < V; e++) {
                        const double factor = in.normalize ? 1 / den : scale, out = num[e] * factor;
                        r.out[at + e] = out;
                        r.out_spread[at + e] = std::abs(factor) * (std::sqrt(num_spread[e]) + std::abs(num[e]) / 2);
                        if (in.normalize) r.out_spread[at + e] += std::abs(out) * (std::sqrt(den_spread) / std::abs(den) + 0.5);
                    }
                }
            double *S = &r.state[b * H * D * V + h * D * V], *of_S = &r.state_spread[b * H * D * V + h * D * V];
            double *s = &r.keys[(b * H + h) * D], *of_s = &r.keys_spread[(b * H + h) * D];
            double since = 1;
            auto add = [&](int64_t f, double feature, const std::vector<double> &value) {
                for (int64_t e = 0; e < V; e++)
                    S[f * V + e] += feature * value[e], of_S[f * V + e] += square(feature * value[e]);
            };
            for (int64_t t = in.states ? T : 0; t-- > 0; since *= decay[t]) {
                const std::vector<double> feature = phi(k[t], p);
                for (int64_t f = 0; f < D; f++) {
                    add(f, feature[f] * since, v[t]);
                    s[f] += feature[f] * since, of_s[f] += square(feature[f] * since);
                }
            }
            for (int64_t f = 0; f < D; f++) {
                add(f, since, row(in.initial_state, b, h, f, V));
                const double sum = since * in.initial_keys(b, h, f);
                s[f] += sum, of_s[f] += square(sum);
            }
        }
    auto finish = [](const std::vector<double> &value, std::vector<double> &spread) {
        for (size_t n = 0; n < value.size(); n++) spread[n] = std::sqrt(spread[n]) + std::abs(value[n]) / 2;
    };
    finish(r.state, r.state_spread), finish(r.keys, r.keys_spread);
    return r;
}

}  // namespace reference
