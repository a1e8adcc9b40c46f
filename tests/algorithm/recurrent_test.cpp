// The recurrent algorithm compiled just in time: without any schedule, and with every registered one, for each target of
// cmake/targets.cmake that this machine runs.
#include "../step_call.h"
#include "instance.h"

namespace {
using namespace Halide;
using namespace test;
using holdfast::RecurrentFuncs;
using holdfast::RecurrentSizes;
using Schedules = holdfast::Schedule<RecurrentFuncs, RecurrentSizes>;
using Instance = test::Instance<RecurrentSizes>;

std::vector<Instance> instances() {
    const std::pair<RecurrentSizes, Size> sizes[] = {{{1, 1, 1}, {1, 1}},   {{3, 5, 1}, {3, 5}},     {{0, 0, 1}, {9, 17}},
                                                     {{4, 16, 1}, {4, 16}}, {{64, 48, 1}, {64, 48}}, {{8, 256, 1}, {8, 256}},
                                                     {{0, 0, 3}, {9, 17}},  {{4, 16, 8}, {4, 16}},   {{64, 48, 8}, {64, 48}}};
    std::vector<Instance> list;
    for (const auto &[fixed, size] : sizes) list.push_back({"none", targets().back(), fixed, size, f32});
    for (const Dtype &dtype : {f16, bf16}) list.push_back({"none", targets().back(), {0, 0, 1}, {9, 17}, dtype});
    for (const auto &schedule : Schedules::all())
        for (const NamedTarget &named : targets())
            for (const auto &[fixed, size] : sizes)
                for (const Dtype &dtype : all_dtypes) {
                    const bool types = fixed.key == (schedule.rank == 0 ? 0 : 64) && fixed.tokens != 3;
                    if ((dtype == f32 || types) && compiled_for("recurrent", schedule.rank, named, dtype) &&
                        schedule.matches(named.target, fixed))
                        list.push_back({schedule.name, named, fixed, size, dtype});
                }
    return list;
}

class Recurrent : public testing::TestWithParam<Instance> {};

TEST_P(Recurrent, MatchesReference) {
    const Instance &instance = GetParam();
    compile_and("recurrent", instance, [&](const Callable &kernel) {
        for (const StepCase &c : step_cases(instance.sizes.tokens))
            StepCall(c, instance.size, instance.dtype).expect_reference(kernel);
    });
}

HOLDFAST_INSTANCES(Recurrent, instances());

}  // namespace
