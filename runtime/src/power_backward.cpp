// The kernel power_backward, of a chunk: a sequence is a chain of calls for each head, from the last chunk to the first, with the
// gradients of its state and sum of keys going from one call to the next. The states that the chunks begin with come from the forward
// kernel, power. Where all of them are too much memory, one is kept for each segment of some chunks, and those between are made again,
// segment by segment: with as many chunks in a segment as there are segments, a root of the memory for one more walk forward, of states
// alone.
#include "power_backward.h"

#include "backward_head.h"
#include "expansion.h"
#include "power.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

namespace holdfast {
namespace {

constexpr auto tight = HOLDFAST_EXPANSION_TIGHT;  // the kernels' order

/// How the work is cut up.
struct Plan {
    const Variant &variant, &forward;  // of the gradient, and of states
    int64_t chunk;                     // tokens in a chunk
    int64_t D;                         // features of the kernels' states
    int64_t slot;                      // floats of a state and its sum of keys
    bool states;                       // the gradients that are wanted need the states
    double most_states;                // that a thread may keep

    Plan(const BackwardProblem &p, const Choice &choice, const holdfast_context &context)
        : variant(power_variant("power_backward", p, choice, p.V)),
          forward(power_variant("power", p, {choice.backend, variant.target, choice.why}, p.V)) {
        chunk = std::min(variant.chunk, forward.chunk);
        if (p.chunk_size) chunk = std::min(chunk, p.chunk_size);
        D = expanded_size(p.K, p.degree, tight, std::numeric_limits<int32_t>::max());
        constexpr int64_t line = 16;  // floats
        slot = (D * (p.V + 1) + line - 1) / line * line;
        states = p.dq.rank || p.dlog_decay.rank || p.normalized;
        // All threads together a quarter of the tensors, at most.
        most_states = bytes_of_rows(p) / 4 / ((double)slot * sizeof(float) * context.threads_for(p.N * p.Hk));
    }
    int64_t chunks(int64_t T) const { return (T + chunk - 1) / chunk; }
    /// Chunks in a segment of T tokens.
    int64_t segment(int64_t T) const { return chunks_in_segment(chunks(T), most_states); }
};

/// One sequence and head of keys.
class Chain {
public:
    Chain(const BackwardProblem &p, const Plan &plan, Workspace &workspace, int64_t s, int64_t h)
        : p(p), plan(plan), workspace(workspace), s(s), h(h), T(p.length(s)), chunks(plan.chunks(T)),
          segment(plan.states ? plan.segment(T) : 1), segments(plan.states ? (chunks + segment - 1) / segment : 0),
          rows(p, workspace, s, h, plan.chunk), kept(workspace, plan.slot * std::max<int64_t>(segments, 1)),
          between(workspace, plan.slot * (segment - 1) + 1), gradient_memory(workspace, plan.slot * 2) {
        std::fill_n(kept.floats(), plan.slot, 0.0f);
        std::fill_n(gradient_memory.floats(), 2 * plan.slot, 0.0f);
        put(p.initial_state, p.initial_sum, kept.floats(), Of::states);
        put(p.dfinal_state, p.dfinal_sum, gradient_memory.floats(), Of::gradients);
    }

    void run() {
        // The states that segments begin with: the last segment's are made when it is walked back.
        for (int64_t n = 0; n + 1 < segments; n++) {
            float *from = first(n);
            for (int64_t i = 0; i < segment; i++) {
                float *to = i + 1 < segment ? inside(i % 2 + 1) : first(n + 1);
                advance(n * segment + i, from, to);
                from = to;
            }
        }
        float *gradient = gradient_memory.floats(), *next = gradient + plan.slot;
        auto retreat_from = [&](int64_t chunk, float *state) {
            retreat(chunk, state, gradient, next);
            std::swap(gradient, next);
        };
        if (!plan.states)
            for (int64_t i = chunks; i-- > 0;) retreat_from(i, kept.floats());
        for (int64_t n = segments; n-- > 0;) {
            const int64_t begin = n * segment, count = std::min(segment, chunks - begin);
            auto state = [&](int64_t i) { return i ? inside(i) : first(n); };
            for (int64_t i = 0; i + 1 < count; i++) advance(begin + i, state(i), state(i + 1));
            for (int64_t i = count; i-- > 0;) retreat_from(begin + i, state(i));
        }
        if (p.dinitial_state.rank)
            convert({gradient, p.V, 1}, tight, of_caller(p.dinitial_state), p.expansion, p.D, p.K, p.V, Of::gradients);
        if (p.dinitial_sum.rank)
            convert({gradient + plan.D * p.V, 1, 1}, tight, of_caller(p.dinitial_sum), p.expansion, p.D, p.K, 1, Of::gradients);
    }
    double decay_sum() const { return rows.sum; }

private:
    const BackwardProblem &p;
    const Plan &plan;
    Workspace &workspace;
    const int64_t s, h, T, chunks;
    const int64_t segment, segments;  // chunks in a segment, and of those
    BackwardHead rows;
    const Scratch kept, between, gradient_memory;

    float *first(int64_t segment) const { return kept.floats() + segment * plan.slot; }
    /// The state that chunk i of a segment begins with, i >= 1. Those of 1 and 2 serve for the way to the next segment too.
    float *inside(int64_t i) const { return between.floats() + (i - 1) * plan.slot; }

    Features of_caller(const Tensor &t) const { return {t.at(s, h), t.stride[2], t.rank == 4 ? t.stride[3] : 1}; }
    void put(const Tensor &state, const Tensor &sum, float *slot, Of of) const {
        if (state.rank) convert(of_caller(state), p.expansion, {slot, p.V, 1}, tight, p.D, p.K, p.V, of);
        if (sum.rank) convert(of_caller(sum), p.expansion, {slot + plan.D * p.V, 1, 1}, tight, p.D, p.K, 1, of);
    }

    Buffer state_of(float *slot) const {
        return {slot, float32, {{0, (int32_t)p.V, 1}, {0, (int32_t)plan.D, (int32_t)p.V}, {0, 1, 0}, {0, 1, 0}}};
    }
    Buffer sum_of(float *slot) const { return {slot + plan.D * p.V, float32, {{0, (int32_t)plan.D, 1}, {0, 1, 0}, {0, 1, 0}}}; }
    void look_at(int64_t chunk) {
        const int64_t t = chunk * plan.chunk;
        rows.look_at(t, std::min(plan.chunk, T - t));
    }

    /// The state at the end of a chunk, from that at its start.
    void advance(int64_t chunk, float *from, float *to) {
        look_at(chunk);
        rows.with_queries(false);
        Buffer state_in = state_of(from), sum_in = sum_of(from), state_out = state_of(to), sum_out = sum_of(to);
        const auto run = std::get<PowerKernel *>(plan.forward.run);
        check_returned(run(&workspace, &rows.q, &rows.k, &rows.v, &rows.log_decay, &state_in, &sum_in, p.degree, p.normalized,
                           p.scale, &rows.out, &state_out, &sum_out),
                       plan.forward, workspace);
        rows.with_queries(true);
    }

    /// The gradients of a chunk, from its state and the gradient of that at its end; and that of the state.
    void retreat(int64_t chunk, float *state, float *gradient, float *next) {
        look_at(chunk);
        Buffer state_in = state_of(state), sum_in = sum_of(state), dstate_out = state_of(gradient), dsum_out = sum_of(gradient);
        Buffer dstate_in = state_of(next), dsum_in = sum_of(next);
        const auto run = std::get<PowerBackwardKernel *>(plan.variant.run);
        check_returned(run(&workspace, &rows.q, &rows.k, &rows.v, &rows.log_decay, &state_in, &sum_in, &rows.out, &rows.dout,
                           &dstate_out, &dsum_out, p.degree, p.normalized, p.scale, rows.want_dq, rows.want_dk, rows.want_dv,
                           rows.want_dlog_decay, rows.want_dstate(chunk), &rows.dq, &rows.dk, &rows.dv, &rows.dlog_decay,
                           &dstate_in, &dsum_in),
                       plan.variant, workspace);
        rows.done();
    }
};

}  // namespace

int64_t chunks_in_segment(int64_t count, double most_states) {
    int64_t n = 1;
    while (n * n < count && (double)((count + n - 1) / n + n - 1) > most_states) n++;
    return n;
}

double bytes_of_rows(const BackwardProblem &p) {
    double bytes = 0;
    for (const Tensor *t : {&p.q, &p.k, &p.v, &p.out, &p.dout, &p.dq, &p.dk, &p.dv})
        if (t->rank) bytes += (double)t->shape[0] * t->shape[1] * t->shape[2] * t->shape[3] * t->dtype.bytes();
    return bytes;
}

void run_power_backward(holdfast_context &c, const BackwardProblem &p, const Choice &choice) {
    const Plan plan(p, choice, c);
    check_kernel_strides(p, plan.chunk);
    const int64_t heads = p.N * p.Hk;
    std::string how = "chunks of " + std::to_string(plan.chunk);
    if (plan.states) {
        const int64_t segment = plan.segment(p.longest());
        how += segment == 1 ? ", all states kept" : ", a state kept every " + std::to_string(segment) + " of them";
    }
    announce(c, "backward", plan.variant, choice.why, p, how, heads);
    DecaySums sums(p);
    if (heads == 0) return sums.finish();
    c.for_each(heads, [&](Workspace &workspace, int64_t n) {
        Chain chain(p, plan, workspace, n / p.Hk, n % p.Hk);
        chain.run();
        sums.put(n / p.Hk, n % p.Hk, chain.decay_sum());
    });
    sums.finish();
}

}  // namespace holdfast
