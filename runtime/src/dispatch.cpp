// The public functions of retention: the form that a call is computed in, and what computes it.
#include "backward.h"
#include "backward_gpu.h"
#include "context.h"
#include "failure.h"
#include "forward.h"
#include "forward_gpu.h"
#include "parallel.h"
#include "parallel_backward.h"
#include "parallel_backward_gpu.h"
#include "parallel_gpu.h"
#include "power.h"
#include "power_backward.h"
#include "power_backward_gpu.h"
#include "power_gpu.h"
#include "problem.h"
#include "recurrent.h"
#include "recurrent_gpu.h"
#include "spans.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

namespace holdfast {
namespace {

/// The chunkwise variant for `p` if its rows were like this.
const Variant &chunkwise_variant(const Problem &p, const Choice &choice, const RowAlignment &rows) {
    return select_variant("chunkwise", p.q.dtype.name, p.K, p.V, p.chunk_size, choice.backend, choice.forced, rows);
}

/// The recurrent variant for one token of `p`.
const Variant &step_variant(const Problem &p, const Choice &choice) {
    return select_variant("recurrent", p.q.dtype.name, p.K, p.V, 0, choice.backend, choice.forced);
}

/// Whether the kernels of power retention compute it.
bool is_power(const Problem &p) { return p.degree > 1 || p.normalized; }

// What HOLDFAST_FORM_AUTO goes by, on the CPU.
//
// A chunk costs the same however few of its tokens are used: up to one in so many of them, they are done one by one. Measured
// for every target, tuned and odd sizes of 40 to 320: at a quarter one by one is never slower (0.1 to 0.95 of the time), at
// three eighths up to 1.3 times. Power retention's states are larger.
constexpr int64_t least_share = 4, least_share_of_power = 8;

/// Whether a recurrent kernel computes `p` faster than a chunkwise one: one by one as above; for sizes that it was compiled for, and
/// heads of queries that share no state, it takes 8 tokens in one pass over the state. On one core of Zen 4, K = V = 32 to 256, AVX-512
/// and AVX2, up to three quarters of a chunk, in 0.3 to 1.0 of the time; with states of 32 x 32 as long as threads would not share a
/// head, in 0.75 to 0.95 of it.
bool few_tokens_or_small_states(const Problem &p, const Choice &choice) {
    constexpr int64_t small_state = 32 * 32;
    const int64_t chunk = chunkwise_variant(p, choice, {}).chunk, tokens = p.longest();
    if (p.group() > 1 || !step_variant(p, choice).key_size) return tokens <= chunk / least_share;
    return tokens <= chunk / 4 * 3 || (p.K * p.V <= small_state && !worth_sharing(p));
}

/// Whether all T x T weights are less work than D features of a state that nobody gives or takes: T (K + V) operations a token
/// against 4 D (V + 1), of which the parallel form's take a little longer. One core of an Intel Xeon, 4 heads: of degree 2 at
/// K = V = 64 the two meet at some 3900 tokens, of 4225 by that count; at 512 it is ahead six times, at 64 fifteen times. For degree
/// 1 it does not pay: on one core of Zen 4, 4 heads, it takes 1.2 times as long at 64 tokens (K = V = 64) and 2.2 at 256; with
/// K = V = 128 0.9 times, 1.1 at 128 and 1.5 at 256.
bool weights_are_less(const Problem &p) {
    if (!is_power(p) || p.initial_state.rank || p.final_state.rank || p.final_sum.rank) return false;
    return (double)p.longest() * (double)(p.K + p.V) <= 3.0 * (double)p.D * (double)(p.V + 1);
}

/// The form that p is computed in.
holdfast_form choose_form(const Problem &p, const Choice &choice) {
    // States alone: the kernels of the other forms want queries.
    if (choice.backend == Backend::cpu && p.H == 0 && p.Hk > 0) return HOLDFAST_FORM_CHUNKWISE;
    if (p.states.rank) return HOLDFAST_FORM_CHUNKWISE;
    if (p.form != HOLDFAST_FORM_AUTO) return p.form;
    if (choice.backend != Backend::cpu || p.chunk_size) return HOLDFAST_FORM_CHUNKWISE;
    if (weights_are_less(p)) return HOLDFAST_FORM_PARALLEL;
    const bool few = is_power(p) ? p.longest() <= power_variant("power", p, choice, p.V).chunk / least_share_of_power
                                 : few_tokens_or_small_states(p, choice);
    return few ? HOLDFAST_FORM_RECURRENT : HOLDFAST_FORM_CHUNKWISE;
}

/// The same, of a form that has states where they are of a size for it.
holdfast_form choose_possible_form(const Problem &p, const Choice &choice) {
    const holdfast_form form = choose_form(p, choice);
    if (form != HOLDFAST_FORM_PARALLEL || p.initial_state.rank || p.final_state.rank || p.final_sum.rank)
        check_state_size(p, choice.backend == Backend::cpu ? max_power_state : max_state);
    return form;
}

/// Token by token, for the public function `call`.
void recurrent(holdfast_context &c, const char *call, const Problem &p, const Choice &choice) {
    if (choice.backend == Backend::cpu) return run_recurrent(c, call, p, choice);
    recurrent_on_gpu(c, call, p, step_variant(p, choice), choice.why);
}

/// Check that states inside sequences are of a call on the CPU.
void check_states(const Problem &p, const Choice &choice) {
    if (p.states.rank && choice.backend != Backend::cpu)
        fail(HOLDFAST_UNSUPPORTED, "states is given and the call is computed by ", name_of(choice.backend),
             "; expected the CPU, or NULL");
}

void forward(holdfast_context &c, Problem p, const Choice &choice) {
    check_states(p, choice);
    p.form = choose_possible_form(p, choice);
    if (p.form == HOLDFAST_FORM_PARALLEL)
        return choice.backend == Backend::cpu ? run_parallel(c, p, choice) : parallel_on_gpu(c, p, choice);
    if (is_power(p))
        return choice.backend == Backend::cpu ? run_power(c, "forward", p, choice) : power_on_gpu(c, "forward", p, choice);
    if (p.form == HOLDFAST_FORM_RECURRENT) return recurrent(c, "forward", p, choice);
    const RowAlignment rows = p.row_alignment(choice.backend);
    const Variant &variant = chunkwise_variant(p, choice, rows);
    std::string why = choice.why;
    if (c.verbose) {
        const Variant &best = chunkwise_variant(p, choice, {});
        if (&best != &variant)
            why += ", rows of " + std::string(rows.tensor) + " at multiples of " + std::to_string(rows.bytes) +
                   " bytes: " + best.name + " wants " + std::to_string(best.row_alignment);
    }
    return choice.backend == Backend::cpu ? run_chunkwise(c, p, variant, why.c_str())
                                          : forward_on_gpu(c, p, variant, why.c_str());
}

/// Whether the gradient of `p` is computed from all T x T weights. Its kernel knows no states, and no degree 1 without normalization,
/// where chunks are always less work; nor, on a GPU, no queries.
bool backward_from_weights(const BackwardProblem &p, const Choice &choice) {
    const bool cpu = choice.backend == Backend::cpu;
    if (!is_power(p) || p.has_states() || (!cpu && p.H == 0)) return false;
    return p.form == HOLDFAST_FORM_AUTO ? cpu && p.chunk_size == 0 && weights_are_less(p) : p.form == HOLDFAST_FORM_PARALLEL;
}

/// Where dout is not given, and zero all the same: `p` without queries, from which nothing comes. Their gradient is zero, which only
/// its kernel writes into a GPU's own tensor.
BackwardProblem without_idle_queries(BackwardProblem p, const Choice &choice) {
    if (p.dout.rank) return p;
    if (choice.backend != Backend::cpu && ((p.dq.rank && !p.dq.on_host()) || backward_from_weights(p, choice))) return p;
    p.H = p.q.shape[2] = 0;
    p.out = p.dq = {};
    return p;
}

void clear_rows(const Tensor &rows) {
    for (int64_t b = 0; b < rows.shape[0]; b++)
        for (int64_t t = 0; t < rows.shape[1]; t++)
            for (int64_t h = 0; h < rows.shape[2]; h++)
                std::memset(rows.at<char>(b, t, h), 0, rows.shape[3] * rows.dtype.bytes());
}

void backward(holdfast_context &c, const BackwardProblem &given, const Choice &choice) {
    check_states(given, choice);
    const BackwardProblem p = without_idle_queries(given, choice);
    if (given.dq.rank && !p.dq.rank) clear_rows(given.dq);
    if (!p.wants_any()) return;
    const bool cpu = choice.backend == Backend::cpu;
    if (backward_from_weights(p, choice))
        return cpu ? run_parallel_backward(c, p, choice) : parallel_backward_on_gpu(c, p, choice);
    check_state_size(p, max_state);
    if (is_power(p)) return cpu ? run_power_backward(c, p, choice) : power_backward_on_gpu(c, p, choice);
    cpu ? run_backward(c, p, choice) : backward_on_gpu(c, p, choice);
}

size_t backward_workspace(holdfast_context &c, const BackwardProblem &given, const Choice &choice) {
    check_states(given, choice);
    const BackwardProblem p = without_idle_queries(given, choice);
    if (!p.wants_any() || choice.backend == Backend::cpu) return 0;
    if (backward_from_weights(p, choice)) return parallel_backward_workspace_on_gpu(c, p, choice);
    check_state_size(p, max_state);
    return is_power(p) ? power_backward_workspace_on_gpu(c, p, choice) : backward_workspace_on_gpu(c, p, choice);
}

}  // namespace
}  // namespace holdfast

using namespace holdfast;

extern "C" {

holdfast_status holdfast_forward(holdfast_context *context, const holdfast_forward_args *args) {
    return guarded(context, [&](holdfast_context &c) {
        const Problem p = checked_problem(args);
        forward(c, p, choose_backend(c, p.home()));
    });
}

holdfast_status holdfast_workspace_size(holdfast_context *context, const holdfast_forward_args *args, size_t *bytes) {
    return guarded(context, [&](holdfast_context &c) {
        if (!bytes) fail(HOLDFAST_INVALID_ARGUMENT, "bytes is NULL; expected a size_t to write to");
        const Problem p = checked_problem(args);
        const Choice choice = choose_backend(c, p.home());
        check_states(p, choice);
        *bytes = 0;
        const holdfast_form form = choose_possible_form(p, choice);
        if (form == HOLDFAST_FORM_PARALLEL) {
            if (choice.backend != Backend::cpu) *bytes = parallel_workspace_on_gpu(c, p, choice);
            return;
        }
        if (choice.backend == Backend::cpu) return;
        if (is_power(p)) {
            *bytes = power_workspace_on_gpu(c, p, choice);
            return;
        }
        if (form == HOLDFAST_FORM_RECURRENT) {
            *bytes = recurrent_workspace_on_gpu(c, p, step_variant(p, choice));
            return;
        }
        if (choice.backend != Backend::cuda) return;
        for (const Variant *variant :
             selectable_variants("chunkwise", p.q.dtype.name, p.K, p.V, p.chunk_size, choice.backend, choice.forced))
            *bytes = std::max(*bytes, workspace_on_gpu(c, p, *variant));
    });
}

int64_t holdfast_state_interval(int64_t key_size, int64_t value_size, DLDataType dtype) {
    constexpr int64_t most = std::numeric_limits<int32_t>::max();  // of an extent
    if (key_size < 1 || key_size > most || value_size < 1 || value_size > most || dtype.lanes != 1) return 0;
    for (const Dtype &known : {f32, f16, bf16}) {
        if (!(known == Dtype{"", dtype})) continue;
        const double state = 4.0 * (double)key_size * (double)value_size;
        const double rows = 4 * ((double)key_size + (double)value_size) * (double)known.bytes() / 8;  // an eighth of a token's
        int64_t interval = state > 32 * 1024 ? 128 : 256;  // as many as the gradient's kernel takes at once, or half as many
        while (state > rows * (double)interval) interval *= 2;
        return interval;
    }
    return 0;
}

holdfast_status holdfast_step(holdfast_context *context, const holdfast_step_args *args) {
    return guarded(context, [&](holdfast_context &c) {
        const Problem p = checked_problem(args);
        const Choice choice = choose_backend(c, p.home());
        if (choice.backend == Backend::cpu && p.H == 0 && p.Hk > 0) return forward(c, p, choice);  // the state alone
        check_state_size(p, choice.backend == Backend::cpu ? max_power_state : max_state);
        if (!is_power(p)) return recurrent(c, "step", p, choice);
        choice.backend == Backend::cpu ? run_power(c, "step", p, choice) : power_on_gpu(c, "step", p, choice);
    });
}

holdfast_status holdfast_step_workspace_size(holdfast_context *context, const holdfast_step_args *args, size_t *bytes) {
    return guarded(context, [&](holdfast_context &c) {
        if (!bytes) fail(HOLDFAST_INVALID_ARGUMENT, "bytes is NULL; expected a size_t to write to");
        const Problem p = checked_problem(args);
        const Choice choice = choose_backend(c, p.home());
        *bytes = 0;
        if (choice.backend == Backend::cpu) return;
        check_state_size(p, max_state);
        *bytes = is_power(p) ? power_workspace_on_gpu(c, p, choice) : recurrent_workspace_on_gpu(c, p, step_variant(p, choice));
    });
}

holdfast_status holdfast_backward(holdfast_context *context, const holdfast_backward_args *args) {
    return guarded(context, [&](holdfast_context &c) {
        const BackwardProblem p = checked_problem(args);
        backward(c, p, choose_backend(c, p.home()));
    });
}

holdfast_status holdfast_backward_workspace_size(holdfast_context *context, const holdfast_backward_args *args, size_t *bytes) {
    return guarded(context, [&](holdfast_context &c) {
        if (!bytes) fail(HOLDFAST_INVALID_ARGUMENT, "bytes is NULL; expected a size_t to write to");
        const BackwardProblem p = checked_problem(args);
        *bytes = backward_workspace(c, p, choose_backend(c, p.home()));
    });
}

}  // extern "C"
