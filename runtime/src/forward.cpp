// holdfast_forward: checks the arguments, picks the variant, and runs it on every batch entry and head. The state is carried
// over calls for a few chunks at a time, so that workspace does not grow with T and the states of a call stay in cache.
#include "chunk_table.h"
#include "context.h"
#include "failure.h"
#include "tensor.h"

#include <HalideRuntime.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <limits>
#include <sstream>

namespace holdfast {
namespace {

// The states of one call of a kernel, K V floats a chunk, should stay in L2 (1 to 2 MB in today's x86) with the rows of its
// chunks. Past 16 chunks nothing more is gained: bench/retention_bench.cpp.
constexpr int64_t states_in_cache = 512 * 1024, most_chunks_per_call = 8;

// The states of heads that a thread works on in turn, likewise.
constexpr int64_t heads_in_cache = 256 * 1024;

constexpr int64_t max_state = 1 << 25;  // K V: the kernel's own buffer of a few states is addressed by 32 bits, in bytes

struct Problem {
    int64_t B, T, H, K, V;
    int64_t state_bytes() const { return K * V * (int64_t)sizeof(float); }

    Tensor q, k, v, out;
    Tensor log_decay, initial_state, final_state;  // rank 0: not given
    float scale;
    int64_t chunk_size;
};

/// The caller's struct in this version's layout, whatever version it was compiled against.
holdfast_forward_args checked_args(const holdfast_forward_args *args) {
    if (!args) fail(HOLDFAST_INVALID_ARGUMENT, "args is NULL; expected a holdfast_forward_args");
    constexpr size_t first_version = offsetof(holdfast_forward_args, chunk_size) + sizeof(int64_t);
    const size_t size = args->struct_size;
    if (size < first_version)
        fail(HOLDFAST_INVALID_ARGUMENT, "args.struct_size is ", size, "; expected sizeof(holdfast_forward_args), at least ",
             first_version);
    for (size_t n = sizeof *args; n < size; n++)
        if (((const unsigned char *)args)[n])
            fail(HOLDFAST_UNSUPPORTED, "args.struct_size is ", size, " and byte ", n, " is not zero; expected zeros past byte ",
                 sizeof *args, ": this version does not know that option");
    holdfast_forward_args copy{};
    std::memcpy(&copy, args, std::min(size, sizeof copy));
    return copy;
}

/// Refuses positive and NaN decays, by name.
void check_log_decay(const Tensor &g) {
    if (g.empty()) return;
    const bool per_token = g.rank == 3;
    const int64_t T = per_token ? g.shape[1] : 1, H = g.shape[g.rank - 1], B = per_token ? g.shape[0] : 1;
    for (int64_t b = 0; b < B; b++)
        for (int64_t t = 0; t < T; t++) {
            const float *row = (const float *)g.data + (per_token ? b * g.stride[0] + t * g.stride[1] : 0);
            const int64_t stride = g.stride[g.rank - 1];
            bool good = true;
            for (int64_t h = 0; h < H; h++) good &= row[h * stride] <= 0;
            for (int64_t h = 0; !good && h < H; h++) {
                const float value = row[h * stride];
                if (value <= 0) continue;
                std::ostringstream where;
                if (per_token) where << b << ", " << t << ", ";
                where << h;
                fail(HOLDFAST_INVALID_ARGUMENT, "log_decay[", where.str(), "] is ", value, "; expected a number <= 0");
            }
        }
}

Problem checked_problem(const holdfast_forward_args &args) {
    constexpr TensorSpec q{"q", "BTHK", true}, k{"k", "BTHK", true}, v{"v", "BTHV", true}, out{"out", "BTHV", true};
    constexpr TensorSpec initial{"initial_state", "BHKV"}, final{"final_state", "BHKV"};
    Problem p{};
    p.q = check_tensor(q, args.q);
    p.k = check_tensor(k, args.k);
    p.v = check_tensor(v, args.v);
    p.out = check_tensor(out, args.out);
    p.B = p.q.shape[0], p.T = p.q.shape[1], p.H = p.q.shape[2], p.K = p.q.shape[3], p.V = p.v.shape[3];
    if (p.K < 1) fail(HOLDFAST_INVALID_ARGUMENT, "q [B, T, H, K] has K = 0; expected at least 1");
    if (p.V < 1) fail(HOLDFAST_INVALID_ARGUMENT, "v [B, T, H, V] has V = 0; expected at least 1");
    if (p.K * p.V > max_state)
        fail(HOLDFAST_UNSUPPORTED, "q has K = ", p.K, " and v has V = ", p.V, "; expected K V of at most ", max_state);
    for (int axis = 0; axis < 4; axis++) check_extent(k, p.k, axis, p.q.shape[axis], "of q");
    for (int axis = 0; axis < 3; axis++) check_extent(v, p.v, axis, p.q.shape[axis], "of q");
    for (int axis = 0; axis < 3; axis++) check_extent(out, p.out, axis, p.q.shape[axis], "of q");
    check_extent(out, p.out, 3, p.V, "of v");
    for (const Tensor *t : {&p.k, &p.v, &p.out}) check_same_dtype(*t, p.q);
    for (const Tensor *t : {&p.q, &p.k, &p.v, &p.out}) check_rows(*t);

    if (args.log_decay) {
        const bool per_head = args.log_decay->ndim == 1;
        if (!per_head && args.log_decay->ndim != 3)
            fail(HOLDFAST_INVALID_ARGUMENT, "log_decay has ", args.log_decay->ndim,
                 " dimensions; expected 1, [H], or 3, [B, T, H]");
        const TensorSpec spec{"log_decay", per_head ? "H" : "BTH"};
        p.log_decay = check_tensor(spec, args.log_decay);
        for (int axis = 0; axis < p.log_decay.rank; axis++)
            check_extent(spec, p.log_decay, axis, per_head ? p.H : p.q.shape[axis], "of q");
    }
    auto check_state = [&](const TensorSpec &spec, const DLTensor *tensor) {
        Tensor state = check_tensor(spec, tensor);
        check_extent(spec, state, 0, p.B, "of q"), check_extent(spec, state, 1, p.H, "of q");
        check_extent(spec, state, 2, p.K, "of q"), check_extent(spec, state, 3, p.V, "of v");
        check_rows(state);
        return state;
    };
    if (args.initial_state) p.initial_state = check_state(initial, args.initial_state);
    if (args.final_state) p.final_state = check_state(final, args.final_state);

    for (const Tensor *output : {&p.out, &p.final_state}) {
        if (!output->rank) continue;
        check_distinct_elements(*output);
        for (const Tensor *other : {&p.q, &p.k, &p.v, &p.log_decay, &p.initial_state, &p.final_state}) {
            const bool in_place = output == &p.final_state && other == &p.initial_state && same_elements(*output, *other);
            if (other->rank && other != output && !in_place) check_no_overlap(*output, *other);
        }
    }

    if (!std::isfinite(args.scale)) fail(HOLDFAST_INVALID_ARGUMENT, "scale is ", args.scale, "; expected a finite number");
    p.scale = args.scale != 0 ? args.scale : 1 / std::sqrt((float)p.K);
    if (args.chunk_size < 0) fail(HOLDFAST_INVALID_ARGUMENT, "chunk_size is ", args.chunk_size, "; expected at least 0");
    p.chunk_size = args.chunk_size;
    check_log_decay(p.log_decay);
    return p;
}

constexpr halide_type_t float32(halide_type_float, 32), int32(halide_type_int, 32);

/// Of a kernel's buffers: bf16 goes by uint16 (generators/dtypes.h).
halide_type_t halide_type(const Dtype &dtype) {
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

/// Rows of one batch entry and head, (d, t, 1, 1), of which a segment at a time is looked at.
struct Rows : Buffer {
    Rows(const Tensor &x, int64_t b, int64_t h)
        : Buffer(nullptr, halide_type(x.dtype),
                 {{0, (int32_t)x.shape[3], 1}, {0, 0, (int32_t)x.stride[1]}, {0, 1, 0}, {0, 1, 0}}),
          first(x.at<uint8_t>(b, 0, h)), stride(x.stride[1]) {}
    void look_at(int64_t t, int64_t tokens) {
        host = first + t * stride * type.bytes();
        axes[1].extent = (int32_t)tokens;
    }

private:
    uint8_t *first;
    int64_t stride;
};

/// One state: (e, d, 1, 1, 1).
struct State : Buffer {
    State(const float *data, int64_t K, int64_t V, int64_t stride)
        : Buffer(data, float32, {{0, (int32_t)V, 1}, {0, (int32_t)K, (int32_t)stride}, {0, 1, 0}, {0, 1, 0}, {0, 1, 0}}) {}
};

void copy_state(const State &from, const State &to) {
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

/// Strides inside one call of a kernel are 32 bits wide: along time for up to `tokens`, and along K of a state.
void check_kernel_strides(const Problem &p, int64_t tokens) {
    auto check = [](const Tensor &t, int axis, int64_t extent) {
        const int64_t most = std::numeric_limits<int32_t>::max() / std::max<int64_t>(extent, 1);
        if (t.rank && !t.empty() && extent > 1 && (t.stride[axis] > most || t.stride[axis] < -most))
            fail(HOLDFAST_UNSUPPORTED, t.name, " has stride ", t.stride[axis], " on axis ", axis, "; expected at most ", most,
                 " either way");
    };
    for (const Tensor *t : {&p.q, &p.k, &p.v, &p.out}) check(*t, 1, std::min(tokens, p.T));
    if (p.log_decay.rank == 3) check(p.log_decay, 1, std::min(tokens, p.T));
    for (const Tensor *t : {&p.initial_state, &p.final_state}) check(*t, 2, p.K);
}

/// How the work is cut up.
struct Plan {
    const Variant &variant;
    int64_t chunk;    // tokens in a chunk
    int64_t segment;  // tokens in a call of the kernel
    int64_t groups;   // of neighbouring heads, in each batch entry: the pieces that threads take

    Plan(const Problem &p, const Variant &variant, const holdfast_context &context) : variant(variant) {
        chunk = p.chunk_size ? std::min<int64_t>(p.chunk_size, variant.chunk) : variant.chunk;
        segment = chunk * std::clamp<int64_t>(states_in_cache / p.state_bytes() - 1, 1, most_chunks_per_call);
        // As few groups as give all threads the same number of pieces, or several each; enough for the cache.
        const int64_t threads = context.threads_for(p.B * p.H), most = std::max<int64_t>(p.H, 1);
        groups = std::min(most, p.H * p.state_bytes() / heads_in_cache + 1);
        while (groups < most && p.B * groups % threads != 0 && p.B * groups < 4 * threads) groups++;
    }
    int64_t first_head(const Problem &p, int64_t group) const { return group * p.H / groups; }
};

/// One batch entry and head: where its rows and its state are.
class Head {
public:
    Head(const Problem &p, Workspace &workspace, int64_t b, int64_t h)
        : p(p), b(b), h(h), q(p.q, b, h), k(p.k, b, h), v(p.v, b, h), out(p.out, b, h),
          log_decay(nullptr, float32, {{0, 0, (int32_t)decay_stride()}, {0, 1, 0}, {0, 1, 0}}), scratch(workspace, p.K * p.V),
          state(scratch.floats(), p.K, p.V, p.V) {
        if (p.initial_state.rank)
            copy_state(State(p.initial_state.at(b, h), p.K, p.V, p.initial_state.stride[2]), state);
        else
            std::fill_n(scratch.floats(), p.K * p.V, 0.0f);
    }

    /// Tokens t .. t + tokens - 1: writes their rows of out, and the state after them to `next`, which becomes the state.
    void advance(const Plan &plan, Workspace &workspace, int64_t t, int64_t tokens, State &next) {
        static const float no_decay = 0;
        const Tensor &g = p.log_decay;
        const float *decay = g.rank == 3 ? g.at(b, t, h) : g.rank == 1 ? g.at(h) : &no_decay;
        const ChunkTable table({0, tokens}, plan.chunk);
        Buffer chunks(table.columns.data(), int32, {{0, ChunkTable::fields, 1}, {0, table.slots, ChunkTable::fields}});
        for (Rows *rows : {&q, &k, &v, &out}) rows->look_at(t, tokens);
        log_decay.host = (uint8_t *)decay, log_decay.axes[0].extent = (int32_t)tokens;
        const Variant &variant = plan.variant;
        const int rc = variant.run(&workspace, &q, &k, &v, &log_decay, &state, &chunks, table.count, p.scale, &out, &next);
        if (rc == halide_error_code_out_of_memory) fail(HOLDFAST_OUT_OF_MEMORY, "workspace: out of memory in ", variant.name);
        if (rc) fail(HOLDFAST_INTERNAL_ERROR, variant.name, " returned ", rc, ": ", workspace.error);
        std::swap(state.host, next.host);
    }

    void finish() const {
        if (p.final_state.rank) copy_state(state, State(p.final_state.at(b, h), p.K, p.V, p.final_state.stride[2]));
    }

private:
    const Problem &p;
    const int64_t b, h;
    Rows q, k, v, out;
    Buffer log_decay;
    Scratch scratch;
    State state;

    int64_t decay_stride() const { return p.log_decay.rank == 3 ? p.log_decay.stride[1] : 0; }
};

/// A group of heads of one batch entry, all of them a segment at a time: rows of neighbouring heads lie side by side in
/// memory, and are read while their pages and prefetched lines are at hand.
void run_group(const Problem &p, const Plan &plan, Workspace &workspace, int64_t b, int64_t group) {
    Scratch scratch(workspace, p.K * p.V);
    State next(scratch.floats(), p.K, p.V, p.V);
    std::deque<Head> heads;
    for (int64_t h = plan.first_head(p, group); h < plan.first_head(p, group + 1); h++) heads.emplace_back(p, workspace, b, h);
    for (int64_t t = 0; t < p.T; t += plan.segment)
        for (Head &head : heads) head.advance(plan, workspace, t, std::min(plan.segment, p.T - t), next);
    for (const Head &head : heads) head.finish();
}

}  // namespace
}  // namespace holdfast

using namespace holdfast;

extern "C" holdfast_status holdfast_forward(holdfast_context *context, const holdfast_forward_args *args) {
    return guarded(context, [&](holdfast_context &c) {
        const Problem p = checked_problem(checked_args(args));
        const Target *forced = c.target ? c.target : environment_target();
        const Variant &variant = select_variant("chunkwise", p.q.dtype.name, p.K, p.V, p.chunk_size, forced);
        const Plan plan(p, variant, c);
        check_kernel_strides(p, plan.segment);
        const int64_t pieces = p.B * p.H == 0 ? 0 : p.B * plan.groups;
        if (c.verbose) {
            std::ostringstream line;
            line << "forward: " << variant.name << " ("
                 << (c.target ? "target forced by the context"
                     : forced ? "target forced by HOLDFAST_TARGET"
                              : "best target that this CPU runs")
                 << "), B " << p.B << ", T " << p.T << ", H " << p.H << ", K " << p.K << ", V " << p.V << ", chunks of "
                 << plan.chunk << ", " << c.threads_for(pieces) << " threads";
            c.verbose(c.verbose_user, line.str().c_str());
        }
        if (pieces == 0) return;
        c.for_each(pieces,
                   [&](Workspace &workspace, int64_t n) { run_group(p, plan, workspace, n / plan.groups, n % plan.groups); });
    });
}
