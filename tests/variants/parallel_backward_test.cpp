// Every compiled variant of parallel_backward, called directly, on every case of parallel_backward_call.h. What this machine cannot
// run is skipped, with the reason.
#include "../parallel_backward_call.h"
#include "variant.h"

namespace {
using namespace test;

const std::vector variants = rows({
#include <variants/parallel_backward.inc>
});
using Variant = decltype(variants)::value_type;
using Instance = Called<Variant, ParallelBackwardCase>;

std::vector<Instance> instances() {
    std::vector<Instance> list;
    for (const Variant &variant : variants) {
        std::vector<Size> sizes = {{3, 1}, {33, 17}, {64, 80}};
        if (variant.size.K && variant.size.V) sizes = {variant.size};
        // GPUs' stand-ins are slow: one size, and of 16 bits, which differ in how rows are read and written, few cases.
        const bool cpu = variant.on_cpu(), all = cpu || variant.dtype == f32;
        if (!cpu) sizes = {{5, 7}};
        for (Size size : sizes)
            for (const ParallelBackwardCase &c : parallel_backward_cases(variant.chunk))
                if ((size.K < 64 || c.degree <= 2) &&  // of more the reference takes seconds
                    (all || c.name == "layout_padded" || c.name == "degree_2"))
                    list.push_back({variant, size, c});
    }
    return list;
}

class ParallelBackward : public OfVariants<Instance> {};

TEST_P(ParallelBackward, MatchesReference) {
    const Instance &instance = GetParam();
    const Variant &variant = instance.variant;
    ParallelBackwardCall(instance.with, instance.size, variant.dtype).expect_reference(variant.run());
}

HOLDFAST_INSTANCES(ParallelBackward, instances());

}  // namespace
