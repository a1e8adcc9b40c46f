// The recurrent algorithm compiled just in time: without any schedule, and with every registered one, for each target of
// cmake/targets.cmake that this machine runs.
#include "../../generators/recurrent.h"
#include "../../schedules/schedule.h"
#include "../step_call.h"
#include "targets.h"

namespace {
using namespace Halide;
using namespace test;
using holdfast::RecurrentFuncs;
using holdfast::RecurrentSizes;
using Schedules = holdfast::Schedule<RecurrentFuncs, RecurrentSizes>;

struct Instance {
    std::string schedule;
    NamedTarget target;
    RecurrentSizes sizes;
    Size size;  // what the kernel is called with
    Dtype dtype;
};
std::string name(const Instance &i) {
    auto extent = [](int n) { return n ? std::to_string(n) : std::string("any"); };
    const std::string blocks = i.sizes.tokens == 1 ? "" : "_C" + std::to_string(i.sizes.tokens);
    return i.schedule + "_" + i.target.name + blocks + "_K" + extent(i.sizes.key) + "_V" + extent(i.sizes.value) + "_" +
           i.dtype.name;
}
void PrintTo(const Instance &i, std::ostream *stream) { *stream << name(i); }

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
    if (!missing(instance.target.target).empty()) GTEST_SKIP() << "this CPU lacks" << missing(instance.target.target);
    try {
        const GeneratorContext context(instance.target.target.with_feature(Target::JIT));
        const Callable kernel = create_callable_from_generator(context, "recurrent",
                                                               {{"dtype", instance.dtype.name},
                                                                {"key_size", std::to_string(instance.sizes.key)},
                                                                {"value_size", std::to_string(instance.sizes.value)},
                                                                {"chunk", std::to_string(instance.sizes.tokens)},
                                                                {"forced_schedule", instance.schedule}});
        for (const StepCase &c : step_cases(instance.sizes.tokens))
            StepCall(c, instance.size, instance.dtype).expect_reference(kernel);
    } catch (const Halide::Error &e) {
        FAIL() << e.what();
    }
}

INSTANTIATE_TEST_SUITE_P(, Recurrent, testing::ValuesIn(instances()), [](const auto &info) { return name(info.param); });

}  // namespace
