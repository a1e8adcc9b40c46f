// The chunkwise algorithm compiled just in time: without any schedule, and with every registered one, for each target of
// cmake/targets.cmake that this machine runs. Small chunks and sizes, where every index is an edge.
#include "../kernel_call.h"
#include "instance.h"

namespace {
using namespace Halide;
using namespace test;
using holdfast::ChunkwiseFuncs;
using holdfast::ChunkwiseSizes;
using Schedules = holdfast::Schedule<ChunkwiseFuncs, ChunkwiseSizes>;
using Instance = test::Instance<ChunkwiseSizes>;

std::vector<Instance> instances() {
    const std::vector<Instance> unscheduled = {
        {"none", targets().back(), {4, 3, 5, 4}, {3, 5}, f32},  // chunk, K, V, causal tile
        {"none", targets().back(), {4, 3, 5, 2}, {3, 5}, f32},
        {"none", targets().back(), {4, 0, 0, 4}, {5, 3}, f32},
        {"none", targets().back(), {1, 1, 1, 1}, {1, 1}, f32},
        {"none", targets().back(), {4, 0, 0, 2}, {3, 5}, f16},
        {"none", targets().back(), {4, 0, 0, 2}, {3, 5}, bf16},
        {"generic", targets().back(), {8, 16, 24, 8, holdfast::Dtype::f16}, {16, 24}, f16},
        {"generic", targets().back(), {8, 16, 24, 8, holdfast::Dtype::bf16}, {16, 24}, bf16},
    };
    const std::vector<std::pair<ChunkwiseSizes, Size>> scheduled = {
        {{4, 3, 5, 2}, {3, 5}}, {{7, 0, 0, 7}, {9, 17}}, {{32, 16, 32, 8}, {16, 32}}, {{64, 32, 64, 16}, {32, 64}}};
    std::vector<Instance> list = unscheduled;
    for (const auto &schedule : Schedules::all())
        for (const NamedTarget &named : targets())
            for (const auto &[sizes, size] : scheduled)
                for (const Dtype &dtype : all_dtypes) {
                    const bool types = sizes.chunk == (schedule.rank == 0 ? 7 : 32);
                    if ((dtype == f32 || types) && compiled_for("chunkwise", schedule.rank, named, dtype) &&
                        schedule.matches(named.target, sizes))
                        list.push_back({schedule.name, named, sizes, size, dtype});
                }
    return list;
}

class Chunkwise : public testing::TestWithParam<Instance> {};

TEST_P(Chunkwise, MatchesReference) {
    const Instance &instance = GetParam();
    const ChunkwiseSizes &sizes = instance.sizes;
    compile_and("chunkwise", instance, [&](const Callable &kernel) {
        for (const KernelCase &c : kernel_cases(sizes.chunk))
            KernelCall(c, sizes.chunk, instance.size, instance.dtype, {1, rounded(sizes)}).expect_reference(kernel);
    });
}

HOLDFAST_INSTANCES(Chunkwise, instances());

}  // namespace
