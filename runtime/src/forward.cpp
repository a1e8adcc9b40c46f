// The chunkwise kernel on the CPU, on every batch entry and head. The state is carried over calls for a few chunks at a time,
// so that workspace does not grow with T and the states of a call stay in cache.
#include "forward.h"

#include "buffers.h"
#include "chunk_table.h"
#include "context.h"
#include "failure.h"
#include "problem.h"

#include <HalideRuntime.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <string>

namespace holdfast {
namespace {

// The states of one call of a kernel, K V floats a chunk, should stay in L2 (1 to 2 MB in today's x86) with the rows of its
// chunks. Past 16 chunks nothing more is gained: bench/retention_bench.cpp.
constexpr int64_t states_in_cache = 512 * 1024, most_chunks_per_call = 8;

// The states of heads that a thread works on in turn, likewise.
constexpr int64_t heads_in_cache = 256 * 1024;

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
        const int rc = std::get<ChunkwiseKernel *>(variant.run)(&workspace, &q, &k, &v, &log_decay, &state, &chunks,
                                                                table.count, p.scale, &out, &next);
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

void run_chunkwise(holdfast_context &c, const Problem &p, const Variant &variant, const char *why) {
    const Plan plan(p, variant, c);
    check_kernel_strides(p, plan.segment);
    const int64_t pieces = p.B * p.H == 0 ? 0 : p.B * plan.groups;
    announce(c, "forward", variant, why, p, "chunks of " + std::to_string(plan.chunk), pieces);
    if (pieces == 0) return;
    c.for_each(pieces,
               [&](Workspace &workspace, int64_t n) { run_group(p, plan, workspace, n / plan.groups, n % plan.groups); });
}

}  // namespace holdfast
