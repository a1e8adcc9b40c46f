// The parallel form on the CPU: parallel.cpp.
#pragma once
#include "context.h"
#include "problem.h"

namespace holdfast {

/// The variant of the form for `problem`, also on a GPU. Throws UNSUPPORTED where there is none.
const Variant &parallel_variant(const Problem &problem, const Choice &choice);

/// Run it on the whole problem.
void run_parallel(holdfast_context &context, const Problem &problem, const Choice &choice);

}  // namespace holdfast
