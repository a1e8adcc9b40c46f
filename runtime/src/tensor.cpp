#include "tensor.h"

#include "backend.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>

namespace holdfast {
namespace {

std::string describe(DLDataType type) {
    const char *code = type.code == kDLInt       ? "int"
                       : type.code == kDLUInt    ? "uint"
                       : type.code == kDLFloat   ? "float"
                       : type.code == kDLBfloat  ? "bfloat"
                       : type.code == kDLBool    ? "bool"
                       : type.code == kDLComplex ? "complex"
                                                 : nullptr;
    std::string text = code ? code + std::to_string(type.bits)
                            : "code " + std::to_string(type.code) + ", " + std::to_string(type.bits) + " bits";
    return type.lanes == 1 ? text : text + " x " + std::to_string(type.lanes) + " lanes";
}

/// The Dtype of that type among those that `types` has; null if there is none.
const Dtype *find_dtype(DLDataType type, TensorSpec::Types types) {
    static constexpr Dtype lists[][3] = {{f32, f32, f32}, {f32, f16, bf16}, {i32, i64, i64}};  // by Types
    for (const Dtype &known : lists[types])
        if (type.code == known.dl.code && type.bits == known.dl.bits && type.lanes == 1) return &known;
    return nullptr;
}

std::string name_of_axis(char letter) { return letter == 'h' ? "Hk" : letter == 'n' ? "N + 1" : std::string(1, letter); }

std::string describe(const DLTensor &t) {
    std::string text = "[";
    for (int axis = 0; axis < t.ndim; axis++) text += (axis ? ", " : "") + std::to_string(t.shape[axis]);
    return text + "]";
}

/// "1 (cpu), 2 (cuda)": what tensors may be on.
std::string device_types() {
    std::string text;
    for (DLDeviceType type : {kDLCPU, kDLCUDA, kDLOpenCL, kDLVulkan, kDLMetal}) {
        Backend backend;
        if (backend_of(type, &backend) && compiled(backend))
            text += (text.empty() ? "" : ", ") + std::to_string(type) + " (" + name_of(backend) + ")";
    }
    return text;
}

bool overlaps_range(const Tensor &a, const Tensor &b) {
    if (a.handle != b.handle) return false;
    return a.data + a.low < b.data + b.high && b.data + b.low < a.data + a.high;
}

}  // namespace

std::string describe(const TensorSpec &spec) {
    std::string text = "[";
    for (const char *axis = spec.axes; *axis; axis++) text += (axis == spec.axes ? "" : ", ") + name_of_axis(*axis);
    return text + "]";
}

std::string describe(DLDevice device) {
    const char *api = nullptr;
    switch (device.device_type) {
    case kDLCPU:
    case kDLCUDAHost: return "the CPU";
    case kDLCUDA:
    case kDLCUDAManaged: api = "CUDA"; break;
    case kDLOpenCL: api = "OpenCL"; break;
    case kDLVulkan: api = "Vulkan"; break;
    case kDLMetal: api = "Metal"; break;
    default: return "device type " + std::to_string(device.device_type);
    }
    return std::string(api) + " device " + std::to_string(device.device_id);
}

void check_same_device(const Tensor &tensor, const Tensor &other) {
    Backend a{}, b{};
    backend_of(tensor.device.device_type, &a), backend_of(other.device.device_type, &b);
    if (a != b || (a != Backend::cpu && tensor.device.device_id != other.device.device_id))
        fail(HOLDFAST_INVALID_ARGUMENT, tensor.name, " is on ", describe(tensor.device), " and ", other.name, " on ",
             describe(other.device), "; expected all tensors on one device");
}

Tensor check_tensor(const TensorSpec &spec, const DLTensor *t) {
    const int rank = (int)std::strlen(spec.axes);
    if (!t) fail(HOLDFAST_INVALID_ARGUMENT, spec.name, " is NULL; expected a tensor ", describe(spec));
    if (t->ndim != rank)
        fail(HOLDFAST_INVALID_ARGUMENT, spec.name, " has ", t->ndim, " dimensions; expected ", rank, ", ", describe(spec));
    if (!t->shape)
        fail(HOLDFAST_INVALID_ARGUMENT, spec.name, " has a NULL shape; expected ", rank, " extents, ", describe(spec));
    const Dtype *dtype = find_dtype(t->dtype, spec.types);
    if (!dtype)
        fail(HOLDFAST_UNSUPPORTED, spec.name, " has dtype ", describe(t->dtype), "; expected ",
             spec.types == TensorSpec::integers ? "int32 or int64"
             : spec.types == TensorSpec::floats ? "float32, float16 or bfloat16"
                                                : "float32");
    const int64_t element = dtype->bytes();
    Backend backend;
    if (!backend_of(t->device.device_type, &backend) || !compiled(backend))
        fail(HOLDFAST_UNSUPPORTED, spec.name, " is on device type ", (int)t->device.device_type,
             "; expected that of a backend of this build: ", device_types());

    Tensor view{spec.name, *dtype, nullptr, t->device, nullptr, rank, {}, {}, 0, 0};
    bool empty = false;
    for (int axis = 0; axis < rank; axis++) {
        const int64_t extent = t->shape[axis];
        if (extent < 0)
            fail(HOLDFAST_INVALID_ARGUMENT, spec.name, " has shape ", describe(*t), "; expected extents of at least 0");
        if (extent > std::numeric_limits<int32_t>::max())
            fail(HOLDFAST_UNSUPPORTED, spec.name, " has shape ", describe(*t), "; expected extents below 2^31");
        view.shape[axis] = extent;
        empty |= extent == 0;
    }
    int64_t compact = 1;
    for (int axis = rank - 1; axis >= 0; axis--) {
        view.stride[axis] = t->strides ? t->strides[axis] : compact;
        // An empty tensor has no elements to reach, so its strides cannot overflow anything; nor can that of an axis of one.
        int64_t reach = 0;
        if (!empty && __builtin_mul_overflow(view.shape[axis] - 1, view.stride[axis], &reach))
            fail(HOLDFAST_INVALID_ARGUMENT, spec.name, " has stride ", view.stride[axis], " on axis ", axis, " of extent ",
                 view.shape[axis], "; expected offsets that fit 64 bits");
        if (!empty && (__builtin_mul_overflow(reach, element, &reach) ||
                       __builtin_add_overflow(reach < 0 ? view.low : view.high, reach, reach < 0 ? &view.low : &view.high)))
            fail(HOLDFAST_INVALID_ARGUMENT, spec.name, " has shape ", describe(*t), " and stride ", view.stride[axis],
                 " on axis ", axis, "; expected byte offsets that fit 64 bits");
        if (__builtin_mul_overflow(compact, std::max<int64_t>(view.shape[axis], 1), &compact))
            fail(HOLDFAST_INVALID_ARGUMENT, spec.name, " has shape ", describe(*t), "; expected fewer than 2^63 elements");
    }
    if (empty) return view;
    if (__builtin_add_overflow(view.high, element, &view.high))
        fail(HOLDFAST_INVALID_ARGUMENT, spec.name, " has shape ", describe(*t), "; expected byte offsets that fit 64 bits");
    if (!t->data) fail(HOLDFAST_INVALID_ARGUMENT, spec.name, " has NULL data; expected memory for shape ", describe(*t));
    const bool addressable = backend == Backend::cpu || backend == Backend::cuda;
    if (!addressable) view.handle = t->data;
    const uintptr_t base = (addressable ? (uintptr_t)t->data : 0) + t->byte_offset;
    const uint64_t below = 0 - (uint64_t)view.low, above = (uint64_t)view.high;
    if (below > base || above > UINTPTR_MAX - base)
        fail(HOLDFAST_INVALID_ARGUMENT, spec.name, " has shape ", describe(*t), " and strides that reach bytes ", view.low,
             " .. ", view.high, " of its data; expected them within the address space");
    if (base < t->byte_offset || base % element)
        fail(HOLDFAST_INVALID_ARGUMENT, spec.name, " has data and byte_offset ", t->byte_offset,
             " that are not the address of a ", describe(t->dtype), "; expected a multiple of ", element);
    view.data = (char *)base;
    return view;
}

void check_extent(const TensorSpec &spec, const Tensor &tensor, int axis, int64_t expected, const char *because) {
    if (tensor.shape[axis] != expected)
        fail(HOLDFAST_INVALID_ARGUMENT, spec.name, " ", describe(spec), " has ", name_of_axis(spec.axes[axis]), " = ",
             tensor.shape[axis], "; expected ", expected, ", ", because);
}

void check_same_dtype(const Tensor &t, const Tensor &first) {
    if (!(t.dtype == first.dtype))
        fail(HOLDFAST_INVALID_ARGUMENT, t.name, " has dtype ", describe(t.dtype.dl), "; expected ", describe(first.dtype.dl),
             ", that of ", first.name);
}

void check_rows(const Tensor &t) {
    const int last = t.rank - 1;
    if (!t.empty() && t.shape[last] > 1 && t.stride[last] != 1)
        fail(HOLDFAST_INVALID_ARGUMENT, t.name, " has stride ", t.stride[last], " on its last axis; expected 1");
}

void check_distinct_elements(const Tensor &t) {
    if (t.empty()) return;
    // Nested axes: each, taken by growing stride, steps over all that the smaller ones cover.
    int order[Tensor::max_rank];
    for (int axis = 0; axis < t.rank; axis++) {
        int n = axis;
        for (; n > 0 && std::llabs(t.stride[order[n - 1]]) > std::llabs(t.stride[axis]); n--) order[n] = order[n - 1];
        order[n] = axis;
    }
    int64_t covered = 1;
    for (int n = 0; n < t.rank; n++) {
        const int axis = order[n];
        if (t.shape[axis] == 1) continue;
        const int64_t step = std::llabs(t.stride[axis]);
        if (step < covered)
            fail(HOLDFAST_INVALID_ARGUMENT, t.name, " has stride ", t.stride[axis], " on axis ", axis,
                 ", so that its elements share memory", "; expected an output with its own memory for each element");
        covered += (t.shape[axis] - 1) * step;
    }
}

void check_no_overlap(const Tensor &output, const Tensor &other) {
    if (output.empty() || other.empty() || !overlaps_range(output, other)) return;
    // All rows start at a multiple of `period` bytes from the first of their tensor. Two tensors whose rows cover different
    // residues of it never meet.
    int64_t period = 0, widths[2];
    int n = 0;
    for (const Tensor *t : {&output, &other}) {
        const int last = t->rank - 1;
        const bool rows = t->stride[last] == 1;
        const int64_t element = t->dtype.bytes();
        widths[n++] = (rows ? t->shape[last] : 1) * element;
        for (int axis = 0; axis < (rows ? last : t->rank); axis++)
            if (t->shape[axis] > 1) period = std::gcd(period, t->stride[axis] * element);
    }
    if (period > 0) {
        const int64_t apart = (int64_t)(other.data - output.data) % period;
        const int64_t gap = apart < 0 ? apart + period : apart;
        if (gap >= widths[0] && gap + widths[1] <= period) return;
    }
    fail(HOLDFAST_INVALID_ARGUMENT, output.name, " overlaps ", other.name, " in memory; expected separate memory");
}

bool same_elements(const Tensor &a, const Tensor &b) {
    if (a.data != b.data || a.handle != b.handle || a.rank != b.rank) return false;
    for (int axis = 0; axis < a.rank; axis++)
        if (a.shape[axis] != b.shape[axis] || (a.shape[axis] > 1 && a.stride[axis] != b.stride[axis])) return false;
    return true;
}

}  // namespace holdfast
