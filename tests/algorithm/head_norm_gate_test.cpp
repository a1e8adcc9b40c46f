// The algorithm of norm and gate compiled just in time: without any schedule, and with every registered one, for each target of
// cmake/targets.cmake that this machine runs.
#include "../head_norm_gate_call.h"
#include "instance.h"

namespace {
using namespace Halide;
using namespace test;
using Instance = test::Instance<holdfast::HeadNormGateSizes>;

class HeadNormGate : public testing::TestWithParam<Instance> {};

TEST_P(HeadNormGate, MatchesReference) {
    const Instance &instance = GetParam();
    compile_and("head_norm_gate", instance, [&](const Callable &kernel) {
        for (const NormCase &c : norm_cases(true)) {
            if (instance.schedule == "none" && c.where == NormCase::is_x) continue;  // schedules see to it
            NormCall(c, instance.dtype).expect_reference(kernel);
        }
    });
}

HOLDFAST_INSTANCES(HeadNormGate,
                   instances_of_any_size<holdfast::HeadNormGateFuncs, holdfast::HeadNormGateSizes>("head_norm_gate"));

}  // namespace
