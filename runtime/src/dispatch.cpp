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
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
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

/// Whether it is of the target that stands last, whose schedules know no hardware.
bool is_generic(const Variant &variant) { return variant.target == &targets().back(); }

/// Whether the kernels of power retention compute it.
bool is_power(const Problem &p) { return p.degree > 1 || p.normalized; }

// What HOLDFAST_FORM_AUTO goes by, on the CPU. Retention of degree 1: few tokens. A chunk costs the same however few of its tokens are
// used: up to one in so many of them, they are done one by one. Measured for every target, tuned and odd sizes of 40 to 320: at a
// quarter one by one is never slower (0.1 to 0.95 of the time), at three eighths up to 1.3 times.
constexpr int64_t least_share = 4;

/// Whether a recurrent kernel computes `p` faster than a chunkwise one: one by one as above, and for sizes that it was compiled for up to
/// half a chunk where heads of queries share a state (AVX-512 and AVX2, K = V = 64 and 128, groups of 2 and 4, in 0.65 to 0.9 of the
/// time of a chunk; small states in pairs up to three eighths, in 0.95 of it), else, 8 tokens in one pass over the state, up to three
/// quarters of a chunk, in 0.3 to 1.0 of the time at K = V = 32 to 256; with states of 32 x 32 as long as threads would not share a
/// head, in 0.75 to 0.95 of it. On one core of Zen 4.
bool few_tokens_or_small_states(const Problem &p, const Choice &choice) {
    constexpr int64_t small_state = 32 * 32;
    const int64_t chunk = chunkwise_variant(p, choice, {}).chunk, tokens = p.longest();
    const bool small = p.K * p.V <= small_state;
    if (!step_variant(p, choice).key_size) return tokens <= chunk / least_share;
    if (p.group() > 1) return tokens <= (small && p.group() == 2 ? chunk / 8 * 3 : chunk / 2);
    return tokens <= chunk / 4 * 3 || (small && !worth_sharing(p));
}

/// Whether HOLDFAST_FORM_AUTO may compute `p` from all T x T weights: a thread keeps T^2 / 32 floats beside them, 128 MiB at most here,
/// and the kernel reaches all of these rows.
bool may_have_weights(const Problem &p, std::initializer_list<const Tensor *> rows) {
    constexpr int64_t most_tokens = 1 << 15;
    return p.longest() <= most_tokens && std::all_of(rows.begin(), rows.end(), [&](const Tensor *t) {
               return t->rank < 3 ||
                      std::llabs(t->stride[1]) <= std::numeric_limits<int32_t>::max() / std::max<int64_t>(p.T, 1);
           });
}

/// The fastest form of power retention, by the operations for a head of keys and its G heads of queries in the longest sequence, a
/// multiply and an add being two. All T x T weights and their products: T (K + V) for a token and head of queries, of whole blocks.
/// A state of D features: 2 D (V + 1) to read it, for each head of queries, and as many to add a token, in chunks whose tokens all
/// cost; a step does that on the way. Weights cannot begin with a state, and a final one is made in chunks.
///
/// Divided by how many of them a kernel does while that of weights does one. Measured on one core of Zen 4, of 67 to 90 GFLOP/s for
/// weights at 1000 tokens and more, generic ones 5, and G = 1 and 4. K = V = 64, degree 2: chunks 95 to 98, AVX2 88, generic 8; steps
/// 25, AVX2 18, generic 2.5 to 3.5. Of kernels for any size, which were not tuned, K = V = 48: chunks 14, AVX2 11; steps 8, AVX2 6.
/// The forms then meet, AVX-512, where they did: with no states at 3777 tokens (4000), K = V = 32 961 (900), degree 3 at 16 x 64
/// 2369 (2400), K = V = 48 14400 (13700); with a final one alone at 11 and 1857 (13 and 1900), groups of 4 at 4 and 1857 (5 and 1800);
/// with an initial one at 21 (24), groups of 4 18 (18). Of small odd sizes each token has a cost of its own: 5 x 7, 16 x 16, and degree 3
/// at 8 x 8, with no states at 2650 (2900), 2800 (2700) and 3500 (6500).
holdfast_form fastest_of_power(const Problem &p, const Choice &choice) {
    const Variant &power = power_variant("power", p, choice, p.V), &step = power_variant("power_step", p, choice, p.V);
    const bool generic = is_generic(power);
    const double of_chunks = power.key_size ? 1.1 : generic ? 1.5 : 0.17;
    const double of_steps = step.key_size ? 0.26 : generic ? 0.45 : 0.085;
    const double T = (double)p.longest(), G = (double)p.group(), row = (double)(p.K + p.V);
    const double chunk = (double)power.chunk, all = std::ceil(T / chunk) * chunk, state = 2 * (double)p.D * (double)(p.V + 1);
    const auto begun = [&](const Variant &v) { return v.key_size || generic ? 0 : 25e3; };  // as much time goes by first
    const double steps = T * (state * (G + 0.5) / of_steps + begun(step));
    const double chunks = all * ((state * (G + 1) + G * chunk * row) / of_chunks + begun(power));
    const double at_end = p.final_state.rank || p.final_sum.rank ? all * (state / of_chunks + begun(power)) : 0;
    const double weights = G * all * (all + chunk) * row + at_end;
    if (!p.initial_state.rank && weights <= std::min(steps, chunks) &&
        may_have_weights(p, {&p.q, &p.k, &p.v, &p.out, &p.log_decay}))
        return HOLDFAST_FORM_PARALLEL;
    return steps <= chunks && can_step(p) ? HOLDFAST_FORM_RECURRENT : HOLDFAST_FORM_CHUNKWISE;
}

/// The form that p is computed in.
holdfast_form choose_form(const Problem &p, const Choice &choice) {
    // States alone: the kernels of the other forms want queries.
    if (choice.backend == Backend::cpu && p.H == 0 && p.Hk > 0) return HOLDFAST_FORM_CHUNKWISE;
    if (p.states.rank) return HOLDFAST_FORM_CHUNKWISE;
    if (p.form != HOLDFAST_FORM_AUTO) return p.form;
    if (choice.backend != Backend::cpu || p.chunk_size) return HOLDFAST_FORM_CHUNKWISE;
    if (is_power(p)) return fastest_of_power(p, choice);
    return few_tokens_or_small_states(p, choice) ? HOLDFAST_FORM_RECURRENT : HOLDFAST_FORM_CHUNKWISE;
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
/// where chunks are always less work; nor, on a GPU, no queries. HOLDFAST_FORM_AUTO counts T (K + V) for a token and head of queries
/// against reading a state, D (V + 1), and a G-th of that for adding to it. One core of Zen 4: the two meet at 2.5 times that (K = V =
/// 64, degree 2), in groups of 4 at 2.1, 16 x 64, degree 3, at 2.5; beside chunks for any size, not tuned, at 7 and more; generic ones
/// at 2.0 to 2.6.
bool backward_from_weights(const BackwardProblem &p, const Choice &choice) {
    const bool cpu = choice.backend == Backend::cpu;
    if (!is_power(p) || p.has_states() || (!cpu && p.H == 0)) return false;
    if (p.form != HOLDFAST_FORM_AUTO) return p.form == HOLDFAST_FORM_PARALLEL;
    if (!cpu || p.chunk_size) return false;
    if (!may_have_weights(p, {&p.q, &p.k, &p.v, &p.log_decay, &p.dout, &p.dq, &p.dk, &p.dv, &p.dlog_decay})) return false;
    const Variant &chunks = power_variant("power_backward", p, choice, p.V);
    const double worth = chunks.key_size || is_generic(chunks) ? 2 : 6, key_side = p.H ? (double)p.Hk / (double)p.H : 1;
    return (double)p.longest() * (double)(p.K + p.V) <= worth * (1 + key_side) * (double)p.D * (double)(p.V + 1);
}

constexpr Tensor BackwardProblem::*all_gradients[] = {&BackwardProblem::dq,
                                                      &BackwardProblem::dk,
                                                      &BackwardProblem::dv,
                                                      &BackwardProblem::dlog_decay,
                                                      &BackwardProblem::dinitial_state,
                                                      &BackwardProblem::dinitial_sum};

/// `p` without what is zero since nothing comes to it: where dout is not given, queries and their gradient; where no gradient of a
/// result is, all gradients.
BackwardProblem without_zeros(BackwardProblem p) {
    if (p.dout.rank) return p;
    p.H = p.q.shape[2] = 0;
    p.out = {};
    const bool all = !p.dfinal_state.rank && !p.dfinal_sum.rank;
    for (Tensor BackwardProblem::*gradient : all_gradients) {
        Tensor &zero = p.*gradient;
        if (!zero.rank || !(all || gradient == &BackwardProblem::dq)) continue;
        if (!zero.on_host()) p.zeros.push_back(zero);
        zero = {};
    }
    return p;
}

/// Make all elements of a tensor on the CPU zero.
void clear(const Tensor &t) {
    if (t.empty()) return;
    int64_t shape[Tensor::max_rank] = {1, 1, 1, 1}, stride[Tensor::max_rank] = {};
    std::copy_backward(t.shape, t.shape + t.rank, std::end(shape));
    std::copy_backward(t.stride, t.stride + t.rank, std::end(stride));
    const int64_t bytes = t.dtype.bytes(), pieces = stride[3] == 1 ? 1 : shape[3], piece = stride[3] == 1 ? shape[3] : 1;
    for (int64_t i = 0; i < shape[0]; i++)
        for (int64_t j = 0; j < shape[1]; j++)
            for (int64_t k = 0; k < shape[2]; k++)
                for (int64_t n = 0; n < pieces; n++)
                    std::memset(t.data + (i * stride[0] + j * stride[1] + k * stride[2] + n * stride[3]) * bytes, 0,
                                piece * bytes);
}

void backward(holdfast_context &c, const BackwardProblem &given, const Choice &choice) {
    check_states(given, choice);
    const BackwardProblem p = without_zeros(given);
    for (Tensor BackwardProblem::*gradient : all_gradients)
        if (const Tensor &zero = given.*gradient; zero.rank && zero.on_host() && !(p.*gradient).rank) clear(zero);
    if (!p.wants_any()) return clear_on_gpu(c, p, choice);
    const bool cpu = choice.backend == Backend::cpu;
    if (backward_from_weights(p, choice))
        return cpu ? run_parallel_backward(c, p, choice) : parallel_backward_on_gpu(c, p, choice);
    check_state_size(p, max_state);
    if (is_power(p)) return cpu ? run_power_backward(c, p, choice) : power_backward_on_gpu(c, p, choice);
    cpu ? run_backward(c, p, choice) : backward_on_gpu(c, p, choice);
}

size_t backward_workspace(holdfast_context &c, const BackwardProblem &given, const Choice &choice) {
    check_states(given, choice);
    const BackwardProblem p = without_zeros(given);
    if (!p.wants_any()) return clear_workspace_on_gpu(c, p, choice);
    if (choice.backend == Backend::cpu) return 0;
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
