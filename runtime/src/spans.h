// Where threads outnumber heads: a head's tokens in spans, one after the other, that threads share. Each makes the state that its span
// begins with anew, from all tokens before, in the same chunks and by the same kernel without queries: to the bit. Two threads are 1.35
// to 1.75 times as fast as one where both have a core (Zen 4, one head, T = 8192); together they do up to 1.3 times the work, which
// is what a call takes longer where the other core is busy.
#pragma once
#include "buffers.h"
#include "context.h"
#include "problem.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>

namespace holdfast {

/// Below that much work, T D V, the first thread does all before another is awake.
inline bool worth_sharing(const Problem &p) { return (double)p.T * (double)p.D * (double)p.V >= 1 << 22; }

/// Threads to a head of the longest sequence: what its tokens are of all, to the nearest, and not more than sequences as long as it
/// leave each. Short ones beside it fill threads that would be idle.
inline int64_t threads_of_head(const Problem &p, const holdfast_context &context) {
    const int64_t threads = context.all_threads(), heads = p.long_sequences() * p.Hk;
    if (!p.packed() || p.T == 0 || heads == 0) return heads ? threads / heads : 1;
    return std::min<int64_t>(threads / heads, std::llround((double)threads * (double)p.longest() / (double)(p.T * p.Hk)));
}

class Spans {
public:
    int64_t count;  // of the longest sequence, and at most; some may have no tokens

    /// For so many threads to each head of the longest sequence.
    Spans(const Problem &p, int64_t chunk, int64_t threads) : count(1), chunk(chunk), longest(p.longest()) {
        // Operations of a token: its part of the state, and for each head of queries as many to read it, and the chunk's own.
        const double state = (double)p.D * (double)p.V, own = 0.5 * (double)chunk * (double)(p.K + p.V);
        state_share = state / (state + (double)p.group() * (state + own));
        if (p.states.rank || !worth_sharing(p)) return;  // states between are written once
        // As long as one more saves a twentieth of the time. It never falls below the share of states.
        constexpr double worth_it = 0.95;
        for (const int64_t most = std::min(threads, longest / chunk); count < most; count++)
            if (first_share(count + 1) > worth_it * first_share(count)) break;
    }

    /// The first token of span n of a sequence of T, that of a chunk; T for n = count, and behind the spans of a short one. All take the
    /// same time: each is shorter than the one before by what the states up to it cost.
    int64_t begin(int64_t T, int64_t n) const {
        // As long as those of the longest, about: a short sequence stays whole.
        const double share = longest ? (double)T / (double)longest : 1;
        const int64_t of_sequence = std::max<int64_t>(std::llround(share * (double)count), 1);
        if (n >= of_sequence) return T;
        return (int64_t)((double)T * first_share(of_sequence) / first_share(n)) / chunk * chunk;
    }
    /// Whether span n has work: the one of no tokens at all is that of span 0.
    bool has_work(int64_t T, int64_t n) const { return begin(T, n) < begin(T, n + 1) || (T == 0 && n == 0); }

private:
    int64_t chunk, longest;
    double state_share;

    /// What the first of n spans has of the tokens, and all of them take of the time of one; infinite for none.
    double first_share(int64_t n) const { return state_share / (1 - std::pow(1 - state_share, (double)n)); }
};

/// Call run(p). Where pieces of work share a head's state, or its sum of keys, with a copy of an initial one that is where the final
/// one goes: one piece writes that while others may yet have to read.
template<class Run>
void with_initial_apart(holdfast_context &c, const Problem &p, bool state_shared, bool sum_shared, const Run &run) {
    auto in_place = [](const Tensor &initial, const Tensor &final) { return initial.rank && initial.data == final.data; };
    const bool state = state_shared && in_place(p.initial_state, p.final_state);
    const bool sum = sum_shared && in_place(p.initial_sum, p.final_sum);
    if (!(state || sum)) return run(p);
    const auto copied = [&](Workspace &workspace, int64_t) {
        const int64_t heads = p.N * p.Hk, size = p.D * p.V;
        const int64_t of_states = state ? heads * size : 0, of_sums = sum ? heads * p.D : 0;
        const Scratch memory(workspace, of_states + of_sums);
        Problem apart = p;
        auto move = [](Tensor &t, float *to, std::initializer_list<int64_t> strides) {
            t.data = (char *)to;
            std::copy(strides.begin(), strides.end(), t.stride);
        };
        if (state) move(apart.initial_state, memory.floats(), {p.Hk * size, size, p.V, 1});
        if (sum) move(apart.initial_sum, memory.floats() + of_states, {p.Hk * p.D, p.D, 1});
        for (int64_t n = 0; n < heads; n++) {
            const int64_t s = n / p.Hk, h = n % p.Hk;
            if (state) copy_state(State(p.initial_state, s, h), State(apart.initial_state, s, h));
            if (sum) std::copy_n(p.initial_sum.at(s, h), p.D, apart.initial_sum.at(s, h));
        }
        run(apart);
    };
    c.for_each(1, std::cref(copied));
}

}  // namespace holdfast
