// Every compiled variant of rotate, called directly, on every case of rotate_call.h. What this machine cannot run is skipped, with
// the reason, unless HOLDFAST_REQUIRED_BACKENDS has it.
#include "../rotate_call.h"
#include "missing.h"

#include <kernels.h>

namespace {
using namespace test;

struct Variant {
    const char *name;
    Dtype dtype;
    const char *backend;
    int (*run)(const void *user_context, halide_buffer_t *x, halide_buffer_t *theta, halide_buffer_t *position,
               int32_t position_bits, uint32_t start, uint32_t start_upper, int32_t backward, halide_buffer_t *out);
};
#define HOLDFAST_VARIANT(kernel, name, dtype, chunk, key_size, value_size, target, ...) \
    {#name, dtype, backend_of(#target), name},
const std::vector<Variant> variants = {
#include <variants/rotate.inc>
};
#undef HOLDFAST_VARIANT
void PrintTo(const Variant &variant, std::ostream *stream) { *stream << variant.name; }

class Rotate : public testing::TestWithParam<Variant> {};

TEST_P(Rotate, MatchesReference) {
    const Variant &variant = GetParam();
    const std::string missing = reason_to_skip(variant), backend = variant.backend;
    if (!missing.empty()) GTEST_SKIP() << "this machine lacks " << missing;
    halide_set_error_handler([](void *, const char *text) { ADD_FAILURE() << text; });
    for (const RotateCase &c : rotate_cases(backend == "cpu"))
        RotateCall(c, variant.dtype).expect_reference([&](auto &&...arguments) { return variant.run(nullptr, arguments...); });
}

INSTANTIATE_TEST_SUITE_P(, Rotate, testing::ValuesIn(variants),
                         [](const auto &info) { return std::string(info.param.name) + "_cases"; });

}  // namespace
