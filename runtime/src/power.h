// Power retention, and any degree whose outputs are normalised, on the CPU: power.cpp.
#pragma once
#include "context.h"
#include "problem.h"

namespace holdfast {

/// Compute `p` on the CPU for the public function `call` ("forward"), token by token where p.form is recurrent, else in chunks.
void run_power(holdfast_context &context, const char *call, const Problem &p, const Choice &choice);

/// The final state and sum of keys alone, in chunks. Out is not written, nor are weights.
void run_power_states(holdfast_context &context, const char *call, const Problem &p, const Choice &choice);

/// The variant of the kernel "power" or "power_step" for `p` and so many of its values.
const Variant &power_variant(const char *kernel, const Problem &p, const Choice &choice, int64_t value_size);

/// Whether the recurrent form takes it: a kernel's buffer counts a state once for each head of queries that shares it.
bool can_step(const Problem &p);

/// Features in a block of a step, of the D of a state: a divisor of that.
int64_t feature_block(int64_t D);

}  // namespace holdfast
