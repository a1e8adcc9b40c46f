// Every compiled variant of parallel, called directly, on every case of parallel_call.h. What this machine cannot run is
// skipped, with the reason; a GPU backend that HOLDFAST_REQUIRED_BACKENDS names may not be.
#include "../parallel_call.h"
#include "missing.h"

#include <HalideRuntimeMetal.h>
#include <HalideRuntimeOpenCL.h>
#include <HalideRuntimeVulkan.h>
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
               halide_buffer_t *state_in, halide_buffer_t *keys_in, int32_t first_block, int32_t degree, int32_t normalized,
               float scale, halide_buffer_t *out, halide_buffer_t *state_out, halide_buffer_t *keys_out,
               halide_buffer_t *weights);
};
#define HOLDFAST_VARIANT(kernel, name, dtype, chunk, key_size, value_size, target, ...) \
    {#name, dtype, chunk, {key_size, value_size}, backend_of(#target), name},
const std::vector<Variant> variants = {
#include <variants/parallel.inc>
};
#undef HOLDFAST_VARIANT

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
            for (const ParallelCase &c : parallel_cases(variant.block, size.K)) {
                // Stand-ins for GPUs are slow: of the larger size a few, and as many of 16 bits, which differ in how rows are
                // read and written.
                const bool gpu = variant.backend != std::string("cpu"), small = size.K < 8;
                const char *const enough[] = {"layout_", "degree_2", "out_alone"};
                auto is = [&](const char *name) { return c.name.find(name) == 0; };
                const bool few = std::any_of(std::begin(enough), std::end(enough), is);
                if (!gpu || (variant.dtype == f32 ? small || few : small && few)) list.push_back({variant, size, c});
            }
    }
    return list;
}

/// Of a GPU's backend; null: the CPU.
const halide_device_interface_t *gpu([[maybe_unused]] const std::string &backend) {
#if HOLDFAST_HAS_METAL
    if (backend == "metal") return halide_metal_device_interface();
#endif
#if HOLDFAST_HAS_OPENCL
    if (backend == "opencl") return halide_opencl_device_interface();
#endif
#if HOLDFAST_HAS_VULKAN
    if (backend == "vulkan") return halide_vulkan_device_interface();
#endif
    return nullptr;
}

class Parallel : public testing::TestWithParam<Instance> {};

TEST_P(Parallel, MatchesReference) {
    const Instance &instance = GetParam();
    const std::string missing = reason_to_skip(instance.variant), backend = instance.variant.backend;
    if (!missing.empty()) GTEST_SKIP() << "this machine lacks " << missing;
    const std::string reason = not_on(backend, instance.parallel_case.layout);
    if (!reason.empty()) GTEST_SKIP() << reason;
    halide_set_error_handler([](void *, const char *text) { ADD_FAILURE() << text; });
    const Variant &variant = instance.variant;
    ParallelCall(instance.parallel_case, variant.block, instance.size, variant.dtype)
        .expect_reference([&](auto &&...arguments) { return variant.run(nullptr, arguments...); }, gpu(backend));
}

INSTANTIATE_TEST_SUITE_P(, Parallel, testing::ValuesIn(instances()), [](const auto &info) { return name(info.param); });

}  // namespace
