// Calls of kernels on a GPU, of every kind: what holdfast_forward (forward_gpu.cpp) and holdfast_step (recurrent_gpu.cpp) have in
// common. Tensors on the device are used where they lie; those on the CPU are copied there and back.
#pragma once
#include "buffers.h"
#include "context.h"
#include "device.h"
#include "problem.h"

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>

namespace holdfast {

/// A call, while it is made: shapes, and what Halide's runtime finds through user_context.
struct Run {
    const Problem &p;
    const Variant &variant;
    Workspace &workspace;
    DeviceCall &call;

    const halide_device_interface_t *interface() const { return device_interface(call.place.backend); }
    bool cuda() const { return call.place.backend == Backend::cuda; }

    /// Turn what Halide returned into a Failure.
    void check(const char *what, int rc) const;
};

/// A call of a public function on a GPU.
struct GpuCall {
    const char *function;                    // "forward"
    std::string how;                         // "chunks of 32"
    const char *size_function;               // what says how large a workspace has to be
    std::function<void(const Run &)> issue;  // launch everything

    /// On what the context and the tensors say. `why` the variant was chosen is for the verbose line.
    void run(holdfast_context &context, const Problem &p, const Variant &variant, const char *why) const;

    /// CUDA: bytes of device memory that the call needs beside its tensors.
    size_t workspace(holdfast_context &context, const Problem &p, const Variant &variant) const;

private:
    size_t rehearse(Workspace &workspace, const Problem &p, const Variant &variant) const;
};

/// Device memory as Halide knows it: the call's own, or a caller's buffer.
class Memory {
public:
    Memory(const Run &run, int64_t bytes);
    Memory(const Run &run, void *native);
    Memory(const Memory &) = delete;
    ~Memory();
    void copy_in(const void *host, int64_t bytes);
    void copy_out(void *host, int64_t bytes);

    const Run &run;
    halide_buffer_t whole;

private:
    halide_dimension_t axis;
    const bool own;
};

/// What kernels get: a part of a Memory, from `offset` bytes on.
class View : public Buffer {
public:
    View(const Memory &memory, int64_t offset, halide_type_t element, std::initializer_list<halide_dimension_t> list);
    ~View();

private:
    const Memory &memory;
    bool cropped = false;
};

/// A tensor in device memory, with its strides there.
struct OnDevice {
    Tensor t;
    std::unique_ptr<Memory> memory;
    int64_t start = 0;  // bytes to element [0, 0, ...]

    OnDevice(const Run &run, const Tensor &tensor, bool read);

    /// Bring a result back to the host tensor that it is for.
    void fetch(const Run &run, const Tensor &host);

    /// Byte offset of an element.
    int64_t at(int64_t i0, int64_t i1 = 0, int64_t i2 = 0) const;
};

/// The tensors of a call. Where the final state is the initial one, in place, they are one.
class Operands {
    std::optional<OnDevice> final_of_its_own;

public:
    OnDevice q, k, v, log_decay, initial, out;
    OnDevice &final;

    explicit Operands(const Run &run);
    void fetch(const Run &run);
};

/// How many batch entries, and heads of each, a call of the kernel has.
struct Part {
    int64_t batch, heads;
};

/// The most batch entries, else heads of one, whose buffers stay within what one call can address; beside the tensors those of
/// `bytes_of_a_head`. {0, 0} if one head is too large.
Part largest_part(const Problem &p, const Operands &operands, int64_t bytes_of_a_head);

/// The stride of an axis along which a call of the kernel takes `extent`. That of a single one may be anything.
int32_t narrow(const Tensor &t, int axis, int64_t extent);

/// Zeros, for what the caller leaves out, from `offset` of a Memory on: made on the device by the kernel `chunk_table`, behind
/// the table of `count` chunks of so many tokens.
void fill_chunk_table(const Run &run, const Memory &memory, int64_t bytes, int64_t tokens, int64_t chunk, int64_t count);

}  // namespace holdfast
