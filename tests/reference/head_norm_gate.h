// Norm of a row and its gate in double, in plain loops: what every kernel is compared with. Depends on nothing.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

namespace reference {

struct NormedRow {
    std::vector<double> out;
    std::vector<double> spread;  // of each element: what rounding errors are measured by
};

///   out = (x - mean) / sqrt(variance + eps) * weight * gate / (1 + exp(-gate)),   mean = 0 unless layer_norm
///
/// The spread is |out|; where there is a mean, with the errors of that: of a sum of distances to x[0]. exp() of a gate below -16 is
/// wrong by -gate / 16 times as much as others: it reduces its argument in fp32, by one rounding of that.
inline NormedRow head_norm_gate(const std::vector<double> &x, const std::vector<double> &gate,
                                const std::vector<double> &weight, bool layer_norm, bool gated, double eps) {
    const size_t V = x.size();
    double mean = 0, variance = 0;
    for (size_t e = 0; layer_norm && e < V; e++) mean += x[e] / (double)V;
    for (size_t e = 0; e < V; e++) variance += (x[e] - mean) * (x[e] - mean) / (double)V;
    const double deviation = std::sqrt(variance + eps);
    NormedRow row;
    for (size_t e = 0; e < V; e++) {
        const double factor = weight[e] * (gated ? gate[e] / (1 + std::exp(-gate[e])) : 1) / deviation;
        row.out.push_back((x[e] - mean) * factor);
        const double distances = layer_norm ? deviation + std::abs(x[0] - mean) : 0;
        const double exponent = gated ? std::max(1.0, -gate[e] / 16) : 1;
        row.spread.push_back((std::abs(x[e] - mean) + distances) * std::abs(factor) * exponent);
    }
    return row;
}

struct NormedRowGradient {
    std::vector<double> dx, dgate, dweight;                       // dweight: what the row adds to it
    std::vector<double> dx_spread, dgate_spread, dweight_spread;  // of each element
};

/// The gradient of `sum dout out`. With n = (x - mean) / deviation, s the swish of the gate and u = dout weight s:
///
///   dx = (u - mean(u) - n mean(u n)) / deviation,   without mean(u) unless layer_norm
///   dgate = dout weight n s',   s' = p (1 + gate (1 - p)), p = 1 / (1 + exp(-gate));   dweight = dout n s
///
/// The spreads are these sums of absolute values, n of layer norm with the errors of the mean, exp() of strong gates as above;
/// that of mean(u) is the root mean square of u.
inline NormedRowGradient head_norm_gate_backward(const std::vector<double> &x, const std::vector<double> &gate,
                                                 const std::vector<double> &weight, const std::vector<double> &dout,
                                                 bool layer_norm, bool gated, double eps) {
    const size_t V = x.size();
    double mean = 0, variance = 0, mean_u = 0, mean_un = 0, square_u = 0, spread_un = 0;
    for (size_t e = 0; layer_norm && e < V; e++) mean += x[e] / (double)V;
    for (size_t e = 0; e < V; e++) variance += (x[e] - mean) * (x[e] - mean) / (double)V;
    const double deviation = std::sqrt(variance + eps);
    std::vector<double> n, s, u, spread_n, exponent;
    for (size_t e = 0; e < V; e++) {
        n.push_back((x[e] - mean) / deviation);
        spread_n.push_back(std::abs(n[e]) + (layer_norm ? 1 + std::abs(x[0] - mean) / deviation : 0));
        s.push_back(gated ? gate[e] / (1 + std::exp(-gate[e])) : 1);
        exponent.push_back(gated ? std::max(1.0, -gate[e] / 16) : 1);
        u.push_back(dout[e] * weight[e] * s[e]);
        mean_u += layer_norm ? u[e] / (double)V : 0, mean_un += u[e] * n[e] / (double)V;
        square_u += layer_norm ? u[e] * u[e] * exponent[e] * exponent[e] / (double)V : 0;
        spread_un += std::abs(u[e]) * exponent[e] * spread_n[e] / (double)V;
    }
    NormedRowGradient row;
    for (size_t e = 0; e < V; e++) {
        const double p = gated ? 1 / (1 + std::exp(-gate[e])) : 0, rest = gated ? 1 / (1 + std::exp(gate[e])) : 0;
        row.dx.push_back((u[e] - mean_u - n[e] * mean_un) / deviation);
        row.dx_spread.push_back((std::abs(u[e]) * exponent[e] + std::sqrt(square_u) + spread_n[e] * spread_un) / deviation);
        row.dgate.push_back(dout[e] * weight[e] * n[e] * p * (1 + gate[e] * rest));
        row.dgate_spread.push_back(std::abs(dout[e] * weight[e]) * spread_n[e] * p * (1 + std::abs(gate[e]) * rest) *
                                   exponent[e]);
        row.dweight.push_back(dout[e] * n[e] * s[e]);
        row.dweight_spread.push_back(std::abs(dout[e] * s[e]) * spread_n[e] * exponent[e]);
    }
    return row;
}

}  // namespace reference
