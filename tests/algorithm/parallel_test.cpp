// The parallel algorithm compiled just in time with every registered schedule, for one target of cmake/targets.cmake. Without any
// schedule, sums within sums are inlined: that takes Halide half a minute. Small blocks and sizes, where every index is an edge.
#include "../parallel_call.h"
#include "instance.h"

namespace {
using namespace Halide;
using namespace test;
using holdfast::ParallelFuncs;
using holdfast::ParallelSizes;
using Schedules = holdfast::Schedule<ParallelFuncs, ParallelSizes>;
using Instance = test::Instance<ParallelSizes>;

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
    compile_and("parallel", instance, [&](const Callable &kernel) {
        for (const ParallelCase &c : parallel_cases(sizes.block, instance.size.K))
            ParallelCall(c, sizes.block, instance.size, instance.dtype).expect_reference(kernel);
    });
}

HOLDFAST_INSTANCES(Parallel, instances());

}  // namespace
