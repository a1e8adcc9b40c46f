// Every compiled variant of chunkwise, called directly, on every case of kernel_call.h. What this machine cannot run is
// skipped, with the reason; a GPU backend that HOLDFAST_REQUIRED_BACKENDS names may not be.
#include "../kernel_call.h"
#include "missing.h"

#include <holdfast/holdfast.h>
#include <kernels.h>

namespace {
using namespace test;

struct Variant {
    const char *name;
    Dtype dtype;
    int chunk;
    Size size;  // 0: any
    const char *backend;
    Operands operands;
    int (*run)(const void *user_context, halide_buffer_t *q, halide_buffer_t *k, halide_buffer_t *v, halide_buffer_t *log_decay,
               halide_buffer_t *state_in, halide_buffer_t *chunks, int32_t count, float scale, halide_buffer_t *out,
               halide_buffer_t *state_out);
};
#define HOLDFAST_VARIANT(kernel, name, dtype, chunk, key_size, value_size, target, row_alignment, round_operands, ...) \
    {#name, dtype, chunk, {key_size, value_size}, backend_of(#target), {row_alignment, round_operands}, name},
const std::vector<Variant> variants = {
#include <variants/chunkwise.inc>
};
#undef HOLDFAST_VARIANT

struct Instance {
    Variant variant;
    Size size;
    KernelCase kernel_case;
};
std::string name(const Instance &i) {
    std::string size;
    if (!i.variant.size.K) size = "_K" + std::to_string(i.size.K) + "_V" + std::to_string(i.size.V);
    return i.variant.name + size + "_" + i.kernel_case.name;
}
void PrintTo(const Instance &i, std::ostream *stream) { *stream << name(i); }

std::vector<Instance> instances() {
    std::vector<Instance> list;
    for (const Variant &variant : variants) {
        std::vector<Size> sizes(std::begin(odd_sizes), std::end(odd_sizes));
        if (variant.size.K && variant.size.V) sizes = {variant.size};
        for (Size size : sizes) {
            // GPUs' stand-ins are slow: there, small sizes in fp32 meet all cases. Other types differ where rows are read and
            // written, and large sizes in how many blocks there are.
            const bool all = variant.backend == std::string("cpu") || (variant.dtype == f32 && size.K < 64);
            if (!all && (size.K < 5 || (!(variant.dtype == f32) && !variant.size.K && size.K != 33))) continue;
            for (const KernelCase &c : kernel_cases(variant.chunk))
                if (all || c.name == "packed" || c.name == "gates_resets" || c.name == "layout_padded")
                    list.push_back({variant, size, c});
        }
    }
    return list;
}

class Chunkwise : public testing::TestWithParam<Instance> {};

TEST_P(Chunkwise, MatchesReference) {
    const Instance &instance = GetParam();
    const std::string missing = reason_to_skip(instance.variant);
    if (!missing.empty()) GTEST_SKIP() << "this machine lacks " << missing;
    const std::string reason = not_on(instance.variant.backend, instance.kernel_case.layout);
    if (!reason.empty()) GTEST_SKIP() << reason;
    halide_set_error_handler([](void *, const char *text) { ADD_FAILURE() << text; });
    const Variant &variant = instance.variant;
    KernelCall(instance.kernel_case, variant.chunk, instance.size, variant.dtype, variant.operands)
        .expect_reference([&](auto &&...arguments) { return variant.run(nullptr, arguments...); });
}

INSTANTIATE_TEST_SUITE_P(, Chunkwise, testing::ValuesIn(instances()), [](const auto &info) { return name(info.param); });

// Variants whose operands are rounded, over the decays for which the project holds numbers (tolerance.h): of 4096 tokens,
// for those of 64x64 that the library can choose here, in properties/numbers_test.cpp.
class Rounded : public testing::TestWithParam<Variant> {};
void PrintTo(const Variant &v, std::ostream *stream) { *stream << v.name; }

TEST_P(Rounded, RelativeErrorOf1024Tokens) {
    const Variant &variant = GetParam();
    const std::string missing = reason_to_skip(variant);
    if (!missing.empty()) GTEST_SKIP() << "this machine lacks " << missing;
    const KernelCase retnet{"retnet", {1024}, 1, 8, Layout::compact, Gates::per_head, 0};
    const auto [out, state] = KernelCall(retnet, variant.chunk, variant.size, variant.dtype, variant.operands)
                                  .relative_errors([&](auto &&...arguments) { return variant.run(nullptr, arguments...); });
    EXPECT_LE(out, tolerance::relative_rms_of_out(variant.dtype));
    EXPECT_LE(state, tolerance::relative_rms_of_state(variant.dtype));
}

std::vector<Variant> rounded_variants() {
    std::vector<Variant> list;
    for (const Variant &v : variants)
        if (v.operands.rounded && v.size.K == 64 && v.size.V == 64 && v.backend == std::string("cpu")) list.push_back(v);
    return list;
}
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(Rounded);
INSTANTIATE_TEST_SUITE_P(, Rounded, testing::ValuesIn(rounded_variants()), [](const auto &info) { return info.param.name; });

}  // namespace
