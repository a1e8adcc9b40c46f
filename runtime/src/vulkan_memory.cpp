// Halide 21 cuts its Vulkan buffers out of blocks of device memory, and gets their sizes wrong (mended in its main branch,
// 4b635d90 and 42a90e86): where a driver wants another multiple than 32 bytes, buffers come out smaller than asked for, and
// kernels write past them; and two free neighbours that become one keep the handle of the first. So the driver is made to ask
// for a multiple of 256 always, which leaves no size to round, and freed memory is not kept for reuse once Vulkan is loaded.
// Both are hooks of HalideRuntime.h. docs/testing-without-hardware.md has the evidence.
#include <HalideRuntime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

namespace {

using Function = void *(*)(void *owner, const char *name);
struct Requirements {  // VkMemoryRequirements
    uint64_t size, alignment;
    uint32_t memory_types;
};
using GetRequirements = void (*)(void *device, uint64_t buffer, Requirements *);

constexpr uint64_t granule = 256;  // no driver may want more for a storage or uniform buffer's offset

std::atomic<Function> get_instance_function, get_device_function;
std::atomic<GetRequirements> get_requirements;

void get_rounded_requirements(void *device, uint64_t buffer, Requirements *wanted) {
    get_requirements.load()(device, buffer, wanted);
    wanted->alignment = std::max(wanted->alignment, granule);
    wanted->size = (wanted->size + wanted->alignment - 1) / wanted->alignment * wanted->alignment;
}

void *device_function(void *device, const char *name) {
    void *function = get_device_function.load()(device, name);
    if (!function || std::strcmp(name, "vkGetBufferMemoryRequirements")) return function;
    get_requirements = (GetRequirements)function;
    return (void *)get_rounded_requirements;
}

void *instance_function(void *instance, const char *name) {
    void *function = get_instance_function.load()(instance, name);
    if (!function || std::strcmp(name, "vkGetDeviceProcAddr")) return function;
    get_device_function = (Function)function;
    return (void *)device_function;
}

}  // namespace

extern "C" void *halide_get_library_symbol(void *library, const char *name) {
    void *symbol = halide_default_get_library_symbol(library, name);
    if (!symbol || std::strcmp(name, "vkGetInstanceProcAddr")) return symbol;
    get_instance_function = (Function)symbol;
    return (void *)instance_function;
}

extern "C" bool halide_can_reuse_device_allocations(void *) { return !get_instance_function.load(); }
