// Every compiled variant of parallel_backward, called directly, on every case of parallel_backward_call.h. What this machine cannot
// run is skipped, with the reason.
#include "../parallel_backward_call.h"
#include "missing.h"

#include <kernels.h>

namespace {
using namespace test;

struct Variant {
    const char *name;
    Dtype dtype;
    int block;
    Size size;  // 0: any
    const char *backend;
    int (*run)(const void *user_context, halide_buffer_t *q, halide_buffer_t *k, halide_buffer_t *v, halide_buffer_t *log_decay,
               halide_buffer_t *out, halide_buffer_t *dout, int32_t degree, int32_t normalized, float scale, int32_t want_dq,
               int32_t want_dk, int32_t want_dv, int32_t want_dlog_decay, halide_buffer_t *dq, halide_buffer_t *dk,
               halide_buffer_t *dv, halide_buffer_t *dlog_decay);
};
#define HOLDFAST_VARIANT(kernel, name, dtype, chunk, key_size, value_size, target, ...) \
    {#name, dtype, chunk, {key_size, value_size}, backend_of(#target), name},
const std::vector<Variant> variants = {
#include <variants/parallel_backward.inc>
};
#undef HOLDFAST_VARIANT

struct Instance {
    Variant variant;
    Size size;
    ParallelBackwardCase backward_case;
};
std::string name(const Instance &i) {
    std::string size;
    if (!i.variant.size.K) size = "_K" + std::to_string(i.size.K) + "_V" + std::to_string(i.size.V);
    return i.variant.name + size + "_" + i.backward_case.name;
}
void PrintTo(const Instance &i, std::ostream *stream) { *stream << name(i); }

std::vector<Instance> instances() {
    std::vector<Instance> list;
    for (const Variant &variant : variants) {
        std::vector<Size> sizes = {{3, 1}, {33, 17}, {64, 80}};
        if (variant.size.K && variant.size.V) sizes = {variant.size};
        // GPUs' stand-ins are slow: one size, and of 16 bits, which differ in how rows are read and written, few cases.
        const bool cpu = variant.backend == std::string("cpu"), all = cpu || variant.dtype == f32;
        if (!cpu) sizes = {{5, 7}};
        for (Size size : sizes)
            for (const ParallelBackwardCase &c : parallel_backward_cases(variant.block))
                if ((size.K < 64 || c.degree <= 2) &&  // of more the reference takes seconds
                    (all || c.name == "layout_padded" || c.name == "degree_2"))
                    list.push_back({variant, size, c});
    }
    return list;
}

class ParallelBackward : public testing::TestWithParam<Instance> {};

TEST_P(ParallelBackward, MatchesReference) {
    const Instance &instance = GetParam();
    const std::string missing = reason_to_skip(instance.variant), backend = instance.variant.backend;
    if (!missing.empty()) GTEST_SKIP() << "this machine lacks " << missing;
    const std::string reason = not_on(backend, instance.backward_case.layout);
    if (!reason.empty()) GTEST_SKIP() << reason;
    halide_set_error_handler([](void *, const char *text) { ADD_FAILURE() << text; });
    const Variant &variant = instance.variant;
    ParallelBackwardCall(instance.backward_case, instance.size, variant.dtype).expect_reference([&](auto &&...arguments) {
        return variant.run(nullptr, arguments...);
    });
}

INSTANTIATE_TEST_SUITE_P(, ParallelBackward, testing::ValuesIn(instances()), [](const auto &info) { return name(info.param); });

}  // namespace
