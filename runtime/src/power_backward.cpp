// The kernel power_backward, of a chunk: a sequence is a chain of calls for each head, from the last chunk to the first, with the
// gradients of its state and sum of keys taken back in place. The states that the chunks begin with come from the forward kernel,
// power. Where all of them are too much memory some are kept, the first of which is the caller's, and those between are made again, from
// the last one kept, in place but for what is kept on the way. So s states are enough for (s + 1) (s + 2) / 2 chunks of which none is
// made more than twice, and for (s + 1) (s + 2) (s + 3) / 6 with one more walk.
#include "power_backward.h"

#include "backward_head.h"
#include "expansion.h"
#include "power.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
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
        slot = D * (p.V + 1);
        states = p.dq.rank || p.dlog_decay.rank || (p.normalized && p.group());
        // All threads together a quarter of the tensors, at most, with a gradient.
        most_states = bytes_of_tensors(p) / 4 / ((double)slot * sizeof(float) * context.threads_for(p.N * p.Hk)) - 1;
    }
    int64_t chunks(int64_t T) const { return (T + chunk - 1) / chunk; }
    KeptStates kept(int64_t T) const { return {states ? chunks(T) : 1, most_states}; }
};

/// One sequence and head of keys.
class Chain {
public:
    Chain(const BackwardProblem &p, const Plan &plan, Workspace &workspace, int64_t s, int64_t h)
        : p(p), plan(plan), workspace(workspace), s(s), h(h), T(p.length(s)), chunks(plan.chunks(T)),
          rows(p, workspace, s, h, plan.chunk), kept(plan.kept(T)),
          states(workspace, plan.slot * std::max<int64_t>(kept.places(), 1)), gradient_memory(workspace, plan.slot) {
        put(p.dfinal_state, p.dfinal_sum, gradient_memory.floats(), Of::gradients);
    }

    void run() {
        // In the first place there is nothing, but what the caller gave is made where it is wanted.
        auto state = [&](int64_t place, int64_t first_at) {
            float *const at = states.floats() + ((place ? place : first_at) - 1) * plan.slot;
            if (place == 0) put(p.initial_state, p.initial_sum, at, Of::states);
            return at;
        };
        float *const gradient = gradient_memory.floats();
        if (plan.states) {
            kept.walk_back(
                [&](int64_t chunk, int64_t from, int64_t to) {
                    float *const before = state(from, to);
                    advance(chunk, before, state(to, 1));
                },
                [&](int64_t chunk, int64_t from) { retreat(chunk, state(from, 1), gradient); });
        } else {
            float *const any = state(0, 1);
            for (int64_t i = chunks; i-- > 0;) retreat(i, any, gradient);
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
    BackwardHead rows;
    const KeptStates kept;
    const Scratch states, gradient_memory;

    Features of_caller(const Tensor &t) const { return {t.at(s, h), t.stride[2], t.rank == 4 ? t.stride[3] : 1}; }
    /// What the caller gave, zeros where that is nothing.
    void put(const Tensor &state, const Tensor &sum, float *slot, Of of) const {
        std::fill_n(slot, plan.slot, 0.0f);
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

    /// The gradients of a chunk, from its state and the gradient of that at its end, which becomes that of the state.
    void retreat(int64_t chunk, float *state, float *gradient) {
        look_at(chunk);
        Buffer state_in = state_of(state), sum_in = sum_of(state), dstate = state_of(gradient), dsum = sum_of(gradient);
        const auto run = std::get<PowerBackwardKernel *>(plan.variant.run);
        check_returned(run(&workspace, &rows.q, &rows.k, &rows.v, &rows.log_decay, &state_in, &sum_in, &rows.out, &rows.dout,
                           &dstate, &dsum, p.degree, p.normalized, p.scale, rows.want_dq, rows.want_dk, rows.want_dv,
                           rows.want_dlog_decay, p.needs_dstate(chunk), p.needs_dsum(chunk), &rows.dq, &rows.dk, &rows.dv,
                           &rows.dlog_decay, &dstate, &dsum),
                       plan.variant, workspace);
        rows.done();
    }
};

}  // namespace

/// Chunks that can be walked back with so many places if no state is made more than so many times: those from the next one kept on, with
/// a place less, and those before it, which are walked over once more.
static double reach(int64_t places, int times) {
    double chunks = 1;
    for (int n = 1; n <= times; n++) chunks = chunks * (double)(places + n) / n;
    return chunks;
}

KeptStates::KeptStates(int64_t chunks, double most_states) : chunks(chunks), count(0) {
    constexpr int most_times = 3;
    while (count + 1 < chunks && (reach(count, most_times) < (double)chunks || (double)(count + 1) <= most_states)) count++;
}

void KeptStates::walk_back(const std::function<void(int64_t, int64_t, int64_t)> &advance,
                           const std::function<void(int64_t, int64_t)> &retreat) const {
    std::vector<int64_t> kept = {0};  // the chunks that the states in places 0, 1, .. are at the start of
    for (int64_t end = chunks; end > 0;) {
        const int64_t place = (int64_t)kept.size() - 1, begin = kept.back(), left = count - place;
        if (begin + 1 == end) {
            retreat(begin, place);
            kept.pop_back(), end = begin;
            continue;
        }
        // What is before the next one is walked over once more often than what is behind it, in which there is a place less.
        int times = 1;
        while (reach(left, times) < (double)(end - begin)) times++;
        const double behind = reach(left - 1, times), before = times > 1 ? reach(left, times - 2) : 1;
        const int64_t next = begin + (int64_t)std::max((double)(end - begin) - behind, before);
        for (int64_t chunk = begin; chunk < next; chunk++) advance(chunk, chunk == begin ? place : place + 1, place + 1);
        kept.push_back(next);
    }
}

double bytes_of_tensors(const BackwardProblem &p) {
    double bytes = 0;
    for (const Tensor *t : p.all_tensors())
        if (t->rank)
            bytes += std::accumulate(t->shape, t->shape + t->rank, (double)t->dtype.bytes(), std::multiplies<double>());
    return bytes;
}

void run_power_backward(holdfast_context &c, const BackwardProblem &p, const Choice &choice) {
    const Plan plan(p, choice, c);
    check_kernel_strides(p, plan.chunk);
    const int64_t heads = p.N * p.Hk;
    std::string how = "chunks of " + std::to_string(plan.chunk);
    if (plan.states) {
        const int64_t chunks = plan.chunks(p.longest()), kept = plan.kept(p.longest()).places() + 1;
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
