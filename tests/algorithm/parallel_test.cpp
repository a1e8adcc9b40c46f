// The parallel algorithm compiled just in time with every registered schedule, for one target of cmake/targets.cmake. Without any
// schedule, sums within sums are inlined: that takes Halide half a minute. Small blocks and sizes, where every index is an edge.
#include "../../generators/parallel.h"
#include "../../schedules/schedule.h"
#include "../parallel_call.h"
#include "targets.h"

namespace {
using namespace Halide;
using namespace test;
using holdfast::ParallelFuncs;
using holdfast::ParallelSizes;
using Schedules = holdfast::Schedule<ParallelFuncs, ParallelSizes>;

struct Instance {
    std::string schedule;
    NamedTarget target;
    ParallelSizes sizes;
    Size size;  // what the kernel is called with
    Dtype dtype;
};
std::string name(const Instance &i) {
    auto extent = [](int n) { return n ? std::to_string(n) : std::string("any"); };
    return i.schedule + "_" + i.target.name + "_C" + extent(i.sizes.block) + "_K" + extent(i.sizes.key) + "_V" +
           extent(i.sizes.value) + "_tile" + extent(i.sizes.causal_tile) + "_" + i.dtype.name;
}
void PrintTo(const Instance &i, std::ostream *stream) { *stream << name(i); }

std::vector<Instance> instances() {
    std::vector<Instance> list;
    // Each of these takes Halide five seconds and more: what another target would show is for the compiled variants.
    const std::vector<std::pair<ParallelSizes, Size>> small =
                                                          {// block, K, V, causal tile
                                                           {{4, 3, 5, 2}, {3, 5}},
                                                           {{7, 0, 0, 7}, {9, 17}}},
                                                      tuned = {{{32, 16, 32, 8}, {16, 32}}};
    for (const auto &schedule : Schedules::all())
        for (const auto &[sizes, size] : schedule.rank > 0 ? tuned : small)
            for (const NamedTarget &named : targets())
                if (compiled_for("parallel", schedule.rank, named) && (schedule.rank == 0 || best_here("parallel", named)) &&
                    schedule.matches(named.target, sizes))
                    list.push_back({schedule.name, named, sizes, size, f32});
    return list;
}

class Parallel : public testing::TestWithParam<Instance> {};

TEST_P(Parallel, MatchesReference) {
    const Instance &instance = GetParam();
    const ParallelSizes &sizes = instance.sizes;
    try {
        const GeneratorContext context(instance.target.target.with_feature(Target::JIT));
        const Callable kernel = create_callable_from_generator(context, "parallel",
                                                               {{"dtype", instance.dtype.name},
                                                                {"chunk", std::to_string(sizes.block)},
                                                                {"key_size", std::to_string(sizes.key)},
                                                                {"value_size", std::to_string(sizes.value)},
                                                                {"causal_tile", std::to_string(sizes.causal_tile)},
                                                                {"forced_schedule", instance.schedule}});
        for (const ParallelCase &c : parallel_cases(sizes.block, instance.size.K))
            ParallelCall(c, sizes.block, instance.size, instance.dtype).expect_reference(kernel);
    } catch (const Halide::Error &e) {
        FAIL() << e.what();
    }
}

INSTANTIATE_TEST_SUITE_P(, Parallel, testing::ValuesIn(instances()), [](const auto &info) { return name(info.param); });

}  // namespace
