// A call of holdfast_forward, holdfast_step or holdfast_backward: its arguments, checked.
#pragma once
#include "context.h"
#include "holdfast/holdfast.h"
#include "tensor.h"

#include <cstdint>
#include <string>
#include <vector>

namespace holdfast {

/// What to compute. A step is a call for one token whose initial state is its final one.
struct Problem {
    int64_t B, T, H, K, V;
    int64_t Hk;  // heads of k, v, log_decay and states; H is a multiple of it
    int64_t D;   // size of an expanded key: K for degree 1
    int64_t N;   // sequences, and states: B, or those of `starts`
    int degree;  // of q.k, from 1 on
    bool normalized;
    holdfast_form form;
    holdfast_expansion expansion;
    std::vector<int64_t> starts;  // of packed sequences, and T; empty: each batch entry is one

    Tensor q, k, v, out;                // [B, T, H or Hk, K or V]
    Tensor log_decay;                   // [Hk] or [B, T, Hk]; rank 0: not given
    Tensor initial_state, final_state;  // [N, Hk, D, V], value-major ones by their strides; rank 0: not given
    Tensor initial_sum, final_sum;      // [N, Hk, D]; rank 0: not given
    Tensor weights;                     // [B, H, T, T]; rank 0: not wanted
    Tensor states;  // [M, Hk, D, V], as states above, those of a sequence in a row; rank 0: not given. An input of a gradient
    int64_t state_interval;  // tokens from one of them to the next; 0: not given
    float scale;
    int64_t chunk_size;         // 0: the library's choice
    const DLTensor *workspace;  // null: not given. Not checked: only a GPU looks at it

    int64_t state_bytes() const { return D * V * (int64_t)sizeof(float); }
    int64_t group() const { return Hk ? H / Hk : 1; }  // heads of queries to one of keys
    bool packed() const { return !starts.empty(); }
    /// Of sequence s: its batch entry, its first token there, and its tokens.
    int64_t entry(int64_t s) const { return packed() ? 0 : s; }
    int64_t start(int64_t s) const { return packed() ? starts[s] : 0; }
    int64_t length(int64_t s) const { return packed() ? starts[s + 1] - starts[s] : T; }

    /// In `states`: how many are of sequence s, after 0, state_interval, .. tokens and after all; and the first of them.
    int64_t states_of(int64_t s) const { return intervals(length(s)) + 1; }
    int64_t intervals(int64_t tokens) const { return tokens / state_interval + (tokens % state_interval > 0); }
    int64_t first_state(int64_t s) const;

    int64_t longest() const;  // of the sequences, in tokens
    /// How many of the longest would have all tokens, rounded down: N where all are alike, fewer where some are short or empty.
    int64_t long_sequences() const;
    Backend home() const;  // where all tensors are

    /// All that a kernel has, first q; those not given have rank 0.
    std::vector<const Tensor *> tensors() const {
        return {&q, &k, &v, &log_decay, &initial_state, &initial_sum, &out, &final_state, &final_sum, &weights, &states};
    }

    /// Of rows as kernels of `backend` get them: of host tensors in packed copies, where that is a GPU.
    RowAlignment row_alignment(Backend backend) const;
};

/// What to compute the gradients of: `out` is an input, of rank 0 where it does not matter, and no final state nor weights are
/// wanted.
struct BackwardProblem : Problem {
    // Gradients of results; of rank 0: zeros.
    Tensor dout, dfinal_state, dfinal_sum;
    // Gradients of arguments; of rank 0: not wanted. States are value-major by their strides.
    Tensor dq, dk, dv, dlog_decay, dinitial_state, dinitial_sum;
    // Those on a GPU that are zero, since nothing comes to them: none of the above, and cleared by themselves.
    std::vector<Tensor> zeros;

    /// A state or sum of keys, or a gradient of one, is given or wanted.
    bool has_states() const {
        return initial_state.rank || dfinal_state.rank || dfinal_sum.rank || dinitial_state.rank || dinitial_sum.rank;
    }
    std::vector<const Tensor *> all_tensors() const {
        std::vector<const Tensor *> all = tensors();
        for (const Tensor *t : {&dout, &dfinal_state, &dfinal_sum, &dq, &dk, &dv, &dlog_decay, &dinitial_state, &dinitial_sum})
            all.push_back(t);
        for (const Tensor &t : zeros) all.push_back(&t);
        return all;
    }
    /// Gradients of states between tokens are needed: by all but dq and those of sums of keys. Those of states before all tokens only
    /// where they are wanted.
    bool needs_dstates() const { return dk.rank || dv.rank || dlog_decay.rank || dinitial_state.rank; }
    /// That of the state that call n of a kernel begins with, of calls in the order of their tokens, is needed.
    bool needs_dstate(int64_t n) const { return n ? needs_dstates() : dinitial_state.rank > 0; }
    /// The same of the sum of keys, where it counts: dv does without.
    bool needs_dsum(int64_t n) const { return normalized && (dinitial_sum.rank || (n && (dk.rank || dlog_decay.rank))); }
    /// A gradient is wanted.
    bool wants_any() const { return dq.rank || needs_dstates() || dinitial_sum.rank; }
};

/// Check all arguments. Throws a Failure that names the first that is wrong.
Problem checked_problem(const holdfast_forward_args *args);
Problem checked_problem(const holdfast_step_args *args);
BackwardProblem checked_problem(const holdfast_backward_args *args);

// D V, at most: kernels' own buffers of a few states are addressed by 32 bits, in bytes. Those of power retention on the CPU
// have none.
constexpr int64_t max_state = 1 << 25, max_power_state = 1 << 28;

/// Check the size of a state, of a degree above 1 against `most_of_power`. Throws UNSUPPORTED. Calls that may need none pass
/// checked_problem() with any: whoever then computes one calls this.
void check_state_size(const Problem &p, int64_t most_of_power);

/// Check that strides fit kernels' 32 bits: along time for `tokens` in one call of a kernel, along heads that share keys, and
/// along D of a state.
void check_kernel_strides(const Problem &p, int64_t tokens);
void check_kernel_strides(const BackwardProblem &p, int64_t tokens);

/// Tell the context's listener, if there is one, what runs for `call` ("forward"), `how` ("chunks of 32") and why; on a CPU in how
/// many pieces.
void announce(const holdfast_context &context, const char *call, const Variant &variant, const char *why, const Problem &p,
              const std::string &how, int64_t pieces = 0);

}  // namespace holdfast
