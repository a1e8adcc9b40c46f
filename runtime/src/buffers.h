// What kernels are called with: views of tensors as halide_buffer_t, and memory of a workspace.
#pragma once
#include "context.h"
#include "failure.h"
#include "tensor.h"

#include <HalideRuntime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <string>

namespace holdfast {

constexpr halide_type_t float32(halide_type_float, 32), int32(halide_type_int, 32), uint32(halide_type_uint, 32);

/// Of a kernel's buffers: bf16 goes by uint16 (generators/dtypes.h).
inline halide_type_t halide_type(const Dtype &dtype) {
    return halide_type_t(dtype == bf16 ? halide_type_uint : halide_type_float, dtype.dl.bits);
}

/// Where a tensor is.
inline Backend home_of(const Tensor &t) {
    Backend backend = Backend::cpu;
    backend_of(t.device.device_type, &backend);
    return backend;
}

/// An axis of a kernel's buffer. That of a single element may have any stride, and need not fit.
inline halide_dimension_t axis(int64_t extent, int64_t stride) {
    return {0, (int32_t)extent, extent > 1 ? (int32_t)stride : 0};
}

/// Whether so many steps of `stride` elements are within 32 bits, with as many again to spare.
inline bool fits(int64_t extent, int64_t stride) {
    return std::llabs(stride) <= std::numeric_limits<int32_t>::max() / 2 / std::max<int64_t>(extent, 1);
}

/// A halide_buffer_t with its dimensions, innermost first, all starting at 0.
struct Buffer : halide_buffer_t {
    halide_dimension_t axes[6];  // as many as any kernel has
    Buffer(const void *data, halide_type_t element, std::initializer_list<halide_dimension_t> list) : halide_buffer_t{} {
        std::copy(list.begin(), list.end(), axes);
        host = (uint8_t *)data, type = element, dimensions = (int32_t)list.size(), dim = axes;
    }
    Buffer(const Buffer &) = delete;
    /// The axis of heads, of which there is one, leads to `next`.
    void lead_to(const uint8_t *next) {
        const int64_t distance = ((intptr_t)next - (intptr_t)host) / type.bytes();
        axes[dimensions - 2].stride = std::abs(distance) < INT32_MAX ? (int32_t)distance : 0;
    }
};

/// Let rows of (d, t[, g], ..), `tokens` of them from `host` on, come from memory to L2 while others are worked on: a kernel
/// reads them once, and rows of a head lie far apart, where no processor looks ahead by itself.
inline void fetch(const Buffer &rows, const uint8_t *host, int64_t tokens) {
    constexpr int64_t line = 64;
    const int64_t bytes = rows.type.bytes(), groups = rows.dimensions == 5 ? rows.axes[2].extent : 1;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t g = 0; g < groups; g++)
            for (int64_t at = 0; at < rows.axes[0].extent * bytes; at += line)
                __builtin_prefetch(host + (t * rows.axes[1].stride + g * rows.axes[2].stride) * bytes + at, 0, 2);
}

/// Rows of one sequence and head, (d, t, 1, 1), or group of heads of queries, (d, t, g, 1, 1), of which some tokens at a time are
/// looked at.
struct HeadRows : Buffer {
    HeadRows(const Tensor &x, int64_t b, int64_t t, int64_t h)
        : Buffer(nullptr, halide_type(x.dtype), {{0, (int32_t)x.shape[3], 1}, {0, 0, 0}, {0, 1, 0}, {0, 1, 0}}),
          first(x.at<uint8_t>(b, t, h)), stride(x.stride[1]) {}
    HeadRows(const Tensor &x, int64_t b, int64_t t, int64_t h, int64_t group)
        : Buffer(nullptr, halide_type(x.dtype),
                 {{0, (int32_t)x.shape[3], 1}, {0, 0, 0}, axis(group, x.stride[2]), {0, 1, 0}, {0, 1, 0}}),
          first(x.at<uint8_t>(b, t, h * group)), stride(x.stride[1]) {
        static float nothing = 0;  // of no queries: without an address a kernel would take its call for a question of sizes
        if (!first) all_at(&nothing);
    }
    void look_at(int64_t t, int64_t tokens) {
        host = first + t * stride * type.bytes();
        axes[1] = axis(tokens, stride);
    }
    /// What the kernel looks at next are those from token t of `next` on: it asks for them meanwhile. Its axis of heads, of which there
    /// is one, leads there.
    void followed_by(const HeadRows &next, int64_t t) { lead_to(next.first + t * next.stride * type.bytes()); }
    /// All rows in one place, for what is not wanted.
    void all_at(void *row) {
        first = (uint8_t *)row, stride = 0;
        for (int axis = 1; axis < dimensions; axis++) axes[axis].stride = 0;
    }

private:
    uint8_t *first;
    int64_t stride;
};

/// One state: (e, d, 1, 1, 1).
struct State : Buffer {
    State(const float *data, int64_t D, int64_t V, int64_t stride)
        : Buffer(data, float32, {{0, (int32_t)V, 1}, axis(D, stride), {0, 1, 0}, {0, 1, 0}, {0, 1, 0}}) {}
    /// Of sequence s and head h. Value-major ones are for copy_state() alone: kernels want rows without gaps.
    State(const Tensor &states, int64_t s, int64_t h)
        : State(states.at(s, h), states.shape[2], states.shape[3], states.stride[2]) {
        if (states.shape[3] > 1) axes[0].stride = (int32_t)states.stride[3];
    }
    void followed_by(const State &next) { lead_to(next.host); }
};

inline void copy_state(const State &from, const State &to) {
    const int V = from.dim[0].extent, D = from.dim[1].extent;
    const ptrdiff_t across[] = {from.dim[0].stride, to.dim[0].stride}, down[] = {from.dim[1].stride, to.dim[1].stride};
    const float *source = (const float *)from.host;
    float *target = (float *)to.host;
    if (V == 1 || (across[0] == 1 && across[1] == 1)) {
        for (int d = 0; d < D; d++) std::memmove(target + d * down[1], source + d * down[0], V * sizeof(float));
        return;
    }
    constexpr int tile = 16;  // floats of a line of cache: each is used up while it is there
    for (int d0 = 0; d0 < D; d0 += tile)
        for (int e0 = 0; e0 < V; e0 += tile)
            for (int d = d0; d < std::min(d0 + tile, D); d++)
                for (int e = e0; e < std::min(e0 + tile, V); e++)
                    target[d * down[1] + e * across[1]] = source[d * down[0] + e * across[0]];
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

/// For the verbose line: the threads that share so many pieces of work, or the GPU.
inline std::string workers(const holdfast_context &c, const Variant &variant, const Tensor &first, int64_t pieces) {
    if (variant.target->backend == Backend::cpu) return std::to_string(c.threads_for(pieces)) + " threads";
    return first.on_host() ? "tensors copied from the CPU and back" : "on " + describe(first.device);
}

/// Turn what a kernel on the CPU returned into a Failure.
inline void check_returned(int rc, const Variant &variant, const Workspace &workspace) {
    if (rc == halide_error_code_out_of_memory) fail(HOLDFAST_OUT_OF_MEMORY, "workspace: out of memory in ", variant.name);
    if (rc) fail(HOLDFAST_INTERNAL_ERROR, variant.name, " returned ", rc, ": ", workspace.error);
}

}  // namespace holdfast
