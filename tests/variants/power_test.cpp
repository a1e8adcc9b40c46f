// Every compiled variant of power and of power_step, called directly, on every case of power_call.h. What this machine cannot
// run is skipped, with the reason; a GPU backend that HOLDFAST_REQUIRED_BACKENDS names may not be.
#include "../power_call.h"
#include "variant.h"

namespace {
using namespace test;

const std::vector chunk_variants = rows({
#include <variants/power.inc>
});
const std::vector step_variants = rows({
#include <variants/power_step.inc>
});
using ChunkVariant = decltype(chunk_variants)::value_type;
using StepVariant = decltype(step_variants)::value_type;

constexpr Size sizes_of_any[] = {{1, 1}, {5, 7}, {16, 33}};  // D grows with the degree

/// All cases of a variant, of sizes and degrees that it takes, by `call(PowerCall)`.
template<class Variant, class Call>
void expect_reference(const Variant &variant, int chunk, const Call &call) {
    constexpr bool of_chunks = std::is_same_v<Variant, ChunkVariant>;
    std::vector<int> degrees = {1, 2, 3, 4};
    std::vector<Size> sizes(std::begin(sizes_of_any), std::end(sizes_of_any));
    if (!variant.on_cpu()) degrees = {2, 3}, sizes = {{5, 7}};  // their stand-ins are slow
    if (variant.degree) degrees = {variant.degree};
    if (variant.size.K) sizes = {variant.size};
    // Of a size that is tuned, where the reference takes long, those that the others are part of; and of 16 bits on a stand-in.
    const std::string enough =
        "gates_weak gates_resets layout_padded ones huge in_place in_place_no_queries faint_queries queries_of_zero";
    const bool all = variant.size.K == 0 && (variant.on_cpu() || variant.dtype == f32);
    if (!variant.on_cpu() && !all) degrees = {2};
    for (int degree : degrees)
        for (Size size : sizes) {
            if (!variant.size.K && size.K > 8 && degree > 2) continue;
            for (const PowerCase &c : power_cases(chunk, variant.dtype))
                if ((of_chunks || !c.no_queries) && (all || enough.find(c.name) != std::string::npos) &&
                    not_on(variant.backend, c.layout).empty())
                    call(PowerCall(c, size, degree, variant.dtype, of_chunks && variant.size.V));
        }
}

class Power : public OfVariants<ChunkVariant> {};
TEST_P(Power, MatchesReference) {
    expect_reference(GetParam(), GetParam().chunk, [&](PowerCall call) { call.expect_reference(GetParam().run()); });
}
HOLDFAST_INSTANCES(Power, chunk_variants);

class PowerStep : public OfVariants<StepVariant> {};
TEST_P(PowerStep, MatchesReference) {
    expect_reference(GetParam(), 8, [&](PowerCall call) { call.expect_reference(token_by_token(GetParam().run())); });
}
HOLDFAST_INSTANCES(PowerStep, step_variants);

}  // namespace
