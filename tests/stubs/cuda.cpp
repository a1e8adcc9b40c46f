// A CUDA driver for tests: does nothing but keep a record of the calls, one line each, and check their order. Device memory is
// memory of the process, so that copies work; kernels are not run. Loaded in the place of libcuda.so.1 (LD_LIBRARY_PATH).
//
//   HOLDFAST_STUB_FAIL=<function>:<result>[:<nth call>]   that call fails
//   HOLDFAST_STUB_DEVICES=<sm>,<sm>...                    the devices; default "80,90,86"
//
// Built a second time with HOLDFAST_STUB_OLD as a driver that lacks cuStreamGetCtx.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define STUB extern "C" __attribute__((visibility("default")))

namespace {

using Result = int;
constexpr Result success = 0, invalid_value = 1, out_of_memory = 2, invalid_context = 201, invalid_handle = 400,
                 not_found = 500, capture_unsupported = 900;

struct Context {
    int device;
    unsigned long long id;
};

struct State {
    std::string record;
    std::map<int, Context *> primary;
    std::map<const void *, int> shared;  // function -> dynamic shared memory allowed
    std::map<void *, size_t> memory;
    std::map<std::string, int> calls;
    unsigned long long contexts = 0;
    int capturing = 0;  // CUstreamCaptureStatus of all streams
};

/// Calls of several threads come one after the other.
class Locked {
    std::unique_lock<std::recursive_mutex> lock;
    State &state;

public:
    Locked(std::recursive_mutex &mutex, State &state) : lock(mutex), state(state) {}
    State *operator->() const { return &state; }
};
Locked state() {
    static std::recursive_mutex mutex;
    static State s;
    return {mutex, s};
}

thread_local std::vector<Context *> stack;

/// What fails while a stream is being captured. (Copies do not: a graph keeps their addresses.)
bool captured_never(const std::string &function) {
    return function == "cuMemAlloc" || function == "cuMemFree" || function == "cuStreamSynchronize" ||
           function == "cuModuleLoadDataEx";
}

/// Write a line; the result that the call shall have.
Result note(const char *function, const std::string &arguments = "") {
    const Locked s = state();
    s->record += std::string(function) + (arguments.empty() ? "" : " " + arguments) + "\n";
    if (s->capturing && captured_never(function)) return capture_unsupported;
    const int n = ++s->calls[function];
    const char *fail = std::getenv("HOLDFAST_STUB_FAIL");
    if (!fail) return success;
    const std::string text = fail;
    const size_t first = text.find(':'), second = text.find(':', first + 1);
    if (text.substr(0, first) != function) return success;
    if (second != std::string::npos && std::atoi(text.c_str() + second + 1) != n) return success;
    return std::atoi(text.c_str() + first + 1);
}

std::string text(const void *pointer) {
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%p", pointer);
    return buffer;
}

std::vector<int> devices() {
    const char *list = std::getenv("HOLDFAST_STUB_DEVICES");
    std::vector<int> sms;
    for (const char *p = list ? list : "80,90,86"; *p; p += *p == ',') sms.push_back((int)std::strtol(p, (char **)&p, 10));
    return sms;
}

Context *current() { return stack.empty() ? nullptr : stack.back(); }

}  // namespace

// What tests look at.
STUB const char *stub_record() { return state()->record.c_str(); }
STUB void stub_clear() { state()->record.clear(), state()->calls.clear(); }
STUB void *stub_context(int device) { return new Context{device, ++state()->contexts}; }
STUB void *stub_stream(void *context) { return new void *(context); }
STUB void stub_capture(int status) { state()->capturing = status; }
/// The context is gone, with its memory and kernels, and another one is where it was.
STUB void stub_replace(Context *context) {
    context->id = ++state()->contexts;
    state()->memory.clear();
}

STUB Result cuInit(unsigned) { return note("cuInit"); }
STUB Result cuDeviceGetCount(int *count) {
    *count = (int)devices().size();
    return note("cuDeviceGetCount");
}
STUB Result cuDeviceGet(int *device, int n) {
    if (n < 0 || n >= (int)devices().size()) return 101;
    *device = n;
    return note("cuDeviceGet");
}
STUB Result cuDeviceGetName(char *name, int length, int device) {
    std::snprintf(name, (size_t)length, "Stub %d", device);
    return note("cuDeviceGetName");
}
STUB Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    const int sm = devices()[(size_t)device];
    *value = attribute == 75 ? sm / 10 : attribute == 76 ? sm % 10 : 0;
    return note("cuDeviceGetAttribute");
}
STUB Result cuDevicePrimaryCtxRetain(Context **context, int device) {
    if (Result result = note("cuDevicePrimaryCtxRetain", std::to_string(device))) return result;
    const Locked s = state();
    Context *&primary = s->primary[device];
    if (!primary) primary = (Context *)stub_context(device);
    *context = primary;
    return success;
}
STUB Result cuCtxGetCurrent(Context **context) {
    *context = current();
    return note("cuCtxGetCurrent");
}
STUB Result cuCtxGetDevice(int *device) {
    if (!current()) return invalid_context;
    *device = current()->device;
    return note("cuCtxGetDevice");
}
STUB Result cuCtxGetId(Context *context, unsigned long long *id) {
    *id = context->id;
    return note("cuCtxGetId");
}
STUB Result cuCtxPushCurrent_v2(Context *context) {
    if (Result result = note("cuCtxPushCurrent", text(context))) return result;
    stack.push_back(context);
    return success;
}
STUB Result cuCtxPopCurrent_v2(Context **context) {
    if (stack.empty()) return invalid_context;
    *context = current();
    stack.pop_back();
    return note("cuCtxPopCurrent");
}
STUB Result cuModuleLoadDataEx(void **module, const void *image, unsigned, int *, void **) {
    if (Result result = note("cuModuleLoadDataEx", text(current()))) return result;
    if (!current() || !image) return invalid_value;
    *module = new int;
    return success;
}
STUB Result cuModuleGetFunction(void **function, void *module, const char *name) {
    if (Result result = note("cuModuleGetFunction", name)) return result;
    if (!module) return not_found;
    *function = new int;
    return success;
}
STUB Result cuFuncSetAttribute(void *function, int attribute, int value) {
    if (Result result = note("cuFuncSetAttribute", std::to_string(attribute) + " " + std::to_string(value))) return result;
    state()->shared[function] = value;
    return success;
}
STUB Result cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                           unsigned shared, void *stream, void **arguments, void **) {
    if (Result result = note("cuLaunchKernel", "context " + text(current()) + " stream " + text(stream))) return result;
    const Locked s = state();
    const auto allowed = s->shared.find(function);
    const unsigned most = allowed == s->shared.end() ? 48 << 10 : (unsigned)allowed->second;
    if (!current() || !function || !arguments || !gx || !gy || !gz || !bx || !by || !bz || bx * by * bz > 1024 || gy > 65535 ||
        gz > 65535 || shared > most)
        return invalid_value;
    return success;
}
STUB Result cuMemAlloc_v2(void **memory, size_t bytes) {
    if (Result result = note("cuMemAlloc", std::to_string(bytes))) return result;
    *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    state()->memory[*memory] = bytes;
    return *memory ? success : out_of_memory;
}
STUB Result cuMemFree_v2(void *memory) {
    if (Result result = note("cuMemFree")) return result;
    if (!state()->memory.erase(memory)) return invalid_value;
    std::free(memory);
    return success;
}
STUB Result cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *) {
    if (Result result = note("cuMemcpyHtoDAsync", std::to_string(bytes) + " from " + text(from))) return result;
    std::memcpy(to, from, bytes);
    return success;
}
STUB Result cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t bytes, void *) {
    if (Result result = note("cuMemcpyDtoHAsync", std::to_string(bytes))) return result;
    std::memcpy(to, from, bytes);
    return success;
}
STUB Result cuStreamSynchronize(void *stream) { return note("cuStreamSynchronize", text(stream)); }
STUB Result cuStreamIsCapturing(void *, int *status) {
    *status = state()->capturing;
    return note("cuStreamIsCapturing");
}
#ifndef HOLDFAST_STUB_OLD
STUB Result cuStreamGetCtx(void *stream, void **context) {
    if (!stream) return invalid_handle;
    *context = *(void **)stream;
    return note("cuStreamGetCtx");
}
#endif
STUB Result cuGetErrorName(Result, const char **name) {
    *name = "CUDA_ERROR_STUB";
    return success;
}
STUB Result cuGetErrorString(Result, const char **description) {
    *description = "as the test asked for";
    return success;
}
