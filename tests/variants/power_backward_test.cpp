// Every compiled variant of power_backward, called directly, on every case of power_backward_call.h. What this machine cannot run is
// skipped, with the reason; a GPU backend that HOLDFAST_REQUIRED_BACKENDS names may not be.
#include "../power_backward_call.h"
#include "missing.h"

#include <kernels.h>

namespace {
using namespace test;

using Buffer = halide_buffer_t;
struct Variant {
    const char *name;
    Dtype dtype;
    int degree, chunk;  // degree 0: any
    Size size;          // 0: any
    const char *backend;
    int (*run)(const void *, Buffer *q, Buffer *k, Buffer *v, Buffer *log_decay, Buffer *state_in, Buffer *keys_in, Buffer *out,
               Buffer *dout, Buffer *dstate_out, Buffer *dkeys_out, int32_t degree, int32_t normalize, float scale,
               int32_t want_dq, int32_t want_dk, int32_t want_dv, int32_t want_dlog_decay, int32_t want_dstate, Buffer *dq,
               Buffer *dk, Buffer *dv, Buffer *dlog_decay, Buffer *dstate_in, Buffer *dkeys_in);
};
void PrintTo(const Variant &v, std::ostream *stream) { *stream << v.name; }

#define HOLDFAST_VARIANT(kernel, name, dtype, chunk, key_size, value_size, target, row_alignment, round_operands, degree) \
    {#name, dtype, degree, chunk, {key_size, value_size}, backend_of(#target), name},
const std::vector<Variant> variants = {
#include <variants/power_backward.inc>
};
#undef HOLDFAST_VARIANT

constexpr Size sizes_of_any[] = {{1, 1}, {5, 7}, {16, 33}};  // D grows with the degree

class PowerBackward : public testing::TestWithParam<Variant> {};
TEST_P(PowerBackward, MatchesReference) {
    const Variant &variant = GetParam();
    const std::string missing = reason_to_skip(variant), backend = variant.backend;
    if (!missing.empty()) GTEST_SKIP() << "this machine lacks " << missing;
    halide_set_error_handler([](void *, const char *text) { ADD_FAILURE() << text; });
    std::vector<int> degrees = {1, 2, 3, 4};
    std::vector<Size> sizes(std::begin(sizes_of_any), std::end(sizes_of_any));
    if (backend != "cpu") degrees = {2, 3}, sizes = {{5, 7}};  // their stand-ins are slow
    if (variant.degree) degrees = {variant.degree};
    if (variant.size.K) sizes = {variant.size};
    // Of a size that is tuned, where the reference takes long, those that the others are part of; and of 16 bits on a stand-in.
    const std::string enough = "gates_resets layout_padded unwanted_1 unwanted_5 unwanted_6 ones huge in_place";
    const bool all = variant.size.K == 0 && (backend == "cpu" || variant.dtype == f32);
    if (backend != "cpu" && !all) degrees = {2};
    for (int degree : degrees)
        for (Size size : sizes) {
            if (!variant.size.K && size.K > 8 && degree > 2) continue;
            for (const PowerBackwardCase &c : power_backward_cases(variant.chunk, variant.dtype)) {
                if (backend != "cpu" && degree != 2 && c.name != "layout_padded") continue;
                if ((all || enough.find(c.name) != std::string::npos) && not_on(backend, c.layout).empty())
                    PowerBackwardCall(c, size, degree, variant.dtype, variant.size.V)
                        .expect_reference([&](auto &&...arguments) { return variant.run(nullptr, arguments...); });
            }
        }
}
INSTANTIATE_TEST_SUITE_P(, PowerBackward, testing::ValuesIn(variants), [](const auto &info) { return info.param.name; });

}  // namespace
