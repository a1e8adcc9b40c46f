// The public functions of retention: the form that a call is computed in, and what computes it.
#include "context.h"
#include "failure.h"
#include "forward.h"
#include "forward_gpu.h"
#include "parallel.h"
#include "parallel_gpu.h"
#include "power.h"
#include "power_gpu.h"
#include "problem.h"
#include "recurrent.h"
#include "recurrent_gpu.h"

#include <algorithm>
#include <string>

namespace holdfast {
namespace {

// A chunk costs the same however few of its tokens are used: up to one in so many of them, they are done one by one. Measured
// for every target, tuned and odd sizes of 40 to 320: at a quarter one by one is never slower (0.1 to 0.95 of the time), at
// three eighths up to 1.3 times.
constexpr int64_t least_share = 4;

/// The chunkwise variant for `p` if its rows were like this.
const Variant &chunkwise_variant(const Problem &p, const Choice &choice, const RowAlignment &rows) {
    return select_variant("chunkwise", p.q.dtype.name, p.K, p.V, p.chunk_size, choice.backend, choice.forced, rows);
}

/// The recurrent variant for one token of `p`.
const Variant &step_variant(const Problem &p, const Choice &choice) {
    return select_variant("recurrent", p.q.dtype.name, p.K, p.V, 0, choice.backend, choice.forced);
}

/// What HOLDFAST_FORM_AUTO stands for. Never the parallel form: for degree 1 it takes as long as the chunkwise one at 128 tokens
/// (K = V = 64; Intel Xeon, one core, kernels for any size), 1.6 times as long at 256, 4.6 at 1024, 14 at 4096; with K = V = 128
/// it is ahead until some 300 tokens, 1.8 times as long at 512 and 10 at 4096.
holdfast_form choose_form(const Problem &p, const Choice &choice) {
    if (p.form != HOLDFAST_FORM_AUTO) return p.form;
    const bool few = p.chunk_size == 0 && p.longest() <= chunkwise_variant(p, choice, {}).chunk / least_share;
    return few && choice.backend == Backend::cpu ? HOLDFAST_FORM_RECURRENT : HOLDFAST_FORM_CHUNKWISE;
}

/// Whether the kernels of power retention compute it.
bool is_power(const Problem &p) { return p.degree > 1 || p.normalized; }

/// Token by token, for the public function `call`.
void recurrent(holdfast_context &c, const char *call, const Problem &p, const Choice &choice) {
    if (choice.backend == Backend::cpu) return run_recurrent(c, call, p, choice);
    recurrent_on_gpu(c, call, p, step_variant(p, choice), choice.why);
}

void forward(holdfast_context &c, const Problem &p, const Choice &choice) {
    if (p.form == HOLDFAST_FORM_PARALLEL)
        return choice.backend == Backend::cpu ? run_parallel(c, p, choice) : parallel_on_gpu(c, p, choice);
    if (is_power(p))
        return choice.backend == Backend::cpu ? run_power(c, "forward", p, choice) : power_on_gpu(c, "forward", p, choice);
    switch (choose_form(p, choice)) {
    case HOLDFAST_FORM_RECURRENT: return recurrent(c, "forward", p, choice);
    default:
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
        *bytes = 0;
        if (p.form == HOLDFAST_FORM_PARALLEL) {
            if (choice.backend != Backend::cpu) *bytes = parallel_workspace_on_gpu(c, p, choice);
            return;
        }
        if (choice.backend == Backend::cpu) return;
        if (is_power(p)) {
            *bytes = power_workspace_on_gpu(c, p, choice);
            return;
        }
        if (choose_form(p, choice) == HOLDFAST_FORM_RECURRENT) {
            *bytes = recurrent_workspace_on_gpu(c, p, step_variant(p, choice));
            return;
        }
        if (choice.backend != Backend::cuda) return;
        for (const Variant *variant :
             selectable_variants("chunkwise", p.q.dtype.name, p.K, p.V, p.chunk_size, choice.backend, choice.forced))
            *bytes = std::max(*bytes, workspace_on_gpu(c, p, *variant));
    });
}

holdfast_status holdfast_step(holdfast_context *context, const holdfast_step_args *args) {
    return guarded(context, [&](holdfast_context &c) {
        const Problem p = checked_problem(args);
        const Choice choice = choose_backend(c, p.home());
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
        *bytes = is_power(p) ? power_workspace_on_gpu(c, p, choice) : recurrent_workspace_on_gpu(c, p, step_variant(p, choice));
    });
}

}  // extern "C"
