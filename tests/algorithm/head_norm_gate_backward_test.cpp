// The algorithm of the gradient of norm and gate compiled just in time: without any schedule, and with every registered one, for each target of
// cmake/targets.cmake that this machine runs.
#include "../../generators/head_norm_gate_backward.h"
#include "../../schedules/schedule.h"
#include "../head_norm_gate_backward_call.h"
#include "targets.h"

namespace {
using namespace Halide;
using namespace test;
using Schedules = holdfast::Schedule<holdfast::HeadNormGateBackwardFuncs, holdfast::HeadNormGateBackwardSizes>;

struct Instance {
    std::string schedule;
    NamedTarget target;
    Dtype dtype;
};
std::string name(const Instance &i) { return i.schedule + "_" + i.target.name + "_" + i.dtype.name; }
void PrintTo(const Instance &i, std::ostream *stream) { *stream << name(i); }

std::vector<Instance> instances() {
    std::vector<Instance> list = {{"none", targets().back(), f32}};  // other types: variants/
    for (const auto &schedule : Schedules::all())
        for (const NamedTarget &named : targets())
            if (compiled_for("head_norm_gate_backward", schedule.rank, named) && schedule.matches(named.target, {}))
                list.push_back({schedule.name, named, f32});
    return list;
}

class HeadNormGateBackward : public testing::TestWithParam<Instance> {};

TEST_P(HeadNormGateBackward, MatchesReference) {
    const Instance &instance = GetParam();
    if (!missing(instance.target.target).empty()) GTEST_SKIP() << "this CPU lacks" << missing(instance.target.target);
    try {
        const GeneratorContext context(instance.target.target.with_feature(Target::JIT));
        const Callable kernel = create_callable_from_generator(
            context, "head_norm_gate_backward", {{"dtype", instance.dtype.name}, {"forced_schedule", instance.schedule}});
        for (const NormBackwardCase &c : norm_backward_cases(true))
            NormBackwardCall(c, instance.dtype).expect_reference(kernel);
    } catch (const Halide::Error &e) {
        FAIL() << e.what();
    }
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

INSTANTIATE_TEST_SUITE_P(, HeadNormGateBackward, testing::ValuesIn(instances()),
                         [](const auto &info) { return name(info.param); });

}  // namespace
