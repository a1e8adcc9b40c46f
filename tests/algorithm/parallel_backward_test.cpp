// The gradient of the parallel form compiled just in time with every registered schedule, for one target of cmake/targets.cmake:
// small blocks and sizes, where every index is an edge.
#include "../../generators/parallel_backward.h"
#include "../../schedules/schedule.h"
#include "../parallel_backward_call.h"
#include "targets.h"

namespace {
using namespace Halide;
using namespace test;
using holdfast::ParallelBackwardFuncs;
using holdfast::ParallelSizes;
using Schedules = holdfast::Schedule<ParallelBackwardFuncs, ParallelSizes>;

struct Instance {
    std::string schedule;
    NamedTarget target;
    ParallelSizes sizes;
    Size size;  // what the kernel is called with
};
std::string name(const Instance &i) {
    auto extent = [](int n) { return n ? std::to_string(n) : std::string("any"); };
    return i.schedule + "_" + i.target.name + "_C" + extent(i.sizes.block) + "_K" + extent(i.sizes.key) + "_V" +
           extent(i.sizes.value);
}
void PrintTo(const Instance &i, std::ostream *stream) { *stream << name(i); }

std::vector<Instance> instances() {
    std::vector<Instance> list;
    const std::vector<std::pair<ParallelSizes, Size>> small =
                                                          {// block, K, V, causal tile
                                                           {{4, 3, 5, 4}, {3, 5}},
                                                           {{7, 0, 0, 7}, {9, 17}}},
                                                      tuned = {{{32, 0, 0, 32}, {18, 33}}};
    for (const auto &schedule : Schedules::all())
        for (const auto &[sizes, size] : schedule.rank > 0 ? tuned : small)
            for (const NamedTarget &named : targets())
                if (compiled_for("parallel_backward", schedule.rank, named) &&
                    (schedule.rank == 0 || best_here("parallel_backward", named)) && schedule.matches(named.target, sizes))
                    list.push_back({schedule.name, named, sizes, size});
    return list;
}

class ParallelBackward : public testing::TestWithParam<Instance> {};

TEST_P(ParallelBackward, MatchesReference) {
    const Instance &instance = GetParam();
    const ParallelSizes &sizes = instance.sizes;
    try {
        const GeneratorContext context(instance.target.target.with_feature(Target::JIT));
        const Callable kernel = create_callable_from_generator(context, "parallel_backward",
                                                               {{"chunk", std::to_string(sizes.block)},
                                                                {"key_size", std::to_string(sizes.key)},
                                                                {"value_size", std::to_string(sizes.value)},
                                                                {"forced_schedule", instance.schedule}});
        for (const ParallelBackwardCase &c : parallel_backward_cases(sizes.block))
            ParallelBackwardCall(c, instance.size).expect_reference(kernel);
    } catch (const Halide::Error &e) {
        FAIL() << e.what();
    }
}

INSTANTIATE_TEST_SUITE_P(, ParallelBackward, testing::ValuesIn(instances()), [](const auto &info) { return name(info.param); });

}  // namespace
