// Memory of a caller on a GPU, through its own API: what DLPack hands over of OpenCL and Metal.
#pragma once
#include "required.h"
#include "step.h"

#include <dlfcn.h>

#include <chrono>
#include <iostream>
#include <set>
#include <thread>

#if HOLDFAST_TEST_METAL
extern "C" {
void *MTLCreateSystemDefaultDevice();
void objc_msgSend();  // of any type
void *sel_getUid(const char *name);
}
#endif

namespace test {

inline holdfast_backend backend(const std::string &name) {
    holdfast_backend b = {};
    b.struct_size = sizeof b;
    for (int n = 0; n < holdfast_backend_count(); n++) {
        EXPECT_EQ(holdfast_backend_at(n, &b), HOLDFAST_OK);
        if (b.name == name) return b;
    }
    ADD_FAILURE() << "no backend " << name;
    return b;
}

/// Whether it can run here. Says why not; a failure if this build and HOLDFAST_REQUIRED_BACKENDS have it.
inline bool runs(const std::string &name) {
    const holdfast_backend b = backend(name);
    if (b.available) return true;
    std::cout << name << " is not run: " << b.missing << "\n";
    EXPECT_FALSE(b.compiled && required(name)) << "HOLDFAST_REQUIRED_BACKENDS has " << name << ": " << b.missing;
    return false;
}

/// A device of a caller.
class Device {
public:
    virtual ~Device() = default;
    virtual void *buffer(size_t bytes) = 0;
    virtual void release(void *buffer) = 0;
    virtual void write(void *to, size_t at, const void *from, size_t bytes) = 0;
    virtual void read(void *from, size_t at, void *to, size_t bytes) = 0;
    /// How many refer to a buffer, once all work is done; 0: who knows.
    virtual unsigned references(void *buffer) = 0;
    DLDeviceType type;
    const char *name;        // as in messages of the library
    void *stream = nullptr;  // what holdfast_context_set_stream takes
};

class OpenCLDevice : public Device {
public:
    OpenCLDevice() {
        type = kDLOpenCL, name = "OpenCL device 0";
        void *platform = nullptr, *device = nullptr;
        int status = 0;
        EXPECT_EQ(find<int(unsigned, void **, unsigned *)>("clGetPlatformIDs")(1, &platform, nullptr), 0);
        EXPECT_EQ(find<int(void *, unsigned long, unsigned, void **, unsigned *)>("clGetDeviceIDs")(platform, 0xffffffff, 1,
                                                                                                    &device, nullptr),
                  0);
        context = find<void *(void *, unsigned, void **, void *, void *, int *)>("clCreateContext")(nullptr, 1, &device,
                                                                                                    nullptr, nullptr, &status);
        stream = find<void *(void *, void *, unsigned long, int *)>("clCreateCommandQueue")(context, device, 0, &status);
        EXPECT_NE(stream, nullptr);
    }
    void *buffer(size_t bytes) override {
        int status = 0;
        void *made =
            find<void *(void *, unsigned long, size_t, void *, int *)>("clCreateBuffer")(context, 1, bytes, nullptr, &status);
        EXPECT_EQ(status, 0);
        return made;
    }
    /// One that takes memory where it is used alone; null where the device does not let it be so large.
    void *sparse_buffer(size_t bytes) {
        void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        int status = 0;
        return find<void *(void *, unsigned long, size_t, void *, int *)>("clCreateBuffer")(context, 1 | 8, bytes, memory,
                                                                                            &status);
    }
    void release(void *buffer) override { find<int(void *)>("clReleaseMemObject")(buffer); }
    void write(void *to, size_t at, const void *from, size_t bytes) override {
        using Write = int(void *, void *, unsigned, size_t, size_t, const void *, unsigned, const void *, void *);
        EXPECT_EQ(find<Write>("clEnqueueWriteBuffer")(stream, to, 1, at, bytes, from, 0, nullptr, nullptr), 0);
    }
    void read(void *from, size_t at, void *to, size_t bytes) override {
        using Read = int(void *, void *, unsigned, size_t, size_t, void *, unsigned, const void *, void *);
        EXPECT_EQ(find<Read>("clEnqueueReadBuffer")(stream, from, 1, at, bytes, to, 0, nullptr, nullptr), 0);
    }
    unsigned references(void *buffer) override {
        using Info = int(void *, unsigned, size_t, void *, size_t *);
        unsigned count = 0;
        EXPECT_EQ(find<int(void *)>("clFinish")(stream), 0);
        EXPECT_EQ(find<Info>("clGetMemObjectInfo")(buffer, 0x1105, sizeof count, &count, nullptr), 0);
        return count;
    }

private:
    void *const library = dlopen("libOpenCL.so.1", RTLD_NOW), *context;
    template<class Function>
    Function *find(const char *function) const {
        return (Function *)dlsym(library, function);
    }
};

#if HOLDFAST_TEST_METAL
/// Apple's, or the stand-in.
class MetalDevice : public Device {
public:
    MetalDevice() {
        type = kDLMetal, name = "Metal device 0";
        EXPECT_NE(device, nullptr);
    }
    void *buffer(size_t bytes) override {
        return send<void *, size_t, size_t>(device, "newBufferWithLength:options:", bytes, 0);  // shared with the CPU
    }
    ~MetalDevice() override { release(device); }
    void release(void *object) override { send<void>(object, "release"); }
    void write(void *to, size_t at, const void *from, size_t bytes) override { std::memcpy(memory(to) + at, from, bytes); }
    void read(void *from, size_t at, void *to, size_t bytes) override { std::memcpy(to, memory(from) + at, bytes); }
    unsigned references([[maybe_unused]] void *buffer) override {
#ifdef __APPLE__
        return 0;  // Apple keeps its own
#else
        return (unsigned)send<unsigned long>(buffer, "retainCount");
#endif
    }

private:
    void *const device = MTLCreateSystemDefaultDevice();
    template<class Result, class... Arguments>
    static Result send(void *object, const char *selector, Arguments... arguments) {
        return ((Result (*)(void *, void *, Arguments...))&objc_msgSend)(object, sel_getUid(selector), arguments...);
    }
    static char *memory(void *buffer) { return send<char *>(buffer, "contents"); }
};
#endif

/// Tensors in one buffer of a device, one after the other, where no API would let a buffer begin.
class OnDevice {
public:
    std::vector<DLTensor> tensors;
    std::vector<size_t> offsets, bytes;
    void *memory = nullptr;

    /// `list`, without negative strides, of which those at the places `rows` are handed over in `dtype`, the others in fp32.
    OnDevice(Device &device, const std::vector<Tensor> &list, const Dtype &dtype, const std::set<size_t> &rows)
        : device(device), views(list) {
        size_t end = 0;
        constexpr size_t alignment = sizeof(int64_t);  // positions may be of such
        for (size_t n = 0; n < list.size(); n++) {
            const Dtype &type = rows.count(n) ? dtype : f32;
            Tensor &x = views[n];
            stored.emplace_back(type, x.data, x.shape, x.stride);
            tensors.push_back(x.dl());
            tensors[n].dtype = dl_type(type), tensors[n].device = {device.type, 0};
            size_t elements = 1;
            for (size_t axis = 0; axis < x.shape.size(); axis++) elements += (size_t)((x.shape[axis] - 1) * x.stride[axis]);
            const size_t element = type == f32 ? sizeof(float) : sizeof(uint16_t);
            bytes.push_back(elements * element);
            if (rows.count(n)) end += element;
            offsets.push_back(end);
            end = (end + bytes[n] + alignment - 1) / alignment * alignment;
        }
        memory = device.buffer(end);
        for (size_t n = 0; n < list.size(); n++) {
            device.write(memory, offsets[n], stored[n].data(), bytes[n]);
            tensors[n].data = memory, tensors[n].byte_offset = offsets[n];
        }
    }
    OnDevice(const OnDevice &) = delete;
    ~OnDevice() { device.release(memory); }
    void fetch(const std::vector<size_t> &outputs) {
        for (size_t n : outputs) device.read(memory, offsets[n], stored[n].data(), bytes[n]), stored[n].load();
    }
    /// Of what has been fetched.
    bool gaps_intact() const {
        return std::all_of(stored.begin(), stored.end(), [](const Stored &s) { return s.gaps_intact(); });
    }
    /// The library does not hold on to the buffer. (PoCL lets go a little later than it says so.)
    void expect_released() const {
        unsigned count = 2;
        for (int n = 0; n < 200 && count > 1; n++) {
            if (n) std::this_thread::sleep_for(std::chrono::milliseconds(5));
            count = device.references(memory);
        }
        EXPECT_LE(count, 1u) << "the library holds on to the caller's buffer";
    }

private:
    Device &device;
    std::vector<Tensor> views;
    std::vector<Stored> stored;
};

}  // namespace test
