// Checked views of the caller's DLTensors.
#pragma once
#include "failure.h"

#include <cstdint>
#include <string>

namespace holdfast {

/// Type of the elements of a tensor.
struct Dtype {
    const char *name;  // as in cmake/kernels.cmake
    DLDataType dl;
    int64_t bytes() const { return dl.bits / 8; }
    bool operator==(const Dtype &other) const { return dl.code == other.dl.code && dl.bits == other.dl.bits; }
};
constexpr Dtype f32 = {"f32", {kDLFloat, 32, 1}}, f16 = {"f16", {kDLFloat, 16, 1}}, bf16 = {"bf16", {kDLBfloat, 16, 1}};
constexpr Dtype i32 = {"i32", {kDLInt, 32, 1}}, i64 = {"i64", {kDLInt, 64, 1}};

/// A tensor that has passed check_tensor(): extents fit int32, the byte span of its elements fits int64.
struct Tensor {
    static constexpr int max_rank = 4;
    const char *name;
    Dtype dtype;
    char *data;  // element [0, 0, ...]; null only if empty. Where `handle` is set: its place in that, as a number of bytes
    DLDevice device;
    void *handle;  // of OpenCL, Metal and Vulkan, whose memory has no addresses; else null
    int rank;
    int64_t shape[max_rank], stride[max_rank];  // strides in elements
    int64_t low, high;                          // bytes of its elements, relative to data: [low, high)

    bool empty() const { return low == high; }
    bool on_host() const { return device.device_type == kDLCPU || device.device_type == kDLCUDAHost; }
    /// Address of an element, seen as one of type E.
    template<class E = float>
    E *at(int64_t i0, int64_t i1 = 0, int64_t i2 = 0) const {
        return data ? (E *)(data + (i0 * stride[0] + i1 * stride[1] + i2 * stride[2]) * dtype.bytes()) : nullptr;
    }
};

/// Axis names of a tensor argument, e.g. {"q", "BTHK"}, one letter an axis, h for Hk and n for N + 1; and of which types its
/// elements may be.
struct TensorSpec {
    const char *name, *axes;
    enum Types { only_f32, floats, integers } types = only_f32;
};

/// "[B, T, H, K]".
std::string describe(const TensorSpec &spec);

/// Check pointer, dtype, device, rank, extents, data, strides, overflow. Throws INVALID_ARGUMENT, UNSUPPORTED.
Tensor check_tensor(const TensorSpec &spec, const DLTensor *tensor);

/// Check that both are on the same device.
void check_same_device(const Tensor &tensor, const Tensor &other);

/// "the CPU", "CUDA device 0", ...
std::string describe(DLDevice device);

/// Check that extent `axis` is `expected`, which is `because` ("that of q").
void check_extent(const TensorSpec &spec, const Tensor &tensor, int axis, int64_t expected, const char *because);

/// Check that the elements are of the same type as those of `first`.
void check_same_dtype(const Tensor &tensor, const Tensor &first);

/// Check that the last axis is contiguous.
void check_rows(const Tensor &tensor);

/// Check that no two elements of an output share memory.
void check_distinct_elements(const Tensor &output);

/// Check that `output` shares no element with `other`. Exact for tensors that lie apart and for views of different columns
/// of the last axis of one array; other interleaved views count as overlapping.
void check_no_overlap(const Tensor &output, const Tensor &other);

/// The same elements in the same places.
bool same_elements(const Tensor &a, const Tensor &b);

}  // namespace holdfast
