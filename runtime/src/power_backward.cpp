// The kernel power_backward, of a chunk: a sequence is a chain of calls for each head, from the last chunk to the first, with the
// gradients of its state and sum of keys going from one call to the next. The states that the chunks begin with come from the forward
// kernel, power. Where all of them are too much memory, one is kept for each segment of some chunks, and those between are made again,
// segment by segment. Later segments are shorter: while they are walked back more states are kept. So s states are enough for
// s (s + 1) / 2 - 1 chunks, with one more walk forward, of states alone.
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
#include <utility>
#include <vector>

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
        states = p.dq.rank || p.dlog_decay.rank || (p.normalized && p.group());
        // All threads together a quarter of the tensors, at most.
        most_states = bytes_of_rows(p) / 4 / ((double)slot * sizeof(float) * context.threads_for(p.N * p.Hk));
    }
    int64_t chunks(int64_t T) const { return (T + chunk - 1) / chunk; }
    KeptStates kept(int64_t T) const { return {states ? chunks(T) : 1, most_states}; }
};

/// One sequence and head of keys.
class Chain {
public:
    Chain(const BackwardProblem &p, const Plan &plan, Workspace &workspace, int64_t s, int64_t h)
        : p(p), plan(plan), workspace(workspace), s(s), h(h), T(p.length(s)), chunks(plan.chunks(T)),
          rows(p, workspace, s, h, plan.chunk), kept(plan.kept(T)), states(workspace, plan.slot * kept.places()),
          gradient_memory(workspace, plan.slot * 2) {
        std::fill_n(states.floats(), plan.slot, 0.0f);
        std::fill_n(gradient_memory.floats(), 2 * plan.slot, 0.0f);
        put(p.initial_state, p.initial_sum, states.floats(), Of::states);
        put(p.dfinal_state, p.dfinal_sum, gradient_memory.floats(), Of::gradients);
    }

    void run() {
        float *gradient = gradient_memory.floats(), *next = gradient + plan.slot;
        auto retreat_from = [&](int64_t chunk, int64_t place) {
            retreat(chunk, state(place), gradient, next);
            std::swap(gradient, next);
        };
        if (plan.states)
            kept.walk_back([&](int64_t chunk, int64_t from, int64_t to) { advance(chunk, state(from), state(to)); },
                           retreat_from);
        else
            for (int64_t i = chunks; i-- > 0;) retreat_from(i, 0);
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
    BackwardHead rows;
    const KeptStates kept;
    const Scratch states, gradient_memory;

    float *state(int64_t place) const { return states.floats() + place * plan.slot; }

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
                           rows.want_dlog_decay, p.needs_dstate(chunk), p.needs_dsum(chunk), &rows.dq, &rows.dk, &rows.dv,
                           &rows.dlog_decay, &dstate_in, &dsum_in),
                       plan.variant, workspace);
        rows.done();
    }
};

}  // namespace

KeptStates::KeptStates(int64_t chunks, double most_states) : chunks(chunks), count(1) {
    while (count < chunks && (count * (count + 1) / 2 - 1 < chunks || (double)(count + 1) <= most_states)) count++;
}

void KeptStates::walk_back(const std::function<void(int64_t, int64_t, int64_t)> &advance,
                           const std::function<void(int64_t, int64_t)> &retreat) const {
    // The chunks that segments begin with, of which there are as many as places: each segment as long as what those before it leave
    // allows, but for a chunk of each of those behind. The last but one has one: what makes a state from another has both.
    std::vector<int64_t> begins;
    for (int64_t n = 0, chunk = 0; n < count && chunk < chunks; n++) {
        begins.push_back(chunk);
        chunk += n + 2 == count ? 1 : std::min(count - n, chunks - chunk - (count - n - 1));
    }
    std::vector<int64_t> spare, first = {0};  // places; those of the first states of segments
    for (int64_t place = count; place-- > 1;) spare.push_back(place);
    auto take = [&] {
        const int64_t place = spare.back();
        spare.pop_back();
        return place;
    };
    // The last segment's other states are made when it is walked back.
    for (int64_t n = 0; n + 1 < (int64_t)begins.size(); n++) {
        int64_t from = first[n];
        for (int64_t chunk = begins[n]; chunk < begins[n + 1]; chunk++) {
            const int64_t to = take();
            advance(chunk, from, to);
            if (from != first[n]) spare.push_back(from);
            from = to;
        }
        first.push_back(from);
    }
    int64_t end = chunks;
    for (int64_t n = (int64_t)begins.size(); n-- > 0; end = begins[n]) {
        std::vector<int64_t> states = {first[n]};
        for (int64_t chunk = begins[n]; chunk + 1 < end; chunk++) {
            const int64_t to = take();
            advance(chunk, states.back(), to);
            states.push_back(to);
        }
        for (int64_t chunk = end; chunk-- > begins[n];) {
            retreat(chunk, states.back());
            spare.push_back(states.back());
            states.pop_back();
        }
    }
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
        const int64_t chunks = plan.chunks(p.longest()), kept = plan.kept(p.longest()).places();
        how +=
            kept >= chunks ? ", all states kept" : ", states kept of " + std::to_string(kept) + " of " + std::to_string(chunks);
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
