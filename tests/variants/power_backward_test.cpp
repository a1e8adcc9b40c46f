// Every compiled variant of power_backward, called directly, on every case of power_backward_call.h. What this machine cannot run is
// skipped, with the reason; a GPU backend that HOLDFAST_REQUIRED_BACKENDS names may not be.
#include "../power_backward_call.h"
#include "variant.h"

namespace {
using namespace test;

using Buffer = halide_buffer_t;
const std::vector variants = rows({
#include <variants/power_backward.inc>
});
using Variant = decltype(variants)::value_type;

constexpr Size sizes_of_any[] = {{1, 1}, {5, 7}, {16, 33}};  // D grows with the degree

class PowerBackward : public OfVariants<Variant> {};
TEST_P(PowerBackward, MatchesReference) {
    const Variant &variant = GetParam();
    std::vector<int> degrees = {1, 2, 3, 4};
    std::vector<Size> sizes(std::begin(sizes_of_any), std::end(sizes_of_any));
    if (!variant.on_cpu()) degrees = {2, 3}, sizes = {{5, 7}};  // their stand-ins are slow
    if (variant.degree) degrees = {variant.degree};
    if (variant.size.K) sizes = {variant.size};
    // Of a size that is tuned, where the reference takes long, those that the others are part of; and of 16 bits on a stand-in.
    const std::string enough = "gates_resets layout_padded unwanted_1 unwanted_5 unwanted_6 ones huge in_place";
    const bool all = variant.size.K == 0 && (variant.on_cpu() || variant.dtype == f32);
    if (!variant.on_cpu() && !all) degrees = {2};
    for (int degree : degrees)
        for (Size size : sizes) {
            if (!variant.size.K && size.K > 8 && degree > 2) continue;
            for (const PowerBackwardCase &c : power_backward_cases(variant.chunk, variant.dtype)) {
                if (!variant.on_cpu() && degree != 2 && c.name != "layout_padded") continue;
                if ((all || enough.find(c.name) != std::string::npos) && not_on(variant.backend, c.layout).empty())
                    PowerBackwardCall(c, size, degree, variant.dtype, variant.size.V).expect_reference(variant.run());
            }
        }
}
HOLDFAST_INSTANCES(PowerBackward, variants);

}  // namespace
