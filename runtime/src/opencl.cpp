// OpenCL: which devices there are, and the context and queue of a call. Functions are looked up by name, as Halide does: there
// may be no OpenCL at all.
#include "opencl.h"

#include "context.h"
#include "failure.h"

#include <HalideRuntimeOpenCL.h>

#include <unistd.h>

#include <algorithm>
#include <type_traits>

struct _cl_context;
struct _cl_command_queue;
using cl_context = _cl_context *;
using cl_command_queue = _cl_command_queue *;

extern "C" void *halide_opencl_get_symbol(void *user_context, const char *name);  // of Halide's runtime

namespace holdfast::opencl {
namespace {

using Platform = void *;
using Device = void *;
constexpr int platform_name = 0x0902, device_type = 0x1000, device_name = 0x102b, device_base_address_align = 0x1019;
constexpr int context_devices = 0x1081, queue_context = 0x1090;
constexpr unsigned long all_devices = 0xffffffff, gpu = 4;

template<class Function>
Function find(const char *name) {
    return (Function)halide_opencl_get_symbol(nullptr, name);
}

struct Found {
    Platform platform;
    Device device;
    std::string name;
    bool gpu;
};

std::vector<Found> list() {
    auto platform_ids = find<int (*)(unsigned, Platform *, unsigned *)>("clGetPlatformIDs");
    auto platform_info = find<int (*)(Platform, unsigned, size_t, void *, size_t *)>("clGetPlatformInfo");
    auto device_ids = find<int (*)(Platform, unsigned long, unsigned, Device *, unsigned *)>("clGetDeviceIDs");
    auto device_info = find<int (*)(Device, unsigned, size_t, void *, size_t *)>("clGetDeviceInfo");
    std::vector<Found> found;
    constexpr unsigned most_platforms = 16, most_devices = 64;
    Platform platforms[most_platforms];
    unsigned platform_count = 0;
    if (platform_ids(most_platforms, platforms, &platform_count) != 0) return found;
    for (unsigned p = 0; p < std::min(platform_count, most_platforms); p++) {
        char vendor[256] = "";
        Device devices[most_devices];
        unsigned count = 0;
        platform_info(platforms[p], platform_name, sizeof vendor - 1, vendor, nullptr);
        if (device_ids(platforms[p], all_devices, most_devices, devices, &count) != 0) continue;
        for (unsigned d = 0; d < std::min(count, most_devices); d++) {
            char name[256] = "";
            unsigned long type = 0;
            device_info(devices[d], device_name, sizeof name - 1, name, nullptr);
            device_info(devices[d], device_type, sizeof type, &type, nullptr);
            found.push_back({platforms[p], devices[d], std::string(name) + " (" + vendor + ")", (type & gpu) != 0});
        }
    }
    return found;
}

/// The library's own context and queue: on the first GPU, else on the first device. Made once, kept.
struct Own {
    cl_context context = nullptr;
    cl_command_queue queue = nullptr;
    std::string error;

    Own() {
        auto create_context =
            find<cl_context (*)(const intptr_t *, unsigned, const Device *, void *, void *, int *)>("clCreateContext");
        auto create_queue = find<cl_command_queue (*)(cl_context, Device, unsigned long, int *)>("clCreateCommandQueue");
        const std::vector<Found> devices = list();
        const Found *chosen = nullptr;
        for (const Found &device : devices)
            if (!chosen || (device.gpu && !chosen->gpu)) chosen = &device;
        if (!chosen) {
            error = "OpenCL has no device";
            return;
        }
        int status = 0;
        constexpr intptr_t context_platform = 0x1084;
        const intptr_t properties[] = {context_platform, (intptr_t)chosen->platform, 0};
        context = create_context(properties, 1, &chosen->device, nullptr, nullptr, &status);
        if (context && status == 0) queue = create_queue(context, chosen->device, 0, &status);
        if (!context || !queue || status != 0)
            error = "OpenCL: no context or queue on " + chosen->name + ": status " + std::to_string(status);
    }
};

Own &own() {
    static Own *const made = new Own;
    return *made;
}

/// The pointer at `place`; null where no memory is, which a pipe says instead of crashing.
void *word_at(void *place) {
    int ends[2];
    if (pipe(ends)) return nullptr;
    void *word = nullptr;
    const bool readable = write(ends[1], place, sizeof word) == (ssize_t)sizeof word;
    if (readable && read(ends[0], &word, sizeof word) != (ssize_t)sizeof word) word = nullptr;
    close(ends[0]), close(ends[1]);
    return word;
}

/// Whether it can be asked what it is, which a stream of another API cannot. An object of an OpenCL driver begins with the address of
/// the driver's functions (cl_khr_icd), as the driver's platform and devices do. Where our own queue does not, nothing is known.
bool begins_like_an_object(void *queue) {
    static const std::vector<void *> all = [] {
        std::vector<void *> functions;
        for (const Found &device : list())
            for (void *object : {device.platform, device.device}) functions.push_back(*(void **)object);
        void *const ours = *(void **)own().queue;
        return std::count(functions.begin(), functions.end(), ours) ? functions : std::vector<void *>{};
    }();
    void *const first = word_at(queue);
    return first && (all.empty() || std::count(all.begin(), all.end(), first));
}

}  // namespace

Availability probe() {
    Availability found;
    if (!halide_opencl_get_symbol(nullptr, "clGetPlatformIDs")) {
        found.missing = "no OpenCL: libOpenCL.so.1 cannot be loaded";
        return found;
    }
    // What Halide's runtime will look up. It stops at the first that is missing, and must not be called again then.
    for (const char *name : {"clGetPlatformInfo",
                             "clGetDeviceIDs",
                             "clGetDeviceInfo",
                             "clCreateContext",
                             "clCreateContextFromType",
                             "clRetainContext",
                             "clReleaseContext",
                             "clGetContextInfo",
                             "clCreateCommandQueue",
                             "clRetainCommandQueue",
                             "clReleaseCommandQueue",
                             "clGetCommandQueueInfo",
                             "clCreateBuffer",
                             "clCreateSubBuffer",
                             "clRetainMemObject",
                             "clReleaseMemObject",
                             "clGetSupportedImageFormats",
                             "clGetMemObjectInfo",
                             "clGetImageInfo",
                             "clSetMemObjectDestructorCallback",
                             "clCreateProgramWithSource",
                             "clRetainProgram",
                             "clReleaseProgram",
                             "clBuildProgram",
                             "clGetProgramBuildInfo",
                             "clCreateKernel",
                             "clRetainKernel",
                             "clReleaseKernel",
                             "clSetKernelArg",
                             "clFlush",
                             "clFinish",
                             "clEnqueueReadBuffer",
                             "clEnqueueReadBufferRect",
                             "clEnqueueWriteBuffer",
                             "clEnqueueWriteBufferRect",
                             "clEnqueueCopyBuffer",
                             "clEnqueueReadImage",
                             "clEnqueueWriteImage",
                             "clEnqueueMapBuffer",
                             "clEnqueueMapImage",
                             "clEnqueueUnmapMemObject",
                             "clEnqueueNDRangeKernel"})
        if (!halide_opencl_get_symbol(nullptr, name)) {
            found.missing = std::string("the OpenCL library is too old: it lacks ") + name;
            return found;
        }
    for (const Found &device : list()) found.devices.push_back(device.name);
    found.missing = found.devices.empty() ? "OpenCL has no device: no driver is installed" : own().error;
    return found;
}

void *context_of(void *queue) {
    if (!begins_like_an_object(queue))
        fail(HOLDFAST_INVALID_ARGUMENT, "the stream of holdfast_context_set_stream is no cl_command_queue: at ", queue,
             " there is no object of an OpenCL driver");
    auto info = find<int (*)(void *, unsigned, size_t, void *, size_t *)>("clGetCommandQueueInfo");
    void *context = nullptr;
    if (int status = info(queue, queue_context, sizeof context, &context, nullptr))
        fail(HOLDFAST_INVALID_ARGUMENT,
             "the stream of holdfast_context_set_stream is no cl_command_queue: clGetCommandQueueInfo returned ", status);
    return context;
}

int64_t offset_alignment(void *context) {
    auto context_info = find<int (*)(void *, unsigned, size_t, void *, size_t *)>("clGetContextInfo");
    auto device_info = find<int (*)(Device, unsigned, size_t, void *, size_t *)>("clGetDeviceInfo");
    Device device = nullptr;
    unsigned bits = 0;
    context_info(context ? context : own().context, context_devices, sizeof device, &device, nullptr);
    device_info(device, device_base_address_align, sizeof bits, &bits, nullptr);
    return std::max(1u, bits / 8);
}

}  // namespace holdfast::opencl

using namespace holdfast;

extern "C" {

// Only one thread at a time is here: call_mutex().
int halide_acquire_cl_context(void *user_context, cl_context *context, cl_command_queue *queue, bool create) {
    const Workspace *workspace = (Workspace *)user_context;
    const DeviceCall *call = workspace ? workspace->device : nullptr;
    if (call && call->place.stream) {
        *context = (cl_context)call->place.context, *queue = (cl_command_queue)call->place.stream;
        return 0;
    }
    *context = nullptr, *queue = nullptr;
    if (!create || !call) return 0;
    opencl::Own &own = opencl::own();
    *context = own.context, *queue = own.queue;
    if (own.error.empty()) return 0;
    halide_error(user_context, own.error.c_str());
    return halide_error_code_gpu_device_error;
}

int halide_release_cl_context(void *) { return 0; }

}  // extern "C"
