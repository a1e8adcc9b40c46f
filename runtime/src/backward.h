// The kernel chunkwise_backward on the CPU: backward.cpp.
#pragma once
#include "context.h"
#include "problem.h"

namespace holdfast {

/// Compute the gradients of `p`, of degree 1 without normalization.
void run_backward(holdfast_context &context, const BackwardProblem &p, const Choice &choice);

}  // namespace holdfast
