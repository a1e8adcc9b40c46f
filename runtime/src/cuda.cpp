// CUDA, see cuda.h. The functions of Halide's CUDA runtime that kernels call are replaced: those load PTX only, ask for no more
// than 48 KB of shared memory, look kernels up on each launch, and make a context of their own.
#include "cuda.h"

#include "context.h"
#include "device.h"
#include "failure.h"

#include <HalideRuntime.h>
#include <HalideRuntimeCuda.h>
#include <dlfcn.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;

namespace holdfast::cuda {
namespace {

using Result = int;
using Device = int;
constexpr Result success = 0, out_of_memory = 2;
constexpr int max_shared_memory_optin = 97, capability_major = 75, capability_minor = 76;  // CUdevice_attribute
constexpr int max_dynamic_shared_size = 8;                                                 // CUfunction_attribute
constexpr int default_shared_memory = 48 << 10;  // more has to be asked for, function by function
constexpr int least_capability = 80;             // cuda_capability_80 in cmake/targets.cmake

// Every function that is used: name, symbol, arguments. Those of the second list may be missing.
#define HOLDFAST_CUDA(X) \
    X(Init, cuInit, (unsigned)) \
    X(DeviceGetCount, cuDeviceGetCount, (int *)) \
    X(DeviceGet, cuDeviceGet, (Device *, int)) \
    X(DeviceGetName, cuDeviceGetName, (char *, int, Device)) \
    X(DeviceGetAttribute, cuDeviceGetAttribute, (int *, int, Device)) \
    X(PrimaryCtxRetain, cuDevicePrimaryCtxRetain, (CUcontext *, Device)) \
    X(CtxGetCurrent, cuCtxGetCurrent, (CUcontext *)) \
    X(CtxGetDevice, cuCtxGetDevice, (Device *)) \
    X(CtxPushCurrent, cuCtxPushCurrent_v2, (CUcontext)) \
    X(CtxPopCurrent, cuCtxPopCurrent_v2, (CUcontext *)) \
    X(ModuleLoadDataEx, cuModuleLoadDataEx, (CUmodule *, const void *, unsigned, int *, void **)) \
    X(ModuleGetFunction, cuModuleGetFunction, (CUfunction *, CUmodule, const char *)) \
    X(FuncSetAttribute, cuFuncSetAttribute, (CUfunction, int, int)) \
    X(LaunchKernel, cuLaunchKernel, \
      (CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void **, void **)) \
    X(MemAlloc, cuMemAlloc_v2, (uint64_t *, size_t)) \
    X(MemFree, cuMemFree_v2, (uint64_t)) \
    X(MemcpyHtoDAsync, cuMemcpyHtoDAsync_v2, (uint64_t, const void *, size_t, CUstream)) \
    X(MemcpyDtoHAsync, cuMemcpyDtoHAsync_v2, (void *, uint64_t, size_t, CUstream)) \
    X(StreamSynchronize, cuStreamSynchronize, (CUstream)) \
    X(StreamGetCtx, cuStreamGetCtx, (CUstream, CUcontext *)) \
    X(GetErrorName, cuGetErrorName, (Result, const char **)) \
    X(GetErrorString, cuGetErrorString, (Result, const char **))
#define HOLDFAST_CUDA_OPTIONAL(X) \
    X(CtxGetId, cuCtxGetId, (CUcontext, unsigned long long *)) /* CUDA 12 */ \
    X(StreamIsCapturing, cuStreamIsCapturing, (CUstream, int *))

struct Api {
#define X(name, symbol, arguments) Result(*name) arguments = nullptr;
    HOLDFAST_CUDA(X)
    HOLDFAST_CUDA_OPTIONAL(X)
#undef X
    std::string missing;  // why it cannot be used

    Api() {
        void *library = nullptr;
        for (const char *name : {"libcuda.so.1", "libcuda.so"})
            if (!library) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
        if (!library) {
            missing = "no CUDA driver: libcuda.so.1 cannot be loaded";
            return;
        }
        auto find = [&](auto &function, const char *symbol) {
            function = (std::decay_t<decltype(function)>)dlsym(library, symbol);
            return function != nullptr;
        };
#define X(name, symbol, arguments) \
    if (!find(name, #symbol) && missing.empty()) missing = "the CUDA driver is too old: it lacks " #symbol;
        HOLDFAST_CUDA(X)
#undef X
#define X(name, symbol, arguments) find(name, #symbol);
        HOLDFAST_CUDA_OPTIONAL(X)
#undef X
    }
};

const Api &api() {
    static const Api loaded;
    return loaded;
}

std::string describe(const char *what, Result result) {
    const char *name = nullptr, *text = nullptr;
    if (api().GetErrorName(result, &name) != success || !name) name = "unknown error";
    if (api().GetErrorString(result, &text) != success || !text) text = "no description";
    return std::string("CUDA: ") + what + ": " + name + " (" + std::to_string(result) + "), " + text;
}

void check(const char *what, Result result) {
    if (result == success) return;
    fail(result == out_of_memory ? HOLDFAST_OUT_OF_MEMORY : HOLDFAST_DEVICE_ERROR, describe(what, result));
}

int capability(Device device) {
    int major = 0, minor = 0;
    for (auto [number, attribute] : {std::pair{&major, capability_major}, {&minor, capability_minor}})
        check("cuDeviceGetAttribute", api().DeviceGetAttribute(number, attribute, device));
    return major * 10 + minor;
}

// ---- Kernels, loaded once in each context -------------------------------------------------------------------------------

struct Function {
    CUfunction function;
    int shared_memory;  // what has been asked for
};

struct Module {
    CUmodule module = nullptr;
    std::map<std::string, Function> functions;
};

/// Kernels of one object, which Halide's `state` points to; of each context. Never freed: contexts may be gone at exit.
using Modules = std::map<unsigned long long, Module>;
std::mutex modules_mutex;

DeviceCall &call_of(void *user_context) { return *((Workspace *)user_context)->device; }

int report(void *user_context, const std::string &text, Result result) {
    halide_error(user_context, text.c_str());
    return result == out_of_memory ? halide_error_code_out_of_memory : halide_error_code_gpu_device_error;
}

}  // namespace

Availability probe() {
    Availability found;
    const Api &cuda = api();
    found.missing = cuda.missing;
    if (!found.missing.empty()) return found;
    if (Result result = cuda.Init(0)) {
        found.missing = describe("cuInit", result);
        return found;
    }
    int count = 0;
    if (Result result = cuda.DeviceGetCount(&count)) {
        found.missing = describe("cuDeviceGetCount", result);
        return found;
    }
    bool any = false;
    for (int n = 0; n < count; n++) {
        Device device;
        char name[256] = "";
        if (cuda.DeviceGet(&device, n) != success || cuda.DeviceGetName(name, sizeof name - 1, device) != success) continue;
        try {
            const int sm = capability(device);
            any |= sm >= least_capability;
            found.devices.push_back(std::string(name) + " (sm_" + std::to_string(sm) + ")");
        } catch (const Failure &) {
            found.devices.push_back(std::string(name) + " (unknown)");
        }
    }
    if (!any)
        found.missing = found.devices.empty() ? "CUDA has no device"
                                              : "CUDA has no device of sm_" + std::to_string(least_capability) +
                                                    " or later; the first is " + found.devices[0];
    return found;
}

unsigned long long id_of(CUcontext context) {
    unsigned long long id = 0;
    if (api().CtxGetId && api().CtxGetId(context, &id) == success) return id;
    return (unsigned long long)context;
}

// 0, and two names for the default streams, the process's and the thread's: of whatever context is current.
constexpr uintptr_t special_streams = 2;

unsigned long long thread_of(CUstream stream) {
    static std::atomic<unsigned long long> threads{0};
    thread_local const unsigned long long number = ++threads;  // ids of the system's come again
    return (uintptr_t)stream == 2 ? number : 0;
}

CUcontext choose_context(CUcontext context, CUstream stream, int device) {
    const Api &cuda = api();
    Device wanted = any_device;
    auto check_capability = [&](Device device, int number) {
        if (const int sm = capability(device); sm < least_capability)
            fail(HOLDFAST_TARGET_UNAVAILABLE, "CUDA device ", number, " is of sm_", sm, "; expected at least sm_",
                 least_capability);
    };
    if (device != any_device) {
        check("cuDeviceGet", cuda.DeviceGet(&wanted, device));
        check_capability(wanted, device);
    }
    auto device_of = [&](CUcontext c) {
        Current current(c);
        Device found;
        check("cuCtxGetDevice", cuda.CtxGetDevice(&found));
        return found;
    };
    const char *origin = "holdfast_context_set_device";
    if (!context && (uintptr_t)stream > special_streams) {
        check("cuStreamGetCtx", cuda.StreamGetCtx(stream, &context));
        origin = "the stream of holdfast_context_set_stream";
    }
    if (context) {
        const Device found = device_of(context);
        if (device == any_device)
            check_capability(found, found);
        else if (found != wanted)
            fail(HOLDFAST_INVALID_ARGUMENT, "the context of ", origin,
                 " is of another device than the tensors, which are on CUDA device ", device);
        return context;
    }
    check("cuCtxGetCurrent", cuda.CtxGetCurrent(&context));
    if (context) {
        const Device found = device_of(context);
        if (device == any_device ? capability(found) >= least_capability : found == wanted) return context;
    }
    for (int n = 0; wanted == any_device; n++) {  // probe() has found one that will do
        Device candidate;
        check("cuDeviceGet", cuda.DeviceGet(&candidate, n));
        if (capability(candidate) >= least_capability) wanted = candidate;
    }

    // Retained once for each device, never released: tensors of other libraries live in it. Again, where a reset of the device has
    // ended it.
    struct Primary {
        CUcontext context = nullptr;
        unsigned long long id = 0;
    };
    static std::mutex mutex;
    static std::map<Device, Primary> all;
    std::lock_guard<std::mutex> lock(mutex);
    Primary &primary = all[wanted];
    if (!primary.context || id_of(primary.context) != primary.id) {
        primary.context = nullptr;
        check("cuDevicePrimaryCtxRetain", cuda.PrimaryCtxRetain(&primary.context, wanted));
        primary.id = id_of(primary.context);
    }
    return primary.context;
}

Current::Current(CUcontext context) {
    CUcontext now = nullptr;
    check("cuCtxGetCurrent", api().CtxGetCurrent(&now));
    if (now == context) return;
    check("cuCtxPushCurrent", api().CtxPushCurrent(context));
    pushed = true;
}

Current::~Current() {
    CUcontext popped;
    if (pushed) api().CtxPopCurrent(&popped);
}

uint64_t allocate(size_t bytes) {
    uint64_t memory = 0;
    if (Result result = api().MemAlloc(&memory, bytes))
        check(("cuMemAlloc of " + std::to_string(bytes) + " bytes").c_str(), result);
    return memory;
}

void deallocate(CUcontext context, unsigned long long id, uint64_t memory) noexcept {
    // A context that its owner has destroyed took the memory along.
    if (id_of(context) != id || api().CtxPushCurrent(context) != success) return;
    api().MemFree(memory);
    CUcontext popped;
    api().CtxPopCurrent(&popped);
}

/// A graph would hold on to the memory that is copied, which is the call's or its caller's, and not to what it holds now.
static void check_no_graph(CUstream stream) {
    int capturing = 0;  // CUstreamCaptureStatus
    if (api().StreamIsCapturing && api().StreamIsCapturing(stream, &capturing) == success && capturing)
        fail(HOLDFAST_UNSUPPORTED,
             "the stream is being captured in a graph, and the call copies tensors of the CPU; expected them on the device");
}

void copy_in(uint64_t to, const void *from, size_t bytes, CUstream stream) {
    check_no_graph(stream);
    check("cuMemcpyHtoDAsync", api().MemcpyHtoDAsync(to, from, bytes, stream));
}

void copy_out(void *to, uint64_t from, size_t bytes, CUstream stream) {
    check_no_graph(stream);
    check("cuMemcpyDtoHAsync", api().MemcpyDtoHAsync(to, from, bytes, stream));
}

void wait(CUstream stream) { check("cuStreamSynchronize", api().StreamSynchronize(stream)); }

}  // namespace holdfast::cuda

using namespace holdfast;
using namespace holdfast::cuda;

// What kernels call. Their context is current: GpuCall::run sees to that.
extern "C" {

void *halide_cuda_get_symbol(void *, const char *) { return nullptr; }  // Halide's own functions for CUDA are never used

int halide_cuda_initialize_kernels(void *user_context, void **state, const char *image, int) {
    const DeviceCall &call = call_of(user_context);
    try {
        std::lock_guard<std::mutex> lock(modules_mutex);
        if (!*state) *state = new Modules;
        if (call.rehearsal) return 0;
        Module &module = (*(Modules *)*state)[call.place.id];
        if (module.module) return 0;
        if (Result result = api().ModuleLoadDataEx(&module.module, image, 0, nullptr, nullptr)) {
            module.module = nullptr;
            return report(user_context, describe("cuModuleLoadDataEx", result), result);
        }
        return 0;
    } catch (const std::bad_alloc &) {
        return halide_error_code_out_of_memory;
    }
}

void halide_cuda_finalize_kernels(void *, void *) {}

int halide_cuda_run(void *user_context, void *state, const char *name, int blocks_x, int blocks_y, int blocks_z, int threads_x,
                    int threads_y, int threads_z, int shared_memory, size_t sizes[], void *arguments[], int8_t is_buffer[]) {
    const DeviceCall &call = call_of(user_context);
    if (call.rehearsal) return 0;
    try {
        CUfunction function;
        {
            std::lock_guard<std::mutex> lock(modules_mutex);
            Module &module = (*(Modules *)state)[call.place.id];
            auto known = module.functions.find(name);
            if (known == module.functions.end()) {
                if (Result result = api().ModuleGetFunction(&function, module.module, name))
                    return report(user_context, describe("cuModuleGetFunction", result), result);
                known = module.functions.emplace(name, Function{function, default_shared_memory}).first;
            }
            if (shared_memory > known->second.shared_memory) {
                if (Result result = api().FuncSetAttribute(known->second.function, max_dynamic_shared_size, shared_memory))
                    return report(
                        user_context,
                        describe(
                            ("cuFuncSetAttribute for " + std::to_string(shared_memory) + " bytes of shared memory").c_str(),
                            result),
                        result);
                known->second.shared_memory = shared_memory;
            }
            function = known->second.function;
        }
        constexpr int most = 256;  // of 4 or 8 bytes: CUDA takes 4 KB
        uint64_t handles[most];
        void *values[most + 1];
        int n = 0;
        for (; sizes[n]; n++) {
            if (n == most) return report(user_context, "a kernel has more than 256 arguments", success);
            values[n] = arguments[n];
            if (is_buffer[n]) handles[n] = ((halide_buffer_t *)arguments[n])->device, values[n] = &handles[n];
        }
        if (Result result = api().LaunchKernel(function, blocks_x, blocks_y, blocks_z, threads_x, threads_y, threads_z,
                                               shared_memory, (CUstream)call.place.stream, values, nullptr))
            return report(user_context, describe("cuLaunchKernel", result), result);
        return 0;
    } catch (const std::bad_alloc &) {
        return halide_error_code_out_of_memory;
    }
}

}  // extern "C"
