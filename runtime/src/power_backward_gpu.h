// The gradient of power retention, and of any degree whose outputs are normalised, on a GPU: power_backward_gpu.cpp.
#pragma once
#include "context.h"
#include "problem.h"

#include <cstddef>

namespace holdfast {

/// Compute the gradients of `p` chunk by chunk, of any degree, normalized or not.
void power_backward_on_gpu(holdfast_context &context, const BackwardProblem &p, const Choice &choice);

/// CUDA: bytes of device memory that such a call needs beside its tensors, however those of its shapes lie.
size_t power_backward_workspace_on_gpu(holdfast_context &context, const BackwardProblem &p, const Choice &choice);

}  // namespace holdfast
