// The gradient of degree 1 on the CPU, on every sequence and head: first the forward kernel for the states alone, of which one is
// kept for each segment of the sequence; then the kernel of the gradient on the segments, from the last to the first, with the
// gradient of the state going from one to the next. States that the caller kept are not computed.
#include "backward.h"

#include "backward_head.h"
#include "chunk_table.h"
#include "head_groups.h"

#include <algorithm>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>

namespace holdfast {
namespace {

// Chunks in a call of a kernel, of which it holds the states and their gradients: one core of an Intel Xeon takes 36.5, 35.4, 34.1, 34.9
// ms for 2, 4, 8, 16 of them at K = V = 64, and 99.8, 97.4, 97.1, 99.8 ms at K = V = 128 (4096 tokens of 8 heads). Fewer keep more
// states; of larger ones a few fill the caches.
constexpr int64_t states_in_cache = 640 * 1024, least_chunks_per_call = 2, most_chunks_per_call = 8;

/// How the work is cut up.
struct Plan {
    const Variant &variant, &forward;  // of the gradient, and of states
    int64_t chunk, forward_chunk;      // tokens in a chunk
    int64_t segment;                   // tokens in a call of a kernel
    HeadGroups groups;                 // the pieces that threads take
    bool states;                       // the gradients that are wanted need the states
    int64_t given = 0;                 // tokens from one of Problem::states to the next, a number of segments; 0: none

    Plan(const BackwardProblem &p, const Choice &choice, const holdfast_context &context)
        : variant(select_variant("chunkwise_backward", p.q.dtype.name, p.K, p.V, p.chunk_size, choice.backend, choice.forced)),
          forward(select_variant("chunkwise", p.q.dtype.name, p.K, p.V, p.chunk_size, choice.backend, variant.target)),
          groups(p, context) {
        auto chunk_of = [&](const Variant &v) { return p.chunk_size ? std::min<int64_t>(p.chunk_size, v.chunk) : v.chunk; };
        chunk = chunk_of(variant), forward_chunk = chunk_of(forward);
        segment =
            chunk * std::clamp<int64_t>(states_in_cache / p.state_bytes() - 1, least_chunks_per_call, most_chunks_per_call);
        states = p.dq.rank || p.dlog_decay.rank;
        if (!states || !p.states.rank || p.states.stride[3] != 1) return;
        if (p.state_interval <= segment) {
            segment = given = p.state_interval;
        } else if (p.state_interval % chunk == 0) {
            while (p.state_interval % segment) segment -= chunk;
            given = p.state_interval;
        }
    }
};

/// One sequence and head of keys.
class Head {
public:
    Head(const BackwardProblem &p, const Plan &plan, Workspace &workspace, int64_t s, int64_t h)
        : p(p), plan(plan), s(s), h(h), T(p.length(s)), segments((T + plan.segment - 1) / plan.segment), size(p.D * p.V),
          rows(p, workspace, s, h, plan.segment), first_state(plan.given ? p.first_state(s) : 0),
          states(workspace, size * (plan.states && plan.given != plan.segment ? std::max<int64_t>(segments, 1) : 1)),
          gradient_memory(workspace, size), gradient(gradient_memory.floats(), p.D, p.V, p.V) {
        if (plan.states && !plan.given && p.initial_state.rank)
            copy_state(State(p.initial_state, s, h), state(0));
        else
            std::fill_n(states.floats(), size, 0.0f);
        if (p.dfinal_state.rank)
            copy_state(State(p.dfinal_state, s, h), gradient);
        else
            std::fill_n(gradient_memory.floats(), size, 0.0f);
    }

    /// The state at the end of segment n, where that is not the last, and it is not given.
    void advance(Workspace &workspace, int64_t n) {
        if (!plan.states || n + 1 >= segments || is_given(n + 1)) return;
        look_at(n);
        rows.with_queries(false);
        const ChunkTable table({0, tokens(n)}, plan.forward_chunk);
        Buffer chunks(table.columns.data(), int32, {{0, ChunkTable::fields, 1}, {0, table.slots, ChunkTable::fields}});
        State from = state(n), to = state(n + 1);
        const auto run = std::get<ChunkwiseKernel *>(plan.forward.run);
        check_returned(
            run(&workspace, &rows.q, &rows.k, &rows.v, &rows.log_decay, &from, &chunks, table.count, p.scale, &rows.out, &to),
            plan.forward, workspace);
        rows.with_queries(true);
    }

    /// The gradients of the rows of segment n, and that of the state at its start, which takes the place of `next`. Then it is the turn
    /// of segment m of head `behind`.
    void retreat(Workspace &workspace, int64_t n, State &next, const Head &behind, int64_t m) {
        if (n >= segments) return;
        look_at(n);
        rows.followed_by(behind.rows, m * plan.segment);
        const ChunkTable table({0, tokens(n)}, plan.chunk);
        Buffer chunks(table.columns.data(), int32, {{0, ChunkTable::fields, 1}, {0, table.slots, ChunkTable::fields}});
        State from = state(plan.states ? n : 0);
        from.followed_by(behind.state(plan.states ? m : 0));
        const auto run = std::get<ChunkwiseBackwardKernel *>(plan.variant.run);
        check_returned(run(&workspace, &rows.q, &rows.k, &rows.v, &rows.log_decay, &from, &rows.dout, &gradient, &chunks,
                           table.count, p.scale, rows.want_dq, rows.want_dk, rows.want_dv, rows.want_dlog_decay,
                           p.needs_dstate(n), &rows.dq, &rows.dk, &rows.dv, &rows.dlog_decay, &next),
                       plan.variant, workspace);
        rows.done();
        std::swap(gradient.host, next.host);
    }

    void finish(DecaySums &sums) const {
        if (p.dinitial_state.rank) copy_state(gradient, State(p.dinitial_state, s, h));
        sums.put(s, h, rows.sum);
    }

private:
    const BackwardProblem &p;
    const Plan &plan;
    const int64_t s, h, T, segments, size;
    BackwardHead rows;
    const int64_t first_state;  // of those given
    const Scratch states;       // at the start of each segment, where not all are given
    const Scratch gradient_memory;
    State gradient;  // of the state at the end of the next segment

    bool is_given(int64_t n) const { return plan.given && n * plan.segment % plan.given == 0; }
    /// At the start of segment n.
    State state(int64_t n) const {
        return is_given(n) ? State(p.states, first_state + n * plan.segment / plan.given, h)
                           : State(states.floats() + n * size, p.D, p.V, p.V);
    }
    int64_t tokens(int64_t n) const { return std::min(plan.segment, T - n * plan.segment); }
    void look_at(int64_t n) { rows.look_at(n * plan.segment, tokens(n)); }
};

/// Some heads of one sequence, all of them a segment at a time, for the reason in forward.cpp.
void run_heads(const BackwardProblem &p, const Plan &plan, Workspace &workspace, int64_t s, int64_t group, DecaySums &sums) {
    const Scratch scratch(workspace, p.D * p.V);
    State next(scratch.floats(), p.D, p.V, p.V);
    std::deque<Head> heads;
    for (int64_t h = plan.groups.begin(group); h < plan.groups.begin(group + 1); h++)
        heads.emplace_back(p, plan, workspace, s, h);
    const int64_t segments = (p.length(s) + plan.segment - 1) / plan.segment;
    for (int64_t n = 0; n < segments; n++)
        for (Head &head : heads) head.advance(workspace, n);
    for (int64_t n = segments; n-- > 0;)
        for (size_t h = 0; h < heads.size(); h++) {
            const bool last = h + 1 == heads.size();
            heads[h].retreat(workspace, n, next, heads[last ? 0 : h + 1], last ? std::max<int64_t>(n - 1, 0) : n);
        }
    for (const Head &head : heads) head.finish(sums);
}

}  // namespace

void run_backward(holdfast_context &c, const BackwardProblem &p, const Choice &choice) {
    const Plan plan(p, choice, c);
    check_kernel_strides(p, plan.segment);
    const int64_t pieces = p.Hk == 0 ? 0 : p.N * plan.groups.count;
    announce(c, "backward", plan.variant, choice.why, p,
             "chunks of " + std::to_string(plan.chunk) + ", a state kept every " + std::to_string(plan.segment) + " tokens" +
                 (plan.given ? ", given every " + std::to_string(plan.given) : ""),
             pieces);
    DecaySums sums(p);
    if (pieces == 0) return sums.finish();
    c.for_each(pieces, [&](Workspace &workspace, int64_t n) {
        run_heads(p, plan, workspace, n / plan.groups.count, n % plan.groups.count, sums);
    });
    sums.finish();
}

}  // namespace holdfast
