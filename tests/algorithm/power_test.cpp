// The power algorithms, of a chunk and of a token, compiled just in time: without any schedule, and with every registered one, for each target of
// cmake/targets.cmake that this machine runs. Small chunks and sizes, where every index is an edge.
#include "../../generators/power.h"
#include "../../generators/power_step.h"
#include "../../schedules/schedule.h"
#include "../power_call.h"
#include "targets.h"

namespace {
using namespace Halide;
using namespace test;
using holdfast::PowerFuncs;
using holdfast::PowerSizes;
using Schedules = holdfast::Schedule<PowerFuncs, PowerSizes>;

struct Instance {
    std::string schedule;
    NamedTarget target;
    PowerSizes sizes;
    Size size;                 // what the kernel is called with,
    std::vector<int> degrees;  // one after the other
    Dtype dtype;
};
std::string name(const Instance &i) {
    auto extent = [](int n) { return n ? std::to_string(n) : std::string("any"); };
    return i.schedule + "_" + i.target.name + "_p" + extent(i.sizes.degree) + "_C" + extent(i.sizes.chunk) + "_K" +
           extent(i.sizes.key) + "_V" + extent(i.sizes.value) + "_block" + extent(i.sizes.block) + "_" + i.dtype.name;
}
void PrintTo(const Instance &i, std::ostream *stream) { *stream << name(i); }

std::vector<Instance> instances() {
    const NamedTarget plain = targets().back();
    std::vector<Instance> list = {
        {"none", plain, {2, 4, 3, 5, 4, 2}, {3, 5}, {2}, f32},  // degree, chunk, K, V, block, causal tile
        {"none", plain, {3, 4, 3, 5, 5, 4}, {3, 5}, {3}, f32},
        {"none", plain, {0, 4, 0, 0, 8, 2}, {4, 3}, {1, 2, 3, 4}, bf16},
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
                    list.push_back({schedule.name, named, sizes, size, degrees, dtype});
                }
    return list;
}

class Power : public testing::TestWithParam<Instance> {};

TEST_P(Power, MatchesReference) {
    const Instance &instance = GetParam();
    const PowerSizes &sizes = instance.sizes;
    if (!missing(instance.target.target).empty()) GTEST_SKIP() << "this CPU lacks" << missing(instance.target.target);
    try {
        const GeneratorContext context(instance.target.target.with_feature(Target::JIT));
        const Callable kernel = create_callable_from_generator(context, "power",
                                                               {{"dtype", instance.dtype.name},
                                                                {"degree", std::to_string(sizes.degree)},
                                                                {"chunk", std::to_string(sizes.chunk)},
                                                                {"key_size", std::to_string(sizes.key)},
                                                                {"value_size", std::to_string(sizes.value)},
                                                                {"block", std::to_string(sizes.block)},
                                                                {"causal_tile", std::to_string(sizes.causal_tile)},
                                                                {"forced_schedule", instance.schedule}});
        for (int degree : instance.degrees)
            for (const PowerCase &c : power_cases(sizes.chunk, instance.dtype))
                // Faint ones need `queries` stored: generators/power.h.
                if (instance.schedule != "none" || c.size_of_queries.empty())
                    PowerCall(c, instance.size, degree, instance.dtype, sizes.value > 0).expect_reference(kernel);
    } catch (const Halide::Error &e) {
        FAIL() << e.what();
    }
}

struct StepInstance {
    std::string schedule;
    NamedTarget target;
    holdfast::PowerStepSizes sizes;
    Size size;
    std::vector<int> degrees;
};
std::string name(const StepInstance &i) {
    return i.schedule + "_" + i.target.name + "_p" + std::to_string(i.sizes.degree) + "_K" + std::to_string(i.sizes.key) +
           "_V" + std::to_string(i.sizes.value);
}
void PrintTo(const StepInstance &i, std::ostream *stream) { *stream << name(i); }

std::vector<StepInstance> step_instances() {
    const NamedTarget plain = targets().back();
    std::vector<StepInstance> list = {{"none", plain, {0, 0, 0}, {4, 3}, {1, 2, 3, 4}}};
    const std::vector<std::pair<holdfast::PowerStepSizes, Size>> scheduled = {{{0, 0, 0}, {5, 17}}, {{2, 16, 48}, {16, 48}}};
    for (const auto &schedule : holdfast::Schedule<holdfast::PowerStepFuncs, holdfast::PowerStepSizes>::all())
        for (const NamedTarget &named : targets())
            for (const auto &[sizes, size] : scheduled)
                if (compiled_for("power_step", schedule.rank, named) && schedule.matches(named.target, sizes) &&
                    (schedule.rank > 0) == (sizes.degree > 0))
                    list.push_back(
                        {schedule.name, named, sizes, size, sizes.degree ? std::vector<int>{2} : std::vector<int>{1, 2, 3, 4}});
    return list;
}

class PowerStep : public testing::TestWithParam<StepInstance> {};

TEST_P(PowerStep, MatchesReference) {
    const StepInstance &instance = GetParam();
    if (!missing(instance.target.target).empty()) GTEST_SKIP() << "this CPU lacks" << missing(instance.target.target);
    try {
        const GeneratorContext context(instance.target.target.with_feature(Target::JIT));
        const Callable kernel = create_callable_from_generator(context, "power_step",
                                                               {{"degree", std::to_string(instance.sizes.degree)},
                                                                {"key_size", std::to_string(instance.sizes.key)},
                                                                {"value_size", std::to_string(instance.sizes.value)},
                                                                {"forced_schedule", instance.schedule}});
        for (int degree : instance.degrees)
            for (const PowerCase &c : power_cases(8, f32))
                if (!c.no_queries)
                    PowerCall(c, instance.size, degree).expect_reference(token_by_token([&](auto &&...arguments) {
                        return kernel(arguments...);
                    }));
    } catch (const Halide::Error &e) {
        FAIL() << e.what();
    }
}

INSTANTIATE_TEST_SUITE_P(, PowerStep, testing::ValuesIn(step_instances()), [](const auto &info) { return name(info.param); });
INSTANTIATE_TEST_SUITE_P(, Power, testing::ValuesIn(instances()), [](const auto &info) { return name(info.param); });

}  // namespace
