// The gradient of the parallel form on a GPU: parallel_backward_gpu.cpp.
#pragma once
#include "context.h"
#include "problem.h"

#include <cstddef>

namespace holdfast {

/// Compute the gradients of `p`, which has no states, from all weights.
void parallel_backward_on_gpu(holdfast_context &context, const BackwardProblem &p, const Choice &choice);

/// CUDA: bytes of device memory that such a call needs beside its tensors, however those of its shapes lie.
size_t parallel_backward_workspace_on_gpu(holdfast_context &context, const BackwardProblem &p, const Choice &choice);

}  // namespace holdfast
