// Every compiled variant of parallel, called directly, on every case of parallel_call.h. What this machine cannot run is
// skipped, with the reason; a GPU backend that HOLDFAST_REQUIRED_BACKENDS names may not be.
#include "../parallel_call.h"
#include "missing.h"

#include <holdfast/holdfast.h>
#include <kernels.h>
#include <string_view>

namespace {
using namespace test;

struct Variant {
    const char *name;
    Dtype dtype;
    int block;
    Size size;  // 0: any
    const char *backend;
    int (*run)(const void *user_context, halide_buffer_t *q, halide_buffer_t *k, halide_buffer_t *v, halide_buffer_t *log_decay,
               halide_buffer_t *state_in, halide_buffer_t *keys_in, int32_t first_block, int32_t degree, int32_t normalized,
               float scale, halide_buffer_t *out, halide_buffer_t *state_out, halide_buffer_t *keys_out,
               halide_buffer_t *weights);
};
constexpr const char *backend_of(std::string_view target) {
#define HOLDFAST_TARGET(name, backend, needs, chunk_table) \
    if (target == #name) return #backend;
#include <targets.inc>
#undef HOLDFAST_TARGET
    return "";
}
constexpr Variant variants[] = {
#define HOLDFAST_ROW_chunkwise(...)
#define HOLDFAST_ROW_parallel(name, dtype, chunk, key_size, value_size, target, ...) \
    {#name, dtype, chunk, {key_size, value_size}, backend_of(#target), name},
#define HOLDFAST_ROW_recurrent(...)
#define HOLDFAST_ROW_rotate(...)
#define HOLDFAST_ROW_head_norm_gate(...)
#define HOLDFAST_ROW_power(...)
#define HOLDFAST_ROW_power_step(...)
#define HOLDFAST_VARIANT(kernel, ...) HOLDFAST_ROW_##kernel(__VA_ARGS__)
#include <variants.inc>
#undef HOLDFAST_VARIANT
};

struct Instance {
    Variant variant;
    Size size;
    ParallelCase parallel_case;
};
std::string name(const Instance &i) {
    std::string size;
    if (!i.variant.size.K) size = "_K" + std::to_string(i.size.K) + "_V" + std::to_string(i.size.V);
    return i.variant.name + size + "_" + i.parallel_case.name;
}
void PrintTo(const Instance &i, std::ostream *stream) { *stream << name(i); }

std::vector<Instance> instances() {
    std::vector<Instance> list;
    for (const Variant &variant : variants) {
        std::vector<Size> sizes = {{3, 1}, {33, 17}};
        if (variant.size.K && variant.size.V) sizes = {variant.size};
        for (Size size : sizes)
            for (const ParallelCase &c : parallel_cases(variant.block)) list.push_back({variant, size, c});
    }
    return list;
}

class Parallel : public testing::TestWithParam<Instance> {};

TEST_P(Parallel, MatchesReference) {
    const Instance &instance = GetParam();
    const std::string missing = missing_here(instance.variant.name), backend = instance.variant.backend;
    if (!missing.empty() && required(backend)) FAIL() << "HOLDFAST_REQUIRED_BACKENDS has " << backend << ": " << missing;
    if (!missing.empty()) GTEST_SKIP() << "this machine lacks " << missing;
    if (instance.parallel_case.layout == Layout::reversed && backend != "cpu")
        GTEST_SKIP() << "Halide's runtime does not copy negative strides to a GPU; the library never asks it to";
    halide_set_error_handler([](void *, const char *text) { ADD_FAILURE() << text; });
    const Variant &variant = instance.variant;
    ParallelCall(instance.parallel_case, variant.block, instance.size, variant.dtype)
        .expect_reference([&](auto &&...arguments) { return variant.run(nullptr, arguments...); });
}

INSTANTIATE_TEST_SUITE_P(, Parallel, testing::ValuesIn(instances()), [](const auto &info) { return name(info.param); });

}  // namespace
