// Every compiled variant of power and of power_step, called directly, on every case of power_call.h. What this machine cannot
// run is skipped, with the reason; a GPU backend that HOLDFAST_REQUIRED_BACKENDS names may not be.
#include "../power_call.h"
#include "missing.h"

#include <kernels.h>

namespace {
using namespace test;

template<class Kernel>
struct Variant {
    const char *name;
    Dtype dtype;
    int degree, chunk;  // degree 0: any
    Size size;          // 0: any
    const char *backend;
    Kernel *run;
};
using Buffer = halide_buffer_t;
using ChunkKernel = int(const void *, Buffer *q, Buffer *k, Buffer *v, Buffer *log_decay, Buffer *state_in, Buffer *keys_in,
                        int32_t degree, int32_t normalize, float scale, Buffer *out, Buffer *state_out, Buffer *keys_out);
using StepKernel = int(const void *, Buffer *q, Buffer *k, Buffer *v, Buffer *log_decay, int32_t block, int32_t blocks,
                       int32_t degree, int32_t normalize, float scale, Buffer *state, Buffer *sum, Buffer *keys,
                       Buffer *keys_before, Buffer *out);

#define HOLDFAST_VARIANT(kernel, name, dtype, chunk, key_size, value_size, target, row_alignment, round_operands, degree) \
    {#name, dtype, degree, chunk, {key_size, value_size}, backend_of(#target), name},
const std::vector<Variant<ChunkKernel>> chunk_variants = {
#include <variants/power.inc>
};
const std::vector<Variant<StepKernel>> step_variants = {
#include <variants/power_step.inc>
};
#undef HOLDFAST_VARIANT

constexpr Size sizes_of_any[] = {{1, 1}, {5, 7}, {16, 33}};  // D grows with the degree

template<class Kernel>
void PrintTo(const Variant<Kernel> &v, std::ostream *stream) {
    *stream << v.name;
}

/// All cases of a variant, of sizes and degrees that it takes, by `call(PowerCall)`.
template<class Kernel, class Call>
void expect_reference(const Variant<Kernel> &variant, int chunk, const Call &call) {
    constexpr bool of_chunks = std::is_same_v<Kernel, ChunkKernel>;
    const std::string missing = reason_to_skip(variant), backend = variant.backend;
    if (!missing.empty()) GTEST_SKIP() << "this machine lacks " << missing;
    halide_set_error_handler([](void *, const char *text) { ADD_FAILURE() << text; });
    std::vector<int> degrees = {1, 2, 3, 4};
    std::vector<Size> sizes(std::begin(sizes_of_any), std::end(sizes_of_any));
    if (backend != "cpu") degrees = {2, 3}, sizes = {{5, 7}};  // their stand-ins are slow
    if (variant.degree) degrees = {variant.degree};
    if (variant.size.K) sizes = {variant.size};
    // Of a size that is tuned, where the reference takes long, those that the others are part of; and of 16 bits on a stand-in.
    const std::string enough =
        "gates_weak gates_resets layout_padded ones huge no_queries in_place faint_queries queries_of_zero";
    const bool all = variant.size.K == 0 && (backend == "cpu" || variant.dtype == f32);
    if (backend != "cpu" && !all) degrees = {2};
    for (int degree : degrees)
        for (Size size : sizes) {
            if (!variant.size.K && size.K > 8 && degree > 2) continue;
            for (const PowerCase &c : power_cases(chunk, variant.dtype))
                if ((of_chunks || !c.no_queries) && (all || enough.find(c.name) != std::string::npos) &&
                    not_on(backend, c.layout).empty())
                    call(PowerCall(c, size, degree, variant.dtype, of_chunks && variant.size.V));
        }
}

class Power : public testing::TestWithParam<Variant<ChunkKernel>> {};
TEST_P(Power, MatchesReference) {
    expect_reference(GetParam(), GetParam().chunk, [&](PowerCall call) {
        call.expect_reference([&](auto &&...arguments) { return GetParam().run(nullptr, arguments...); });
    });
}
INSTANTIATE_TEST_SUITE_P(, Power, testing::ValuesIn(chunk_variants), [](const auto &info) { return info.param.name; });

class PowerStep : public testing::TestWithParam<Variant<StepKernel>> {};
TEST_P(PowerStep, MatchesReference) {
    expect_reference(GetParam(), 8, [&](PowerCall call) {
        call.expect_reference(token_by_token([&](auto &&...arguments) { return GetParam().run(nullptr, arguments...); }));
    });
}
INSTANTIATE_TEST_SUITE_P(, PowerStep, testing::ValuesIn(step_variants), [](const auto &info) { return info.param.name; });

}  // namespace
