#include "power_backward.h"

#include <algorithm>
#include <cmath>

namespace reference {
namespace {

double square(double x) { return x * x; }

/// A sum, and what its rounding errors are measured by.
struct Sums {
    std::vector<double> &value, &spread;
    int64_t row;  // the first element

    void add(int64_t n, double term, double of_term) const { value[row + n] += term, spread[row + n] += square(of_term); }
    void add(int64_t n, double term) const { add(n, term, term); }
    Sums at(int64_t first) const { return {value, spread, first}; }
};

std::vector<double> row_of(const Strided &x, int64_t b, int64_t t, int64_t h, int64_t size) {
    std::vector<double> values(size);
    for (int64_t n = 0; n < size; n++) values[n] = x(b, t, h, n);
    return values;
}

/// Add to dx what x gets from features: dfeature[f] is the gradient of feature f, to `spread`.
void through_phi(const std::vector<Monomial> &monomials, const std::vector<double> &x, const std::vector<double> &dfeature,
                 const std::vector<double> &spread, const Sums &dx) {
    for (size_t f = 0; f < monomials.size(); f++) {
        const std::vector<int> &a = monomials[f].elements;
        for (size_t s = 0; s < a.size(); s++) {
            double others = monomials[f].weight;
            for (size_t n = 0; n < a.size(); n++) others *= n == s ? 1 : x[a[n]];
            dx.add(a[s], dfeature[f] * others, spread[f] * others);
        }
    }
}

}  // namespace

PowerGradients power_backward(const PowerInputs &in, const Strided &dout, const Strided &dstate, const Strided &dkeys,
                              const Strided &out, int64_t chunk) {
    const int64_t B = in.B, T = in.T, H = in.H, G = in.G, K = in.K, V = in.V;
    const int p = in.degree;
    const double scale = std::pow(in.scale, p);
    const std::vector<Monomial> features = monomials(K, p);
    const int64_t D = (int64_t)features.size();
    PowerGradients r;
    r.dq.resize(B * T * H * G * K), r.dk.resize(B * T * H * K), r.dv.resize(B * T * H * V), r.dlog_decay.resize(B * T * H);
    r.dstate.resize(B * H * D * V), r.dkeys.resize(B * H * D);
    r.dq_spread = r.dq, r.dk_spread = r.dk, r.dv_spread = r.dv, r.dlog_decay_spread = r.dlog_decay;
    r.dstate_spread = r.dstate, r.dkeys_spread = r.dkeys;
    const PowerResult computed = in.normalize && !out.data ? power(in) : PowerResult();
    auto expand = [&](const std::vector<double> &x) {
        std::vector<double> phi(D);
        for (int64_t f = 0; f < D; f++) {
            phi[f] = features[f].weight;
            for (int a : features[f].elements) phi[f] *= x[a];
        }
        return phi;
    };

    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < H; h++) {
            std::vector<std::vector<double>> k, v;
            std::vector<double> decay, S(in.states ? D * V : 0), z(in.states ? D : 0);
            for (int64_t t = 0; t < T; t++) {
                k.push_back(row_of(in.k, b, t, h, K)), v.push_back(row_of(in.v, b, t, h, V));
                decay.push_back(std::exp(in.log_decay(b, t, h)));
            }
            for (int64_t f = 0; in.states && f < D; f++) {
                for (int64_t e = 0; e < V; e++) S[f * V + e] = in.initial_state(b, h, f, e);
                z[f] = in.normalize ? in.initial_keys(b, h, f) : 0;
            }
            auto dk = [&](int64_t t) { return Sums{r.dk, r.dk_spread, ((b * T + t) * H + h) * K}; };
            auto dv = [&](int64_t t) { return Sums{r.dv, r.dv_spread, ((b * T + t) * H + h) * V}; };
            auto dgate = [&](int64_t t) { return Sums{r.dlog_decay, r.dlog_decay_spread, (b * T + t) * H + h}; };
            const Sums dS = {r.dstate, r.dstate_spread, (b * H + h) * D * V}, dz = {r.dkeys, r.dkeys_spread, (b * H + h) * D};

            for (int64_t t = 0; t < T; t++)
                for (int64_t g = 0; g < G; g++) {
                    const int64_t head = h * G + g;
                    const std::vector<double> q = row_of(in.q, b, t, head, K), given = row_of(dout, b, t, head, V);
                    const Sums dq = {r.dq, r.dq_spread, ((b * T + t) * H * G + head) * K};

                    // All weights of the row: their dot products, and how sensitive those are.
                    std::vector<double> dot(t + 1), of_dot(t + 1), since(t + 1);
                    double den = 0, of_den = 0, from_start = 1;
                    auto weight = [&](int64_t j) { return std::pow(dot[j], p) * since[j]; };
                    auto most = [&](int64_t j, int power) { return std::pow(std::max(std::abs(dot[j]), of_dot[j]), power); };
                    auto of_weight = [&](int64_t j) { return p * of_dot[j] * most(j, p - 1) * since[j]; };
                    for (int64_t j = t; j >= 0; from_start *= decay[j--]) {
                        for (int64_t d = 0; d < K; d++) dot[j] += q[d] * k[j][d], of_dot[j] += square(q[d] * k[j][d]);
                        of_dot[j] = std::sqrt(of_dot[j]), since[j] = from_start;
                        den += weight(j), of_den += square(of_weight(j));
                    }
                    const std::vector<double> phi = in.states ? expand(q) : std::vector<double>();
                    for (int64_t f = 0; in.states && f < D; f++)
                        den += phi[f] * from_start * z[f], of_den += square(phi[f] * from_start * z[f]);

                    // The gradients of numerator and denominator.
                    std::vector<double> dnum(V);
                    double dden = 0, of_dden = 0, wrong_by = 1;  // what all of the row's gradients have in common, relative
                    for (int64_t e = 0; e < V; e++) {
                        dnum[e] = in.normalize ? given[e] / den : given[e] * scale;
                        if (!in.normalize) continue;
                        const double value = out.data ? out(b, t, head, e) : computed.out[((b * T + t) * H * G + head) * V + e];
                        dden -= value * dnum[e], of_dden += square(value * dnum[e]);
                    }
                    of_dden = std::sqrt(of_dden) + std::abs(dden) / 2;
                    if (in.normalize) wrong_by += std::sqrt(of_den) / std::abs(den);

                    // Weights: each is on the way of all gates from its key, exclusive, to the row.
                    std::vector<double> through(t + 1), of_through(t + 1), den_by_q(K), unused(K);
                    for (int64_t j = 0; j <= t; j++) {
                        double by_value = 0, of_dweight = square(of_dden);
                        const double weight_of_j = weight(j), of_dv = of_weight(j) + std::abs(weight_of_j) * wrong_by;
                        for (int64_t e = 0; e < V; e++) {
                            by_value += dnum[e] * v[j][e], of_dweight += square(dnum[e] * v[j][e]);
                            dv(j).add(e, weight_of_j * dnum[e], of_dv * dnum[e]);
                        }
                        const double dweight = by_value + dden;  // it may be nothing beside its halves
                        of_dweight = std::sqrt(of_dweight) + std::abs(by_value) / 2;
                        const double slope = p * std::pow(dot[j], p - 1) * since[j], ddot = slope * dweight;
                        double of_ddot = p * most(j, p - 1) * since[j] * of_dweight * wrong_by;
                        if (p > 1) of_ddot += p * (p - 1) * of_dot[j] * most(j, p - 2) * since[j] * std::abs(dweight);
                        for (int64_t d = 0; d < K; d++) {
                            dq.add(d, ddot * k[j][d], of_ddot * k[j][d]);
                            den_by_q[d] += slope * k[j][d];
                            dk(j).add(d, ddot * q[d], of_ddot * q[d]);
                        }
                        through[j] = weight_of_j * dweight;
                        of_through[j] = of_weight(j) * std::abs(dweight) + std::abs(weight_of_j) * of_dweight * wrong_by;
                    }
                    // The initial state: on that of all gates up to the row.
                    double passing = 0, of_passing = 0;
                    if (in.states) {
                        std::vector<double> dphi(D), of_dphi(D);
                        for (int64_t f = 0; f < D; f++) {
                            double by_value = 0;
                            of_dphi[f] = square(from_start * z[f] * of_dden);
                            dz.add(f, phi[f] * from_start * dden, phi[f] * from_start * of_dden * wrong_by);
                            for (int64_t e = 0; e < V; e++) {
                                const double term = from_start * S[f * V + e] * dnum[e];
                                by_value += term, of_dphi[f] += square(term);
                                dS.add(f * V + e, phi[f] * from_start * dnum[e], phi[f] * from_start * dnum[e] * wrong_by);
                            }
                            dphi[f] = by_value + from_start * z[f] * dden;
                            of_dphi[f] = (std::sqrt(of_dphi[f]) + std::abs(by_value) / 2) * wrong_by;
                            passing += phi[f] * dphi[f], of_passing += square(phi[f] * of_dphi[f]);
                        }
                        through_phi(features, q, dphi, of_dphi, dq);
                        std::vector<double> den_by_phi = z;
                        for (double &x : den_by_phi) x *= from_start;
                        through_phi(features, q, den_by_phi, den_by_phi, {den_by_q, unused, 0});
                    }
                    for (int64_t t0 = 0; t0 <= t; t0++) {
                        dgate(t0).add(0, passing, std::sqrt(of_passing));
                        passing += through[t0], of_passing += square(of_through[t0]);
                    }
                    for (int64_t d = 0; d < K; d++) {  // an error that all terms have does not average out
                        r.dq_spread[dq.row + d] += square((wrong_by - 1) * r.dq[dq.row + d]) + square(of_dden * den_by_q[d]);
                    }
                }

            // The final state: on the way of all gates after a key, and of all for what is left of the initial one.
            if (in.states) {
                double from_end = 1, passing = 0, of_passing = 0;
                std::vector<double> through(T), of_through(T), dS_end(D * V), dz_end(D);
                for (int64_t f = 0; f < D; f++) {
                    for (int64_t e = 0; e < V; e++) dS_end[f * V + e] = dstate(b, h, f, e);
                    dz_end[f] = in.normalize ? dkeys(b, h, f) : 0;
                }
                for (int64_t t = T; t-- > 0; from_end *= decay[t]) {
                    const std::vector<double> phi = expand(k[t]);
                    std::vector<double> dphi(D), of_dphi(D);
                    for (int64_t f = 0; f < D; f++) {
                        dphi[f] = from_end * dz_end[f], of_dphi[f] = square(from_end * dz_end[f]);
                        for (int64_t e = 0; e < V; e++) {
                            const double term = from_end * dS_end[f * V + e];
                            dphi[f] += term * v[t][e], of_dphi[f] += square(term * v[t][e]);
                            dv(t).add(e, phi[f] * term);
                        }
                        of_dphi[f] = std::sqrt(of_dphi[f]);
                        through[t] += phi[f] * dphi[f], of_through[t] += square(phi[f] * of_dphi[f]);
                    }
                    through_phi(features, k[t], dphi, of_dphi, dk(t));
                }
                for (int64_t f = 0; f < D; f++) {
                    dz.add(f, from_end * dz_end[f]);
                    passing += from_end * z[f] * dz_end[f], of_passing += square(from_end * z[f] * dz_end[f]);
                    for (int64_t e = 0; e < V; e++) {
                        const double term = from_end * dS_end[f * V + e];
                        dS.add(f * V + e, term);
                        passing += term * S[f * V + e], of_passing += square(term * S[f * V + e]);
                    }
                }
                for (int64_t t = 0; t < T; t++) {
                    dgate(t).add(0, passing, std::sqrt(of_passing));
                    passing += through[t], of_passing += of_through[t];
                }
            }

            // Gates by the rows around them.
            for (int64_t first = 0, n = chunk ? chunk : T; first < T; first += n) {
                const int64_t end = std::min(first + n, T);
                double around = 0;
                for (int64_t t = first; t < end; t++)
                    for (int64_t d = 0; d < K; d++) {
                        around += square(k[t][d]) * r.dk_spread[dk(t).row + d];
                        for (int64_t g = 0; g < G; g++)
                            around += square(in.q(b, t, h * G + g, d)) * r.dq_spread[((b * T + t) * H * G + h * G + g) * K + d];
                    }
                for (int64_t t = first; t < end; t++) dgate(t).add(0, 0, std::sqrt(around) / p);
            }
        }
    auto finish = [](const std::vector<double> &value, std::vector<double> &spread) {
        for (size_t n = 0; n < value.size(); n++) spread[n] = std::sqrt(spread[n]) + std::abs(value[n]) / 2;
    };
    finish(r.dq, r.dq_spread), finish(r.dk, r.dk_spread), finish(r.dv, r.dv_spread);
    finish(r.dlog_decay, r.dlog_decay_spread), finish(r.dstate, r.dstate_spread), finish(r.dkeys, r.dkeys_spread);
    return r;
}

}  // namespace reference
