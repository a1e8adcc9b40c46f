// The gradient from all T x T weights, on the CPU: parallel_backward.cpp.
#pragma once
#include "context.h"
#include "problem.h"

namespace holdfast {

/// Compute the gradients of `p`, which has no states.
void run_parallel_backward(holdfast_context &context, const BackwardProblem &p, const Choice &choice);

}  // namespace holdfast
