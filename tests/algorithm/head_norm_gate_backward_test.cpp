// The algorithm of the gradient of norm and gate compiled just in time: without any schedule, and with every registered one, for each target of
// cmake/targets.cmake that this machine runs.
#include "../head_norm_gate_backward_call.h"
#include "instance.h"

namespace {
using namespace Halide;
using namespace test;
using Instance = test::Instance<holdfast::HeadNormGateBackwardSizes>;

class HeadNormGateBackward : public testing::TestWithParam<Instance> {};

TEST_P(HeadNormGateBackward, MatchesReference) {
    const Instance &instance = GetParam();
    compile_and("head_norm_gate_backward", instance, [&](const Callable &kernel) {
        for (const NormBackwardCase &c : norm_backward_cases(true))
            NormBackwardCall(c, instance.dtype).expect_reference(kernel);
    });
}

// The reference itself is the slope of the forward one, by differences in double.
TEST(HeadNormGateBackwardReference, IsTheSlopeOfTheForwardOne) {
    Random random;
    for (bool layer_norm : {false, true})
        for (bool gated : {false, true}) {
            const size_t V = 7;
            std::vector<double> inputs[3], dout;  // x, gate, weight
            for (size_t e = 0; e < V; e++) {
                inputs[0].push_back(random(-1, 3)), inputs[1].push_back(random(-4, 4)), inputs[2].push_back(random(-2, 2));
                dout.push_back(random(-1, 1));
            }
            auto loss = [&] {
                const auto out = reference::head_norm_gate(inputs[0], inputs[1], inputs[2], layer_norm, gated, 1e-2).out;
                double sum = 0;
                for (size_t e = 0; e < V; e++) sum += dout[e] * out[e];
                return sum;
            };
            const reference::NormedRowGradient row =
                reference::head_norm_gate_backward(inputs[0], inputs[1], inputs[2], dout, layer_norm, gated, 1e-2);
            const std::vector<double> *gradients[] = {&row.dx, &row.dgate, &row.dweight};
            for (int n = 0; n < 3; n++)
                for (size_t e = 0; e < V && (n != 1 || gated); e++) {
                    constexpr double step = 1e-4;  // wrong by its square, and by 2^-53 / step
                    const double middle = inputs[n][e];
                    double ahead[2];
                    for (int side : {0, 1}) inputs[n][e] = middle + (side ? step : -step), ahead[side] = loss();
                    inputs[n][e] = middle;
                    EXPECT_NEAR((*gradients[n])[e], (ahead[1] - ahead[0]) / (2 * step), 1e-6) << layer_norm << gated << n << e;
                }
        }
}

HOLDFAST_INSTANCES(HeadNormGateBackward,
                   instances_of_any_size<holdfast::HeadNormGateBackwardFuncs, holdfast::HeadNormGateBackwardSizes>(
                       "head_norm_gate_backward", false));

}  // namespace
