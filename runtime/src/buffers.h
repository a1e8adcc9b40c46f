// What kernels are called with: views of tensors as halide_buffer_t, and memory of a workspace.
#pragma once
#include "context.h"
#include "failure.h"
#include "tensor.h"

#include <HalideRuntime.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <initializer_list>

namespace holdfast {

constexpr halide_type_t float32(halide_type_float, 32), int32(halide_type_int, 32), uint32(halide_type_uint, 32);

/// Of a kernel's buffers: bf16 goes by uint16 (generators/dtypes.h).
inline halide_type_t halide_type(const Dtype &dtype) {
    return halide_type_t(dtype == bf16 ? halide_type_uint : halide_type_float, dtype.dl.bits);
}

/// A halide_buffer_t with its dimensions, innermost first, all starting at 0.
struct Buffer : halide_buffer_t {
    halide_dimension_t axes[5];
    Buffer(const void *data, halide_type_t element, std::initializer_list<halide_dimension_t> list) : halide_buffer_t{} {
        std::copy(list.begin(), list.end(), axes);
        host = (uint8_t *)data, type = element, dimensions = (int32_t)list.size(), dim = axes;
    }
    Buffer(const Buffer &) = delete;
};

/// One state: (e, d, 1, 1, 1).
struct State : Buffer {
    State(const float *data, int64_t K, int64_t V, int64_t stride)
        : Buffer(data, float32, {{0, (int32_t)V, 1}, {0, (int32_t)K, (int32_t)stride}, {0, 1, 0}, {0, 1, 0}, {0, 1, 0}}) {}
};

inline void copy_state(const State &from, const State &to) {
    const int V = from.dim[0].extent, K = from.dim[1].extent;
    for (int d = 0; d < K; d++)
        std::memmove((float *)to.host + (ptrdiff_t)d * to.dim[1].stride,
                     (const float *)from.host + (ptrdiff_t)d * from.dim[1].stride, V * sizeof(float));
}

/// Memory of a workspace, given back at the end of the scope.
class Scratch {
public:
    Scratch(Workspace &workspace, size_t floats) : workspace(workspace), memory(workspace.allocate(floats * sizeof(float))) {
        if (!memory) fail(HOLDFAST_OUT_OF_MEMORY, "workspace: out of memory, ", floats * sizeof(float), " bytes asked for");
    }
    Scratch(const Scratch &) = delete;
    ~Scratch() { workspace.free(memory); }
    float *floats() const { return (float *)memory; }

private:
    Workspace &workspace;
    void *memory;
};

}  // namespace holdfast
