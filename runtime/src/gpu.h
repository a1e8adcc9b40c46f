// Calls of kernels on a GPU, of every kind: what all public functions have in common. Tensors on the device are used where they
// lie; those on the CPU are copied there and back.
#pragma once
#include "buffers.h"
#include "context.h"
#include "device.h"
#include "expansion.h"
#include "problem.h"

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

namespace holdfast {

/// A call, while it is made: what Halide's runtime finds through user_context.
struct Run {
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
    const Variant &variant;
    std::vector<const Tensor *> tensors;     // all; those that are not given have rank 0. All are where the first one is
    std::function<void(const Run &)> issue;  // launch everything

    // CUDA: memory that the caller lends (null: none), and what says how large that has to be.
    const DLTensor *lent = nullptr;
    const char *size_function = "";

    /// Make the call, on what the context and the tensors say.
    void run(holdfast_context &context) const;

    /// CUDA: bytes of device memory that it needs beside its tensors.
    size_t workspace(holdfast_context &context) const;

private:
    size_t rehearse(Workspace &workspace) const;
};

/// The public function that says how large the workspace of `call`, "forward" or "step", has to be.
const char *size_function_of(const char *call);

/// The same problem with the tensors of a device as near to one another as can be: the nearer, the more heads are in one call
/// of a kernel, and the more memory that needs. Rows that all lie in one place start where any variant wants them.
Problem nearest(Problem p);
BackwardProblem nearest(const BackwardProblem &p);

/// Of no queries keys take the place, and what comes out is not wanted: a token's kernel looks at a query with each state.
Problem with_queries(Problem p);

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

/// What kernels get: a part of a Memory, from `offset` bytes on, which are a multiple of the element's.
class View : public Buffer {
public:
    View(const Memory &memory, int64_t offset, halide_type_t element, std::initializer_list<halide_dimension_t> list);
    ~View();

private:
    const Memory &memory;
    bool cropped = false;

    void begin_at(int64_t offset);
};

/// Zeros, from `offset` bytes of a Memory on.
struct Zeros {
    const Memory &memory;
    int64_t offset = 0;
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

/// What OnDevice makes compact memory of the call's own for: floats of that shape.
Tensor floats_of(const char *name, std::initializer_list<int64_t> shape);

/// The tensors of a problem. Where the final state is the initial one, in place, they are one; so are sums of keys.
class Operands {
    const Run &run;
    const Problem &p;
    std::optional<OnDevice> final_of_its_own, final_sum_of_its_own;

public:
    OnDevice q, k, v, log_decay, initial, initial_sum, out, weights;
    OnDevice &final, &final_sum;

    Operands(const Run &run, const Problem &p);
    void fetch();

    /// Of no tokens: the final states, and sums of keys, become the initial ones; those of some heads of sequences s .. alone.
    void pass_state(int64_t s, int64_t h, int64_t sequences, int64_t heads) const;
    void pass_states();
};

/// The tensors of a gradient; of log decays that are one per head DecaysPerHead has it.
struct BackwardOperands {
    OnDevice q, k, v, log_decay, initial, initial_sum, out, dout, dfinal, dfinal_sum;
    OnDevice dq, dk, dv, dlog_decay, dinitial, dinitial_sum;

    BackwardOperands(const Run &run, const BackwardProblem &p);
    void fetch(const Run &run, const BackwardProblem &p);
};

/// Gradients of log decays that are one per head, where they are wanted: kernels leave those of every token, [B, T, Hk].
struct DecaysPerHead {
    std::optional<OnDevice> of_tokens;

    DecaysPerHead(const Run &run, const BackwardProblem &p);
    /// Where a kernel leaves those of a part of the call: of a sequence that begins at token `start`, from its token t on, whose own
    /// tensor is `dlog_decay`. Where none are wanted, `unwanted_row`.
    View part(const OnDevice &dlog_decay, const Memory &unwanted_row, int64_t b, int64_t start, int64_t t, int64_t h,
              int32_t tokens, int32_t heads, int32_t entries) const;
    /// Add them up.
    void finish();

private:
    const Run &run;
    const BackwardProblem &p;
};

/// Whether a gradient's call has nothing to write.
bool writes_nothing(const BackwardProblem &p);

/// A gradient's call: `issue` launches all but what clears its zeros.
GpuCall gradient_call(const Variant &variant, const BackwardProblem &p, std::function<void(const Run &)> issue);

/// That of zeros alone; nothing where there are none.
void clear_on_gpu(holdfast_context &context, const BackwardProblem &p, const Choice &choice);
size_t clear_workspace_on_gpu(holdfast_context &context, const BackwardProblem &p, const Choice &choice);

/// All packed sequences, none for others, the longest first: what is too large is known before anything is written.
std::vector<int64_t> longest_first(const BackwardProblem &p);

/// Sequence s of packed ones, as a problem of its own. Rows of its weights still have the columns of all.
Problem sequence_of(Problem p, int64_t s);
BackwardProblem sequence_of(const BackwardProblem &p, int64_t s);

/// How many batch entries, and heads of keys or tokens of each, a call of the kernel has.
struct Part {
    int64_t batch, of_each;
};

constexpr int64_t most_bytes = std::numeric_limits<int32_t>::max();  // of a buffer of one call, for Halide
constexpr int64_t most_blocks = 1 << 15;  // of threads along the second and third axis of a grid: CUDA and Vulkan take 2^16 - 1

/// Bytes from the first to the last element of a part of a tensor with at most these extents, on the first axes.
int64_t span(const Tensor &t, std::initializer_list<int64_t> most);

/// The most that fits, all of it or halves of halves; {0, 0} if one of one does not.
Part largest_part(Part all, const std::function<bool(int64_t batch, int64_t of_each)> &fits);

/// The most batch entries, else heads of one, of which one call can address the buffers of so many tokens and sequences of each
/// entry; beside the tensors those of `bytes_of_a_head`. {0, 0} if one head is too large.
Part largest_part(const Problem &p, const Operands &operands, int64_t tokens, int64_t bytes_of_a_head, int64_t sequences = 1);

/// The same of a gradient.
Part largest_part(const BackwardProblem &p, const BackwardOperands &operands, int64_t tokens, int64_t bytes_of_a_head,
                  int64_t sequences = 1);

/// Call run(b, t, entries, tokens) for tensors [B, T, ...], of which the first has these extents, as many at a time as one call of a
/// kernel can address.
void each_part(const std::vector<const OnDevice *> &tensors,
               const std::function<void(int64_t b, int64_t t, int64_t entries, int64_t tokens)> &run);

/// The stride of an axis along which a call of the kernel takes `extent`. That of a single one may be anything.
int32_t narrow(const Tensor &t, int axis, int64_t extent);

/// The table of `count` chunks of so many tokens, made on the device by the kernel `chunk_table`, and zeros after it, for what
/// the caller leaves out.
void fill_chunk_table(const Run &run, const Memory &memory, int64_t bytes, int64_t tokens, int64_t chunk, int64_t count);
/// The same of packed sequences, which begin at `starts`, by `packed_chunk_table`.
void fill_chunk_table(const Run &run, const Memory &memory, int64_t bytes, const std::vector<int64_t> &starts, int64_t chunk);

/// Rows of keys or values (d, t, h, b) from token t of head h of batch entry b on; and of queries or outputs (d, t, g, h, b), `group`
/// heads for each of keys.
View rows_of(const OnDevice &rows, int64_t b, int64_t t, int64_t h, int32_t tokens, int32_t heads, int32_t entries);
View groups_of(const OnDevice &rows, int64_t group, int64_t b, int64_t t, int64_t h, int32_t tokens, int32_t heads,
               int32_t entries);

/// Rows of queries or outputs of `p`, so many along each of the axes that follow, all of them one of `size` elements: of outputs that
/// are not wanted, and where there are no heads.
template<class... Extents>
View row_for_all(const Memory &row, const Problem &p, int64_t size, Extents... along) {
    return View(row, 0, halide_type(p.q.dtype), {{0, (int32_t)size, 1}, {0, (int32_t)along, 0}...});
}

/// Log decays (t, h, b) from token t of head h of batch entry b on, or `none`.
View decays_of(const OnDevice &log_decay, const Zeros *none, int64_t b, int64_t t, int64_t h, int32_t tokens, int32_t heads,
               int32_t entries);

/// States (e, f, h, b), or sums of keys with one e, from head h of batch entry b on; and sums of keys (f, h, b).
View features_of(const OnDevice &states, int64_t b, int64_t h, int32_t heads, int32_t entries);
View sums_of(const OnDevice &sums, int64_t b, int64_t h, int32_t heads, int32_t entries);

/// Copy all elements of `to`, by the kernel `convert_state`, from one order of features to another.
void convert(const Run &run, View &&from, holdfast_expansion order, View &&to, holdfast_expansion wanted, Of of = Of::states);
/// Make all elements of `to` zero, which are of fp32, or integers for any type of 16 bits.
void clear(const Run &run, View &&to);

}  // namespace holdfast
