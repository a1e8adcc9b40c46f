// What kernels are called with by their own C signatures: arrays of tests as Halide sees them.
#pragma once
#include "array.h"
#include "dtype.h"

#include <HalideBuffer.h>

#include <vector>

namespace test {

/// An array whose elements lie at `data`: `axes` of it, innermost first. bf16 goes by uint16.
inline Halide::Runtime::Buffer<void> view(void *data, const Dtype &dtype, const Array &a, const std::vector<int> &axes) {
    std::vector<halide_dimension_t> dims;
    for (int axis : axes) dims.emplace_back(0, (int32_t)a.shape[axis], (int32_t)a.stride[axis]);
    const halide_type_t type(dtype == bf16 ? halide_type_uint : halide_type_float, dtype == f32 ? 32 : 16);
    return Halide::Runtime::Buffer<void>(type, data, (int)dims.size(), dims.data());
}

/// The same, with heads, axis `n` of the view, in two axes: those of a group, n, and the groups, n + 1.
inline Halide::Runtime::Buffer<void> in_groups(const Halide::Runtime::Buffer<void> &whole, int n, int64_t group) {
    Halide::Runtime::Buffer<void> split = whole;
    const halide_dimension_t heads = whole.raw_buffer()->dim[n];
    split.embed(n, 0);
    split.raw_buffer()->dim[n] = {0, (int32_t)group, heads.stride};
    split.raw_buffer()->dim[n + 1] = {0, heads.extent / (int32_t)group, heads.stride * (int32_t)group};
    return split;
}

}  // namespace test
