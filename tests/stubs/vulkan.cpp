// A Vulkan loader for tests: the machine's own, but that it notes how large grids of blocks are, and launches none. Loaded in the
// place of libvulkan.so.1 (LD_LIBRARY_PATH); HOLDFAST_STUB_VULKAN is where the machine's is.
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define STUB extern "C" __attribute__((visibility("default")))

namespace {

using Function = void (*)();
using Find = Function (*)(void *owner, const char *name);

std::atomic<uint32_t> largest;
std::atomic<Find> find_of_device;

void dispatch(void *, uint32_t x, uint32_t y, uint32_t z) { largest = std::max({largest.load(), x, y, z}); }

Function device_function(void *device, const char *name) {
    return std::strcmp(name, "vkCmdDispatch") ? find_of_device.load()(device, name) : (Function)dispatch;
}

Find loader() {
    static void *const library = dlopen(std::getenv("HOLDFAST_STUB_VULKAN"), RTLD_NOW | RTLD_LOCAL);
    return library ? (Find)dlsym(library, "vkGetInstanceProcAddr") : nullptr;
}

}  // namespace

/// The most blocks along an axis since the last time.
STUB uint32_t stub_largest_grid() { return largest.exchange(0); }

STUB Function vkGetInstanceProcAddr(void *instance, const char *name) {
    const Find find = loader();
    const Function function = find ? find(instance, name) : nullptr;
    if (function && !std::strcmp(name, "vkCmdDispatch")) return (Function)dispatch;
    if (!function || std::strcmp(name, "vkGetDeviceProcAddr")) return function;
    find_of_device = (Find)function;
    return (Function)device_function;
}

// What Halide's runtime looks up in the library itself.
#define FORWARD(name, parameters, arguments) \
    STUB int name parameters { \
        auto *function = (int(*) parameters)vkGetInstanceProcAddr(nullptr, #name); \
        return function ? function arguments : -3; /* VK_ERROR_INITIALIZATION_FAILED */ \
    }
FORWARD(vkCreateInstance, (const void *info, const void *allocator, void **instance), (info, allocator, instance))
FORWARD(vkEnumerateInstanceExtensionProperties, (const char *layer, uint32_t *count, void *properties),
        (layer, count, properties))
FORWARD(vkEnumerateInstanceLayerProperties, (uint32_t *count, void *properties), (count, properties))
FORWARD(vkEnumerateInstanceVersion, (uint32_t *version), (version))
