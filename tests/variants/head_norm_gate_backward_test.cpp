// Every compiled variant of head_norm_gate_backward, called directly, on every case of head_norm_gate_backward_call.h. What this machine cannot run is skipped, with
// the reason, unless HOLDFAST_REQUIRED_BACKENDS has it.
#include "../head_norm_gate_backward_call.h"
#include "missing.h"

#include <kernels.h>

namespace {
using namespace test;

struct Variant {
    const char *name;
    Dtype dtype;
    const char *backend;
    int (*run)(const void *user_context, halide_buffer_t *x, halide_buffer_t *gate, halide_buffer_t *weight,
               halide_buffer_t *dout, int32_t layer_norm, int32_t gated, int32_t weighted, float eps, int32_t want_dx,
               int32_t want_dgate, int32_t want_dweight, int32_t add_dweight, halide_buffer_t *dx, halide_buffer_t *dgate,
               halide_buffer_t *dweight);
};
#define HOLDFAST_VARIANT(kernel, name, dtype, chunk, key_size, value_size, target, ...) \
    {#name, dtype, backend_of(#target), name},
const std::vector<Variant> variants = {
#include <variants/head_norm_gate_backward.inc>
};
#undef HOLDFAST_VARIANT
void PrintTo(const Variant &variant, std::ostream *stream) { *stream << variant.name; }

class HeadNormGateBackward : public testing::TestWithParam<Variant> {};

TEST_P(HeadNormGateBackward, MatchesReference) {
    const Variant &variant = GetParam();
    const std::string missing = reason_to_skip(variant), backend = variant.backend;
    if (!missing.empty()) GTEST_SKIP() << "this machine lacks " << missing;
    halide_set_error_handler([](void *, const char *text) { ADD_FAILURE() << text; });
    for (const NormBackwardCase &c : norm_backward_cases(backend == "cpu"))
        NormBackwardCall(c, variant.dtype).expect_reference([&](auto &&...arguments) {
            return variant.run(nullptr, arguments...);
        });
}

INSTANTIATE_TEST_SUITE_P(, HeadNormGateBackward, testing::ValuesIn(variants),
                         [](const auto &info) { return std::string(info.param.name) + "_cases"; });

}  // namespace
