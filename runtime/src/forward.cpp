// The chunkwise kernel on the CPU, on every sequence and head. The state is carried over calls for a few chunks at a time,
// so that workspace does not grow with T and the states of a call stay in cache.
#include "forward.h"

#include "buffers.h"
#include "chunk_table.h"
#include "context.h"
#include "failure.h"
#include "head_groups.h"
#include "problem.h"
#include "spans.h"
#include "strips.h"

#include <HalideRuntime.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

namespace holdfast {
namespace {

// The states of one call of a kernel, K V floats a chunk, should stay in L2 (1 to 2 MB in today's x86) with the rows of its
// chunks, which far apart have but a part of its sets. Past 8 chunks little is gained, past 12 where rows
// have half the bytes (3%, on two threads 7%, at K = V = 64 on Zen 4): bench/retention_bench.cpp.
constexpr int64_t states_in_cache = 320 * 1024, least_chunks_per_call = 2, most_chunks_per_call = 8;

// Columns of values that a thread takes at least: as wide as tiles of the widest vectors. Each piece computes the scores anew, an
// eighth of the work at K = V = 64.
constexpr int64_t least_columns = 32;

/// How the work is cut up.
struct Plan {
    const Variant &variant;
    int64_t chunk;      // tokens in a chunk
    int64_t segment;    // tokens in a call of the kernel, at most
    bool in_place;      // states between calls are those of Problem::states: all calls end where one of them is
    HeadGroups groups;  // with spans of their tokens the pieces that threads take
    Spans spans;

    Plan(const Problem &p, const Variant &variant, const holdfast_context &context, int64_t threads_of_head)
        : variant(variant), chunk(p.chunk_size ? std::min<int64_t>(p.chunk_size, variant.chunk) : variant.chunk),
          groups(p, context), spans(p, chunk, threads_of_head) {
        auto longer = [&](int64_t size) { return p.q.dtype.bytes() == 2 ? size * 3 / 2 : size; };
        segment = chunk * std::clamp<int64_t>(longer(states_in_cache) / p.state_bytes() - 1, least_chunks_per_call,
                                              longer(most_chunks_per_call));
        const Tensor &states = p.states;
        in_place = states.rank && states.stride[3] == 1 && p.state_interval <= segment;
    }
    /// Where the call ends that begins at token t of a sequence and does not go beyond `last`.
    int64_t end_of(const Problem &p, int64_t t, int64_t last) const {
        const int64_t end = std::min(t + segment, last);
        return p.states.rank ? std::min(end, (t / p.state_interval + 1) * p.state_interval) : end;
    }
};

/// One sequence and head of keys: where its rows and its state are.
class Head {
public:
    Head(const Problem &p, Workspace &workspace, int64_t s, int64_t h)
        : p(p), s(s), h(h), first_state(p.states.rank ? p.first_state(s) : 0), q(p.q, p.entry(s), p.start(s), h, p.group()),
          k(p.k, p.entry(s), p.start(s), h), v(p.v, p.entry(s), p.start(s), h),
          out(p.out, p.entry(s), p.start(s), h, p.group()), log_decay(nullptr, float32, {{0, 0, 0}, {0, 1, 0}, {0, 1, 0}}),
          scratch(workspace, p.D * p.V), state(scratch.floats(), p.D, p.V, p.V) {
        if (p.initial_state.rank)
            copy_state(State(p.initial_state, s, h), state);
        else
            std::fill_n(scratch.floats(), p.D * p.V, 0.0f);
        if (p.states.rank) copy_state(state, after(0));
    }

    /// Tokens t .. end - 1 of the sequence: writes their rows of out, if wanted, and the state after them to `next`, which becomes the
    /// state, or to `states`.
    void advance(const Plan &plan, Workspace &workspace, int64_t t, int64_t end, bool outputs, State &next) {
        const int64_t tokens = end - t;
        static const float no_decay = 0;
        const Tensor &g = p.log_decay;
        const float *decay = g.rank == 3 ? g.at(p.entry(s), p.start(s) + t, h) : g.rank == 1 ? g.at(h) : &no_decay;
        const ChunkTable table({0, tokens}, plan.chunk);
        Buffer chunks(table.columns.data(), int32, {{0, ChunkTable::fields, 1}, {0, table.slots, ChunkTable::fields}});
        for (HeadRows *rows : {&q, &k, &v, &out}) rows->look_at(t, tokens);
        for (HeadRows *rows : {&q, &out}) rows->axes[2].extent = outputs ? (int32_t)p.group() : 0;
        log_decay.host = (uint8_t *)decay, log_decay.axes[0] = axis(tokens, g.rank == 3 ? g.stride[1] : 0);
        const Variant &variant = plan.variant;
        auto run = [&](State &before, State &after) {
            const auto kernel = std::get<ChunkwiseKernel *>(variant.run);
            check_returned(kernel(&workspace, &q, &k, &v, &log_decay, &before, &chunks, table.count, p.scale, &out, &after),
                           variant, workspace);
        };
        if (plan.in_place) {
            State before = after(t), behind = after(end);
            return run(before, behind);
        }
        run(state, next);
        std::swap(state.host, next.host);
        if (p.states.rank && (end % p.state_interval == 0 || end == p.length(s))) copy_state(state, after(end));
    }

    void finish() const {
        if (!p.final_state.rank) return;
        const State final_state(p.final_state, s, h);
        p.states.rank ? copy_state(after(p.length(s)), final_state) : copy_state(state, final_state);
    }

private:
    const Problem &p;
    const int64_t s, h, first_state;
    HeadRows q, k, v, out;
    Buffer log_decay;
    Scratch scratch;
    State state;

    /// That of `states` after t tokens, or the next one.
    State after(int64_t t) const { return State(p.states, first_state + p.intervals(t), h); }
};

/// Span n of some heads of one sequence, all of them a segment at a time: rows of neighbouring heads lie side by side in memory, and
/// are read while their pages and prefetched lines are at hand.
void run_heads(const Problem &p, const Plan &plan, Workspace &workspace, int64_t s, int64_t group, int64_t n) {
    const int64_t T = p.length(s), from = plan.spans.begin(T, n), to = plan.spans.begin(T, n + 1);
    if (!plan.spans.has_work(T, n)) return;
    Scratch scratch(workspace, p.D * p.V);
    State next(scratch.floats(), p.D, p.V, p.V);
    std::deque<Head> heads;
    for (int64_t h = plan.groups.begin(group); h < plan.groups.begin(group + 1); h++) heads.emplace_back(p, workspace, s, h);
    for (int64_t t = 0, end; t < to; t = end) {
        end = plan.end_of(p, t, t < from ? from : to);
        for (Head &head : heads) head.advance(plan, workspace, t, end, t >= from, next);
    }
    if (to < T) return;
    for (const Head &head : heads) head.finish();
}

}  // namespace

void run_chunkwise(holdfast_context &c, const Problem &whole, const Variant &variant, const char *why) {
    // Threads that have no head of their own share one's columns of values, and its tokens.
    const int64_t heads = whole.N * whole.Hk, threads = threads_of_head(whole, c);
    const Variant *run = &variant;
    int64_t strips = 1;
    for (int64_t n = worth_sharing(whole) ? threads : 0; n > 1 && strips == 1; n--)
        if (whole.V % (n * least_columns) == 0)
            if (const Variant *narrow = narrower(variant, whole.V / n)) strips = n, run = narrow;
    const int64_t columns = whole.V / strips;
    const Plan plan(columns_of(whole, 0, columns), *run, c, threads / strips);
    check_kernel_strides(whole, plan.segment);
    const int64_t spans = plan.spans.count, pieces = heads == 0 ? 0 : whole.N * plan.groups.count * strips * spans;
    std::string how = "chunks of " + std::to_string(plan.chunk);
    if (whole.states.rank) how += ", states every " + std::to_string(whole.state_interval) + " tokens";
    if (strips > 1) how += ", " + std::to_string(columns) + " columns of values at a time";
    if (spans > 1) how += ", tokens in " + std::to_string(spans) + " spans";
    announce(c, "forward", *run, why, whole, how, pieces);
    if (pieces == 0) return;
    with_initial_apart(c, whole, spans > 1, spans > 1, [&](const Problem &p) {
        std::vector<Problem> strip;
        for (int64_t n = 0; n < strips; n++) strip.push_back(columns_of(p, n * columns, columns));
        c.for_each(pieces, [&](Workspace &workspace, int64_t n) {
            const int64_t group = n / strips / spans, span = n / strips % spans;
            run_heads(strip[n % strips], plan, workspace, group / plan.groups.count, group % plan.groups.count, span);
        });
    });
}

}  // namespace holdfast
