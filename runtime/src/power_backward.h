// The gradient of power retention, and of any degree whose outputs are normalised, on the CPU: power_backward.cpp.
#pragma once
#include "context.h"
#include "problem.h"

namespace holdfast {

/// Compute the gradients of `p` chunk by chunk, of any degree, normalized or not.
void run_power_backward(holdfast_context &context, const BackwardProblem &p, const Choice &choice);

}  // namespace holdfast
