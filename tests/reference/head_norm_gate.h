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

}  // namespace reference
