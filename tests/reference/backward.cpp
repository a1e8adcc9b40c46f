#include "backward.h"

#include <algorithm>
#include <cmath>

namespace reference {
namespace {

constexpr int64_t segment = 64;  // tokens of which all states are kept at a time

/// One head of keys. The states before tokens are kept for one segment at a time, and recomputed from that at its start.
class Head {
public:
    Head(const Inputs &in, const Strided &dout, const Strided &dstate, int64_t b, int64_t h)
        : in(in), dout(dout), b(b), h(h), dS(in.K * in.V), final_product(0) {
        for (int64_t d = 0; d < in.K; d++)
            for (int64_t e = 0; e < in.V; e++) dS[d * in.V + e] = dstate.data ? dstate(b, h, d, e) : 0;
        std::vector<double> S(in.K * in.V);
        for (int64_t d = 0; d < in.K; d++)
            for (int64_t e = 0; e < in.V; e++) S[d * in.V + e] = in.initial_state(b, h, d, e);
        for (int64_t t = 0; t < in.T; t++) {
            if (t % segment == 0) starts.push_back(S);
            advance(S, t);
        }
        for (size_t n = 0; n < S.size(); n++) final_product += S[n] * dS[n];
    }

    /// Sets its own of `r`: that of log_decay by the closed form.
    void run(Gradients &r) {
        const int64_t K = in.K, V = in.V, Hk = in.H / in.group;
        std::vector<std::vector<double>> before(segment + 1);
        for (int64_t t = in.T - 1; t >= 0; t--) {
            const int64_t n = t % segment;
            if (t == in.T - 1 || n == segment - 1) {
                before[0] = starts[t / segment];
                for (int64_t m = 0; m <= n; m++) before[m + 1] = before[m], advance(before[m + 1], t - n + m);
            }
            const std::vector<double> &S = before[n + 1], &S_before = before[n];
            const double decay = std::exp(in.log_decay(b, t, h));
            for (int64_t m = h * in.group; m < (h + 1) * in.group; m++) {
                double *dq = &r.q[((b * in.T + t) * in.H + m) * K];
                const std::vector<double> q = row_of(in.q, t, m, K);
                std::vector<double> from_out(V);
                for (int64_t e = 0; e < V; e++) from_out[e] = dout.data ? in.scale * dout(b, t, m, e) : 0;
                for (int64_t d = 0; d < K; d++) {
                    double sum = 0;
                    for (int64_t e = 0; e < V; e++) {
                        sum += S[d * V + e] * from_out[e];
                        dS[d * V + e] += q[d] * from_out[e];
                    }
                    dq[d] = sum;
                }
            }
            const int64_t row = (b * in.T + t) * Hk + h;
            const std::vector<double> k = row_of(in.k, t, h, K), v = row_of(in.v, t, h, V);
            double dgate = 0;
            for (int64_t d = 0; d < K; d++) {
                double sum = 0;
                for (int64_t e = 0; e < V; e++) {
                    double &gradient = dS[d * V + e];
                    sum += gradient * v[e];
                    r.v[row * V + e] += gradient * k[d];
                    dgate += decay * gradient * S_before[d * V + e];
                    gradient *= decay;
                }
                r.k[row * K + d] = sum;
            }
            r.log_decay[row] = dgate;
        }
        std::copy(dS.begin(), dS.end(), r.initial_state.begin() + (b * Hk + h) * K * V);
    }

    double product_of_final_states() const { return final_product; }

private:
    const Inputs &in;
    const Strided &dout;
    const int64_t b, h;
    std::vector<double> dS;
    std::vector<std::vector<double>> starts;  // the states at the start of segments
    double final_product;

    void advance(std::vector<double> &S, int64_t t) const {
        const double decay = std::exp(in.log_decay(b, t, h));
        const std::vector<double> k = row_of(in.k, t, h, in.K), v = row_of(in.v, t, h, in.V);
        for (int64_t d = 0; d < in.K; d++)
            for (int64_t e = 0; e < in.V; e++) S[d * in.V + e] = decay * S[d * in.V + e] + k[d] * v[e];
    }
    std::vector<double> row_of(const Strided &x, int64_t t, int64_t head, int64_t size) const {
        std::vector<double> row(size);
        for (int64_t n = 0; n < size; n++) row[n] = x(b, t, head, n);
        return row;
    }
};

Gradients empty(const Inputs &in) {
    const int64_t rows = in.B * in.T * in.H, rows_of_keys = rows / in.group;
    return {std::vector<double>(rows * in.K), std::vector<double>(rows_of_keys * in.K),
            std::vector<double>(rows_of_keys * in.V), std::vector<double>(rows_of_keys),
            std::vector<double>(in.B * in.H / in.group * in.K * in.V)};
}

}  // namespace

Gradients retention_backward(const Inputs &in, const Strided &dout, const Strided &dstate) {
    Gradients r = empty(in);
    for (int64_t b = 0; b < in.B; b++)
        for (int64_t h = 0; h < in.H / in.group; h++) Head(in, dout, dstate, b, h).run(r);
    return r;
}

Gradients spread_backward(Inputs in, Strided dout, Strided dstate) {
    for (Strided *x : {&in.q, &in.k, &in.v, &in.initial_state, &dout, &dstate}) x->of = [](double y) { return y * y; };
    in.log_decay.of = [](double g) { return 2 * g; };
    in.scale *= in.scale;
    Gradients r = empty(in);
    const int64_t Hk = in.H / in.group;
    for (int64_t b = 0; b < in.B; b++)
        for (int64_t h = 0; h < Hk; h++) {
            Head head(in, dout, dstate, b, h);
            head.run(r);
            double rest = head.product_of_final_states();
            for (int64_t t = in.T - 1; t >= 0; t--) {
                const int64_t row = (b * in.T + t) * Hk + h;
                for (int64_t d = 0; d < in.K; d++) {
                    rest += in.k(b, t, h, d) * r.k[row * in.K + d];
                    for (int64_t m = 0; m < in.group; m++)
                        rest += in.q(b, t, h * in.group + m, d) * r.q[((b * in.T + t) * in.H + h * in.group + m) * in.K + d];
                }
                r.log_decay[row] = rest;
            }
        }
    for (std::vector<double> *x : {&r.q, &r.k, &r.v, &r.log_decay, &r.initial_state})
        for (double &y : *x) y = std::sqrt(y);
    return r;
}

}  // namespace reference
