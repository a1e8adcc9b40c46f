// Power retention, and any degree whose outputs are normalised, on a GPU: power_gpu.cpp.
#pragma once
#include "context.h"
#include "gpu.h"
#include "problem.h"

#include <cstddef>

namespace holdfast {

constexpr int64_t block_of_features = 80;  // of a kernel for any degree, generators/power_generator.cpp: it has sums of each

/// Compute `p` for the public function `call` ("forward"), token by token where p.form is recurrent, else in chunks; and the bytes of
/// workspace that this takes.
void power_on_gpu(holdfast_context &context, const char *call, const Problem &p, const Choice &choice);
size_t power_workspace_on_gpu(holdfast_context &context, const Problem &p, const Choice &choice);

/// Launch what power_on_gpu does, within another call: run.variant is one of the kernel that this takes. Without an out where that has
/// rank 0.
void issue_power(const Run &run, const Problem &p);

}  // namespace holdfast
