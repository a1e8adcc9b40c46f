// Every compiled variant of parallel, called directly, on every case of parallel_call.h. What this machine cannot run is
// skipped, with the reason; a GPU backend that HOLDFAST_REQUIRED_BACKENDS names may not be.
#include "../parallel_call.h"
#include "variant.h"

#include <HalideRuntimeMetal.h>
#include <HalideRuntimeOpenCL.h>
#include <HalideRuntimeVulkan.h>

namespace {
using namespace test;

const std::vector variants = rows({
#include <variants/parallel.inc>
});
using Variant = decltype(variants)::value_type;
using Instance = Called<Variant, ParallelCase>;

std::vector<Instance> instances() {
    std::vector<Instance> list;
    for (const Variant &variant : variants) {
        std::vector<Size> sizes = {{3, 1}, {33, 17}};
        if (variant.size.K && variant.size.V) sizes = {variant.size};
        for (Size size : sizes)
            for (const ParallelCase &c : parallel_cases(variant.chunk, size.K)) {
                // Stand-ins for GPUs are slow: of the larger size a few, and as many of 16 bits, which differ in how rows are
                // read and written.
                const bool gpu = !variant.on_cpu(), small = size.K < 8;
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

class Parallel : public OfVariants<Instance> {};

TEST_P(Parallel, MatchesReference) {
    const Instance &instance = GetParam();
    const Variant &variant = instance.variant;
    ParallelCall(instance.with, variant.chunk, instance.size, variant.dtype)
        .expect_reference(variant.run(), gpu(variant.backend));
}

HOLDFAST_INSTANCES(Parallel, instances());

}  // namespace
