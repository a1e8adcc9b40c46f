// exp() as CPUs' kernels have it (schedules/generic/exp.cpp), in a pipeline made up here, on every target of cmake/targets.cmake that
// this machine runs: in vectors and one by one, alone and in what gates make of it, which compilers like to rearrange.
#include "../../schedules/schedule.h"
#include "targets.h"

#include <HalideBuffer.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace {
using namespace Halide;
using namespace test;

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr double log_of_largest = 88.7228390, zero_below = -86.99;

class Exp : public testing::TestWithParam<NamedTarget> {};

TEST_P(Exp, IsGoodToTwoRoundingsUpToWhereFp32Ends) {
    const Target &target = GetParam().target;
    if (!missing(target).empty()) GTEST_SKIP() << "this CPU lacks" << missing(target);
    std::vector<float> numbers = {-infinity, -1e30f, -1000, 88.5f,    88.7f, 88.722f, 88.73f,
                                  88.9f,     1000,   1e30f, infinity, 0,     -0.0f};
    for (double x = -90; x < 90; x += 0.00917) numbers.push_back((float)x);
    const Buffer<float> x(numbers.data(), (int)numbers.size());
    for (bool vectors : {true, false}) {
        Var i("i");
        Func power("power"), out("out");
        power(i) = exp(x(i));
        out(i) = Tuple(power(i), 1.0f / (1.0f + power(i)));
        if (vectors) out.vectorize(i, target.natural_vector_size<float>(), TailStrategy::GuardWithIf);
        Pipeline pipeline(out);
        holdfast::Lowering::apply(pipeline, target);
        const Realization both = pipeline.realize({x.width()}, target);
        const Buffer<float> got = both[0], sigmoid = both[1];
        for (int n = 0; n < x.width(); n++) {
            const double given = x(n), right = std::exp(given), rounding = 0x1p-24 * right;
            if (given > log_of_largest)
                EXPECT_EQ(got(n), infinity) << given;
            else if (given < zero_below)
                EXPECT_LE(std::abs(got(n) - right), right) << given;
            else
                EXPECT_NEAR(got(n), right, 2 * rounding) << given;
            EXPECT_NEAR(sigmoid(n), 1 / (1 + right), 3 * 0x1p-24 + std::numeric_limits<float>::denorm_min()) << given;
        }
    }
}

std::vector<NamedTarget> of_cpus() {
    std::vector<NamedTarget> list;
    for (const NamedTarget &t : targets())
        if (!t.target.has_gpu_feature()) list.push_back(t);
    return list;
}
INSTANTIATE_TEST_SUITE_P(, Exp, testing::ValuesIn(of_cpus()), [](const auto &info) { return info.param.name; });

}  // namespace
