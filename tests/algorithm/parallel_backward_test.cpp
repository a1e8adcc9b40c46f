// The gradient of the parallel form compiled just in time with every registered schedule, for one target of cmake/targets.cmake:
// small blocks and sizes, where every index is an edge.
#include "../../generators/parallel_backward.h"
#include "../parallel_backward_call.h"
#include "instance.h"
#include "produced.h"

namespace {
using namespace Halide;
using namespace test;
using holdfast::ParallelBackwardFuncs;
using holdfast::ParallelSizes;
using Schedules = holdfast::Schedule<ParallelBackwardFuncs, ParallelSizes>;
using Instance = test::Instance<ParallelSizes>;

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
    compile_and("parallel_backward", instance, [&](const Callable &kernel) {
        for (const ParallelBackwardCase &c : parallel_backward_cases(sizes.block))
            ParallelBackwardCall(c, instance.size).expect_reference(kernel);
    });
}

HOLDFAST_INSTANCES(ParallelBackward, instances());

TEST(ParallelBackwardStages, AreComputedForWhatIsWantedAlone) {
    const Target target = targets().back().target.with_feature(Target::JIT).with_feature(Target::TraceStores);
    const Callable kernel = create_callable_from_generator(
        GeneratorContext(target), "parallel_backward",
        {{"chunk", "4"}, {"key_size", "0"}, {"value_size", "0"}, {"forced_schedule", "generic"}});
    for (const bool normalized : {false, true})
        for (int wanted = 0; wanted < 16; wanted++) {
            SCOPED_TRACE(testing::Message() << "normalized " << normalized << ", wanted " << wanted);
            const bool dq = wanted & 1, dk = wanted & 2, dv = wanted & 4, gates = wanted & 8;
            Produced produced;
            ParallelBackwardCall({"", 1, 6, 1, 1, Layout::compact, Gates::weak, 2, normalized, dq, dk, dv, gates}, {3, 5})
                .expect_reference([&](auto &&...arguments) { return kernel(produced.context(), arguments...); });
            auto expect = [&](const char *stage, bool needed) {
                EXPECT_EQ(produced.stages.count(stage), needed) << stage << " of " << testing::PrintToString(produced.stages);
            };
            const bool scores = dq || dk || gates;
            expect("pair_scores", wanted != 0), expect("dnum", wanted != 0);
            expect("sum", normalized && wanted != 0), expect("out_dout", normalized && scores);
            // Derived ones have the names that Halide gave them.
            expect("pair_weights_d_def__", scores), expect("pair_scores_d_def__", scores);
            expect("queries_of_pair_d_def__", dq || gates), expect("keys_of_pair_d_def__", dk || gates);
            expect("values_of_pair_d_def__", dv);
            for (const char *of_gates : {"q_dq", "k_dk", "ddecay_of_row", "ddecay_of_pair", "ddecay_of_later"})
                expect(of_gates, gates);
        }
}

}  // namespace
