#include "backend.h"

#include "context.h"
#include "cuda.h"
#include "device.h"
#include "opencl.h"

#include <HalideRuntime.h>

#include <cstring>

#if HOLDFAST_HAS_METAL
#include <HalideRuntimeMetal.h>
#endif
#if HOLDFAST_HAS_OPENCL
#include <HalideRuntimeOpenCL.h>
#endif
#if HOLDFAST_HAS_VULKAN
#include <HalideRuntimeVulkan.h>
#endif
#if HOLDFAST_HAS_CUDA
#include <HalideRuntimeCuda.h>
#endif

extern "C" void *halide_vulkan_get_symbol(void *user_context, const char *name);  // of Halide's runtime

namespace holdfast {
namespace {

#if HOLDFAST_HAS_VULKAN
/// Names of all Vulkan devices; "" or why there is none.
std::string list_vulkan(std::vector<std::string> &devices) {
    struct Application {
        int type;
        const void *next;
        const char *name;
        uint32_t version;
        const char *engine;
        uint32_t engine_version, api_version;
    };
    struct Create {
        int type;
        const void *next;
        uint32_t flags;
        const Application *application;
        uint32_t layers;
        const char *const *layer_names;
        uint32_t extensions;
        const char *const *extension_names;
    };
    constexpr uint32_t version_1_1 = 1u << 22 | 1u << 12;
    constexpr size_t properties_bytes = 4096, name_at = 20;  // VkPhysicalDeviceProperties is smaller; deviceName in it
    using Proc = void (*)();
    auto get = (Proc (*)(void *, const char *))halide_vulkan_get_symbol(nullptr, "vkGetInstanceProcAddr");
    if (!get) return "no Vulkan: libvulkan.so.1 cannot be loaded";
    auto create = (int (*)(const Create *, const void *, void **))get(nullptr, "vkCreateInstance");
    void *instance = nullptr;
    const Application application = {0, nullptr, "holdfast", 0, "holdfast", 0, version_1_1};
    const Create info = {1, nullptr, 0, &application, 0, nullptr, 0, nullptr};
    if (!create || create(&info, nullptr, &instance) != 0 || !instance) return "Vulkan has no driver: vkCreateInstance failed";
    auto enumerate = (int (*)(void *, uint32_t *, void **))get(instance, "vkEnumeratePhysicalDevices");
    auto properties = (void (*)(void *, void *))get(instance, "vkGetPhysicalDeviceProperties");
    auto destroy = (void (*)(void *, const void *))get(instance, "vkDestroyInstance");
    void *ids[16];
    uint32_t count = 16;
    if (enumerate && properties && enumerate(instance, &count, ids) >= 0)
        for (uint32_t d = 0; d < count; d++) {
            alignas(8) char bytes[properties_bytes] = {};
            properties(ids[d], bytes);
            devices.push_back(bytes + name_at);
        }
    if (destroy) destroy(instance, nullptr);
    return devices.empty() ? "Vulkan has no device" : "";
}
#endif

/// Does Halide's own runtime get a context there? Its words if not.
[[maybe_unused]] std::string try_allocation(Backend backend) {
    Workspace workspace(resolve(nullptr).allocator);
    DeviceCall call{Place{backend}};
    workspace.device = &call;
    halide_dimension_t axis(0, 16, 1);
    halide_buffer_t buffer{};
    buffer.type = halide_type_t(halide_type_uint, 8), buffer.dimensions = 1, buffer.dim = &axis;
    std::lock_guard<std::mutex> lock(call_mutex(backend));
    if (DeviceMemory::allocate(&workspace, backend, &buffer) != 0)
        return workspace.error.empty() ? "no memory can be had there" : workspace.error;
    DeviceMemory::deallocate(&workspace, backend, &buffer);
    return "";
}

Availability probe(Backend backend) {
    Availability found;
    if (!compiled(backend)) {
        found.missing = std::string("this build has no target of ") + name_of(backend);
        return found;
    }
    switch (backend) {
    case Backend::cpu: found.devices = {"CPU"}; break;
#if HOLDFAST_HAS_CUDA
    case Backend::cuda: found = cuda::probe(); break;
#endif
#if HOLDFAST_HAS_METAL
    case Backend::metal:
        found.missing = try_allocation(backend);
        if (found.missing.empty()) found.devices = {"default device"};
        break;
#endif
#if HOLDFAST_HAS_OPENCL
    case Backend::opencl:
        found = opencl::probe();
        if (found.missing.empty()) found.missing = try_allocation(backend);
        break;
#endif
#if HOLDFAST_HAS_VULKAN
    case Backend::vulkan:
        found.missing = list_vulkan(found.devices);
        if (found.missing.empty()) found.missing = try_allocation(backend);
        break;
#endif
    default: break;
    }
    return found;
}

}  // namespace

const char *name_of(Backend backend) {
    switch (backend) {
    case Backend::cpu: return "cpu";
    case Backend::cuda: return "cuda";
    case Backend::metal: return "metal";
    case Backend::opencl: return "opencl";
    case Backend::vulkan: return "vulkan";
    }
    return "";
}

bool backend_of(DLDeviceType type, Backend *backend) {
    switch (type) {
    case kDLCPU:
    case kDLCUDAHost: *backend = Backend::cpu; return true;
    case kDLCUDA:
    case kDLCUDAManaged: *backend = Backend::cuda; return true;
    case kDLMetal: *backend = Backend::metal; return true;
    case kDLOpenCL: *backend = Backend::opencl; return true;
    case kDLVulkan: *backend = Backend::vulkan; return true;
    default: return false;
    }
}

bool compiled(Backend backend) {
    switch (backend) {
    case Backend::cpu: return true;
    case Backend::cuda: return HOLDFAST_HAS_CUDA;
    case Backend::metal: return HOLDFAST_HAS_METAL;
    case Backend::opencl: return HOLDFAST_HAS_OPENCL;
    case Backend::vulkan: return HOLDFAST_HAS_VULKAN;
    }
    return false;
}

const Availability &availability(Backend backend) {
    static std::once_flag once[std::size(all_backends)];
    static Availability found[std::size(all_backends)];
    const int n = (int)backend;
    std::call_once(once[n], [&] { found[n] = probe(backend); });
    return found[n];
}

const halide_device_interface_t *device_interface(Backend backend) {
    switch (backend) {
#if HOLDFAST_HAS_CUDA
    case Backend::cuda: return halide_cuda_device_interface();
#endif
#if HOLDFAST_HAS_METAL
    case Backend::metal: return halide_metal_device_interface();
#endif
#if HOLDFAST_HAS_OPENCL
    case Backend::opencl: return halide_opencl_device_interface();
#endif
#if HOLDFAST_HAS_VULKAN
    case Backend::vulkan: return halide_vulkan_device_interface();
#endif
    default: return nullptr;
    }
}

std::mutex &call_mutex(Backend backend) {
    static std::mutex mutexes[std::size(all_backends)];
    return mutexes[(int)backend];
}

}  // namespace holdfast
