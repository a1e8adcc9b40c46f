// What can run kernels: the CPU, and the GPU APIs. A GPU's driver is loaded when something asks for that backend, not before.
#pragma once
#include <dlpack/dlpack.h>

#include <mutex>
#include <string>
#include <vector>

struct halide_device_interface_t;

namespace holdfast {

enum class Backend { cpu, cuda, metal, opencl, vulkan };
constexpr Backend all_backends[] = {Backend::cpu, Backend::cuda, Backend::metal, Backend::opencl, Backend::vulkan};

const char *name_of(Backend backend);

/// The backend that works on memory of that kind; false if there is none.
bool backend_of(DLDeviceType type, Backend *backend);

bool compiled(Backend backend);

/// What a backend finds on this machine.
struct Availability {
    std::string missing;               // why it cannot run; "": it can
    std::vector<std::string> devices;  // their names, also when none of them will do
};

/// Looked up once in the process, at the first call. Never prints, never fails.
const Availability &availability(Backend backend);

/// Halide's functions for memory of a GPU backend that was compiled.
const halide_device_interface_t *device_interface(Backend backend);

/// Halide's runtimes of OpenCL, Metal and Vulkan keep a context, queues and compiled kernels of the process: calls for one of
/// them are made one after the other, under this lock. CUDA's (cuda.cpp) need none.
std::mutex &call_mutex(Backend backend);

}  // namespace holdfast
