// Power retention, and any degree whose outputs are normalised, on a GPU: power_gpu.cpp.
#pragma once
#include "context.h"
#include "gpu.h"
#include "problem.h"

#include <cstddef>

namespace holdfast {

/// Compute `p` in chunks; and the bytes of workspace that this takes. Throw UNSUPPORTED for another form.
void power_on_gpu(holdfast_context &context, const Problem &p, const Choice &choice);
size_t power_workspace_on_gpu(holdfast_context &context, const Problem &p, const Choice &choice);

/// Launch what power_on_gpu does, within another call: run.variant is one of the kernel power. Without an out where that has rank 0.
void issue_power(const Run &run, const Problem &p);

/// A step, likewise.
void power_step_on_gpu(holdfast_context &context, const Problem &p, const Choice &choice);
size_t power_step_workspace_on_gpu(holdfast_context &context, const Problem &p, const Choice &choice);

}  // namespace holdfast
