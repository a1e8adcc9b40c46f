// The gradient of the chunkwise algorithm compiled just in time: without any schedule, and with every registered one, for each
// target of cmake/targets.cmake that this machine runs. Small chunks and sizes, where every index is an edge.
#include "../../generators/chunkwise_backward.h"
#include "../backward_call.h"
#include "instance.h"
#include "produced.h"

namespace {
using namespace Halide;
using namespace test;
using holdfast::ChunkwiseBackwardFuncs;
using holdfast::ChunkwiseSizes;
using Schedules = holdfast::Schedule<ChunkwiseBackwardFuncs, ChunkwiseSizes>;
using Instance = test::Instance<ChunkwiseSizes>;

std::vector<Instance> instances() {
    std::vector<Instance> list = {
        {"none", targets().back(), {4, 4, 4, 2}, {4, 4}, f32},  // chunk, K, V, causal tile; sums of the same extent
        {"generic", targets().back(), {8, 5, 3, 2, holdfast::Dtype::bf16}, {5, 3}, bf16},
        {"generic", targets().back(), {8, 0, 0, 2, holdfast::Dtype::f16}, {5, 3}, f16},
    };
    // It takes seconds to compile one: small ones, where all is an edge, by the generic schedule, and a large one by
    // a tuned schedule for its best target only.
    const std::vector<std::pair<ChunkwiseSizes, Size>> plain = {{{4, 3, 5, 2}, {3, 5}}, {{7, 0, 0, 7}, {9, 17}}},
                                                       tuned = {{{32, 32, 32, 8}, {32, 32}},
                                                                {{32, 64, 32, 8, holdfast::Dtype::bf16}, {64, 32}},
                                                                {{64, 32, 64, 16}, {32, 64}}};
    const std::string kernel = "chunkwise_backward";
    for (const auto &schedule : Schedules::all())
        for (const NamedTarget &named : targets())
            for (const auto &[sizes, size] : schedule.rank == 0 ? plain : tuned)
                for (const Dtype &dtype : all_dtypes) {
                    if (!compiled_for(kernel, schedule.rank, named, dtype) || !schedule.matches(named.target, sizes)) continue;
                    if (!(dtype == f32) && sizes.chunk != (schedule.rank == 0 ? 7 : 32)) continue;
                    if (rounded(sizes) && !(dtype == bf16)) continue;
                    if (sizes.chunk == 64 && !best_here(kernel, named)) continue;
                    list.push_back({schedule.name, named, sizes, size, dtype});
                }
    return list;
}

class ChunkwiseBackward : public testing::TestWithParam<Instance> {};

TEST_P(ChunkwiseBackward, MatchesReference) {
    const Instance &instance = GetParam();
    const ChunkwiseSizes &sizes = instance.sizes;
    compile_and("chunkwise_backward", instance, [&](const Callable &kernel) {
        for (const KernelCase &c : kernel_cases(sizes.chunk)) {
            if (c.states_alone) continue;
            auto expect = [&](const Wants &wants) {
                BackwardCall(c, sizes.chunk, instance.size, instance.dtype, wants, rounded(sizes)).expect_reference(kernel);
            };
            expect({});
            if (c.name == "groups")
                for (const Wants &wants : some_wants()) expect(wants);
        }
    });
}

HOLDFAST_INSTANCES(ChunkwiseBackward, instances());

TEST(ChunkwiseBackwardStages, AreComputedForWhatIsWantedAlone) {
    const Target target = targets().back().target.with_feature(Target::JIT).with_feature(Target::TraceStores);
    const Callable kernel = create_callable_from_generator(
        GeneratorContext(target), "chunkwise_backward",
        {{"chunk", "4"}, {"key_size", "3"}, {"value_size", "5"}, {"causal_tile", "2"}, {"forced_schedule", "generic"}});
    const KernelCase c = kernel_cases(4).front();
    std::vector<Wants> all = some_wants();
    all.push_back({});
    for (const Wants &w : all) {
        SCOPED_TRACE(name(w));
        Produced produced;
        BackwardCall(c, 4, {3, 5}, f32, w).expect_reference([&](auto &&...arguments) {
            return kernel(produced.context(), arguments...);
        });
        auto expect = [&](const char *stage, bool needed) {
            EXPECT_EQ(produced.stages.count(stage), needed) << stage << " of " << testing::PrintToString(produced.stages);
        };
        for (const char *stage : {"state", "contribution"}) expect(stage, w.dq || w.dlog_decay);
        for (const char *stage : {"scores", "weights"}) expect(stage, w.dv);
        expect("dstate", w.dk || w.dv || w.dlog_decay || w.dstate);
        expect("mask", w.dq || w.dk || w.dv || w.dlog_decay);
        for (const char *stage : {"row_product", "key_product", "end_product"}) expect(stage, w.dlog_decay);
    }
}

}  // namespace
