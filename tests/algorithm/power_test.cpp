// The power algorithms, of a chunk and of a token, compiled just in time: without any schedule, and with every registered one, for each target of
// cmake/targets.cmake that this machine runs. Small chunks and sizes, where every index is an edge.
#include "../power_call.h"
#include "instance.h"

namespace {
using namespace Halide;
using namespace test;
using holdfast::PowerFuncs;
using holdfast::PowerSizes;
using Schedules = holdfast::Schedule<PowerFuncs, PowerSizes>;
using Instance = test::Instance<PowerSizes>;

std::vector<Instance> instances() {
    const NamedTarget plain = targets().back();
    std::vector<Instance> list = {
        {"none", plain, {2, 4, 3, 5, 4, 2}, {3, 5}, f32, {2}},  // degree, chunk, K, V, block, causal tile
        {"none", plain, {3, 4, 3, 5, 5, 4}, {3, 5}, f32, {3}},
        {"none", plain, {0, 4, 0, 0, 8, 2}, {4, 3}, bf16, {1, 2, 3, 4}},
    };
    const std::vector<std::pair<PowerSizes, Size>> scheduled = {
        {{0, 8, 0, 0, 16, 8}, {5, 17}}, {{2, 64, 16, 32, 34, 16}, {16, 32}}, {{3, 64, 16, 64, 48, 64}, {16, 64}}};
    for (const auto &schedule : Schedules::all())
        for (const NamedTarget &named : targets())
            for (const auto &[sizes, size] : scheduled)
                for (const Dtype &dtype : all_dtypes) {
                    if (!compiled_for("power", schedule.rank, named, dtype) || !schedule.matches(named.target, sizes) ||
                        (schedule.rank == 0 && sizes.degree))
                        continue;
                    const bool types = sizes.degree == (schedule.rank == 0 ? 0 : 2);
                    if (!(dtype == f32) && !types) continue;
                    std::vector<int> degrees = {sizes.degree};
                    if (!sizes.degree) degrees = dtype == f32 ? std::vector<int>{1, 2, 3, 4} : std::vector<int>{2};
                    list.push_back({schedule.name, named, sizes, size, dtype, degrees});
                }
    return list;
}

class Power : public testing::TestWithParam<Instance> {};

TEST_P(Power, MatchesReference) {
    const Instance &instance = GetParam();
    const PowerSizes &sizes = instance.sizes;
    compile_and("power", instance, [&](const Callable &kernel) {
        for (int degree : instance.degrees)
            for (const PowerCase &c : power_cases(sizes.chunk, instance.dtype))
                // Faint ones need `queries` stored: generators/power.h; that states may lie in one place schedules see to.
                if (instance.schedule != "none" || (c.size_of_queries.empty() && !c.in_place))
                    PowerCall(c, instance.size, degree, instance.dtype, sizes.value > 0).expect_reference(kernel);
    });
}

using StepInstance = test::Instance<holdfast::PowerStepSizes>;

std::vector<StepInstance> step_instances() {
    const NamedTarget plain = targets().back();
    std::vector<StepInstance> list = {{"none", plain, {0, 0, 0}, {4, 3}, f32, {1, 2, 3, 4}}};
    const std::vector<std::pair<holdfast::PowerStepSizes, Size>> scheduled = {{{0, 0, 0}, {5, 17}}, {{2, 16, 48}, {16, 48}}};
    for (const auto &schedule : holdfast::Schedule<holdfast::PowerStepFuncs, holdfast::PowerStepSizes>::all())
        for (const NamedTarget &named : targets())
            for (const auto &[sizes, size] : scheduled)
                if (compiled_for("power_step", schedule.rank, named) && schedule.matches(named.target, sizes) &&
                    (schedule.rank > 0) == (sizes.degree > 0))
                    list.push_back({schedule.name, named, sizes, size, f32,
                                    sizes.degree ? std::vector<int>{2} : std::vector<int>{1, 2, 3, 4}});
    return list;
}

class PowerStep : public testing::TestWithParam<StepInstance> {};

TEST_P(PowerStep, MatchesReference) {
    const StepInstance &instance = GetParam();
    compile_and("power_step", instance, [&](const Callable &kernel) {
        for (int degree : instance.degrees)
            for (const PowerCase &c : power_cases(8, f32))
                if (!c.no_queries)
                    PowerCall(c, instance.size, degree).expect_reference(token_by_token([&](auto &&...arguments) {
                        return kernel(arguments...);
                    }));
    });
}

HOLDFAST_INSTANCES(PowerStep, step_instances());
HOLDFAST_INSTANCES(Power, instances());

}  // namespace
