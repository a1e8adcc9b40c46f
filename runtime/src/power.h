// Power retention, and any degree whose outputs are normalised, on the CPU: power.cpp.
#pragma once
#include "context.h"
#include "problem.h"

namespace holdfast {

/// Compute `p` for the public function `call` ("forward"), in chunks or token by token; p.form or, where that is automatic, the
/// better one. Throws UNSUPPORTED for another backend or form.
void run_power(holdfast_context &context, const char *call, const Problem &p, const Choice &choice);

/// The final state and sum of keys alone, in chunks. Out is not written, nor are weights.
void run_power_states(holdfast_context &context, const char *call, const Problem &p, const Choice &choice);

}  // namespace holdfast
