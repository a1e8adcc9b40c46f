// Every compiled variant of chunkwise, called directly, on every case of kernel_call.h. What this machine cannot run is
// skipped, with the reason; a GPU backend that HOLDFAST_REQUIRED_BACKENDS names may not be.
#include "../kernel_call.h"
#include "variant.h"

namespace {
using namespace test;

const std::vector variants = rows({
#include <variants/chunkwise.inc>
});
using Variant = decltype(variants)::value_type;
using Instance = Called<Variant, KernelCase>;

Operands operands(const Variant &v) { return {v.row_alignment, v.rounds_operands}; }

std::vector<Instance> instances() {
    std::vector<Instance> list;
    for (const Variant &variant : variants) {
        std::vector<Size> sizes(std::begin(odd_sizes), std::end(odd_sizes));
        if (variant.size.K && variant.size.V) sizes = {variant.size};
        for (Size size : sizes) {
            // GPUs' stand-ins are slow: there, small sizes in fp32 meet all cases. Other types differ where rows are read and
            // written, and large sizes in how many blocks there are.
            const bool all = variant.on_cpu() || (variant.dtype == f32 && size.K < 64);
            if (!all && (size.K < 5 || (!(variant.dtype == f32) && !variant.size.K && size.K != 33))) continue;
            for (const KernelCase &c : kernel_cases(variant.chunk))
                if (all || c.name == "packed" || c.name == "gates_resets" || c.name == "layout_padded")
                    list.push_back({variant, size, c});
        }
    }
    return list;
}

class Chunkwise : public OfVariants<Instance> {};

TEST_P(Chunkwise, MatchesReference) {
    const Instance &instance = GetParam();
    const Variant &variant = instance.variant;
    KernelCall(instance.with, variant.chunk, instance.size, variant.dtype, operands(variant)).expect_reference(variant.run());
}

HOLDFAST_INSTANCES(Chunkwise, instances());

// Variants whose operands are rounded, over the decays for which the project holds numbers (tolerance.h): of 4096 tokens,
// for those of 64x64 that the library can choose here, in properties/numbers_test.cpp.
class Rounded : public OfVariants<Variant> {};

TEST_P(Rounded, RelativeErrorOf1024Tokens) {
    const Variant &variant = GetParam();
    const KernelCase retnet{"retnet", {1024}, 1, 8, Layout::compact, Gates::per_head, 0};
    const auto [out, state] =
        KernelCall(retnet, variant.chunk, variant.size, variant.dtype, operands(variant)).relative_errors(variant.run());
    EXPECT_LE(out, tolerance::relative_rms_of_out(variant.dtype));
    EXPECT_LE(state, tolerance::relative_rms_of_state(variant.dtype));
}

std::vector<Variant> rounded_variants() {
    std::vector<Variant> list;
    for (const Variant &v : variants)
        if (v.rounds_operands && v.size.K == 64 && v.size.V == 64 && v.on_cpu()) list.push_back(v);
    return list;
}
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(Rounded);
HOLDFAST_INSTANCES(Rounded, rounded_variants());

}  // namespace
