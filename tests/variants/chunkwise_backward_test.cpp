// Every compiled variant of chunkwise_backward, called directly, on every case of kernel_call.h. What this machine cannot run is
// skipped, with the reason; a GPU backend that HOLDFAST_REQUIRED_BACKENDS names may not be.
#include "../backward_call.h"
#include "variant.h"

namespace {
using namespace test;
using Buffer = halide_buffer_t;

const std::vector variants = rows({
#include <variants/chunkwise_backward.inc>
});
using Variant = decltype(variants)::value_type;
using Instance = Called<Variant, KernelCase>;

std::vector<Instance> instances() {
    std::vector<Instance> list;
    for (const Variant &variant : variants) {
        std::vector<Size> sizes(std::begin(odd_sizes), std::end(odd_sizes));
        if (variant.size.K && variant.size.V) sizes = {variant.size};
        for (Size size : sizes) {
            // GPUs' stand-ins are slow, as in chunkwise_test.cpp; of the forward's stages they have met all cases there.
            const bool all = variant.on_cpu();
            if (!all && (size.K < 5 || (!(variant.dtype == f32) && size.K != 33))) continue;
            const bool few = !all && size.K >= 64;
            for (const KernelCase &c : kernel_cases(variant.chunk))
                if (!c.states_alone &&
                    (all || c.name == "packed" || (c.name == "gates_resets" && !few) || c.name == "layout_padded"))
                    list.push_back({variant, size, c});
        }
    }
    return list;
}

class ChunkwiseBackward : public OfVariants<Instance> {};

TEST_P(ChunkwiseBackward, MatchesReference) {
    const Instance &instance = GetParam();
    const Variant &variant = instance.variant;
    std::vector<Wants> wants = {{}};  // what is left out does not depend on the size, of which the reference takes its time
    const bool large = instance.size.K * instance.size.V > 64 * 64;
    if (!large && (instance.with.name == "packed" || instance.with.name == "groups"))
        for (const Wants &some : some_wants()) wants.push_back(some);
    for (const Wants &w : wants)
        BackwardCall(instance.with, variant.chunk, instance.size, variant.dtype, w, variant.rounds_operands)
            .expect_reference(variant.run());
}

HOLDFAST_INSTANCES(ChunkwiseBackward, instances());

// What the project holds of gradients, with weak gates, where errors that cross chunks show: they are not forgotten.
class Accuracy : public OfVariants<Variant> {};

TEST_P(Accuracy, RelativeErrors) {
    const Variant &variant = GetParam();
    const bool large = variant.size.K * variant.size.V > 64 * 64;  // of which the reference takes its time
    const int64_t T = large ? 256 : 1024, H = large ? 1 : 4;
    for (Gates gates : {Gates::per_head, Gates::weak}) {
        SCOPED_TRACE(name(gates));
        BackwardCall call({name(gates), {T}, 1, H, Layout::compact, gates, 0}, variant.chunk, variant.size, variant.dtype);
        const auto error = call.relative_errors(variant.run());
        EXPECT_LE(error.rows, tolerance::relative_rms_of_gradient_of_rows(variant.dtype));
        EXPECT_LE(error.decays, variant.rounds_operands ? tolerance::relative_rms_of_rounded_gates(variant.dtype, T)
                                                        : tolerance::relative_rms_of_gradient);
        EXPECT_LE(error.states, tolerance::relative_rms_of_gradient);
    }
}

std::vector<Variant> accurate_variants() {
    std::vector<Variant> list;
    for (const Variant &v : variants)
        if ((v.dtype == f32 || v.rounds_operands) && v.size.K && v.on_cpu()) list.push_back(v);
    return list;
}
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(Accuracy);
HOLDFAST_INSTANCES(Accuracy, accurate_variants());

}  // namespace
