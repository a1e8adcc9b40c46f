// The algorithm of rotation compiled just in time: without any schedule, and with every registered one, for each target of
// cmake/targets.cmake that this machine runs.
#include "../rotate_call.h"
#include "instance.h"

namespace {
using namespace Halide;
using namespace test;
using Instance = test::Instance<holdfast::RotateSizes>;

class Rotate : public testing::TestWithParam<Instance> {};

TEST_P(Rotate, MatchesReference) {
    const Instance &instance = GetParam();
    compile_and("rotate", instance, [&](const Callable &kernel) {
        for (const RotateCase &c : rotate_cases(true)) {
            if (instance.schedule == "none" && c.in_place) continue;  // schedules see to it
            RotateCall(c, instance.dtype).expect_reference(kernel);
        }
    });
}

HOLDFAST_INSTANCES(Rotate, instances_of_any_size<holdfast::RotateFuncs, holdfast::RotateSizes>("rotate"));

}  // namespace
