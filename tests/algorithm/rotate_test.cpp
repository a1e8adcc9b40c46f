// The algorithm of rotation compiled just in time: without any schedule, and with every registered one, for each target of
// cmake/targets.cmake that this machine runs.
#include "../../generators/rotate.h"
#include "../../schedules/schedule.h"
#include "../rotate_call.h"
#include "targets.h"

namespace {
using namespace Halide;
using namespace test;
using Schedules = holdfast::Schedule<holdfast::RotateFuncs, holdfast::RotateSizes>;

struct Instance {
    std::string schedule;
    NamedTarget target;
    Dtype dtype;
};
std::string name(const Instance &i) { return i.schedule + "_" + i.target.name + "_" + i.dtype.name; }
void PrintTo(const Instance &i, std::ostream *stream) { *stream << name(i); }

std::vector<Instance> instances() {
    std::vector<Instance> list;
    for (const Dtype &dtype : all_dtypes) list.push_back({"none", targets().back(), dtype});
    for (const auto &schedule : Schedules::all())
        for (const NamedTarget &named : targets())
            if (compiled_for("rotate", schedule.rank, named) && schedule.matches(named.target, {}))
                list.push_back({schedule.name, named, f32});  // other types: variants/
    return list;
}

class Rotate : public testing::TestWithParam<Instance> {};

TEST_P(Rotate, MatchesReference) {
    const Instance &instance = GetParam();
    if (!missing(instance.target.target).empty()) GTEST_SKIP() << "this CPU lacks" << missing(instance.target.target);
    try {
        const GeneratorContext context(instance.target.target.with_feature(Target::JIT));
        const Callable kernel = create_callable_from_generator(
            context, "rotate", {{"dtype", instance.dtype.name}, {"forced_schedule", instance.schedule}});
        for (const RotateCase &c : rotate_cases(true)) {
            if (instance.schedule == "none" && c.in_place) continue;  // schedules see to it
            RotateCall(c, instance.dtype).expect_reference(kernel);
        }
    } catch (const Halide::Error &e) {
        FAIL() << e.what();
    }
}

INSTANTIATE_TEST_SUITE_P(, Rotate, testing::ValuesIn(instances()), [](const auto &info) { return name(info.param); });

}  // namespace
