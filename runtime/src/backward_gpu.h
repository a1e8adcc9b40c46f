// holdfast_backward on a GPU: backward_gpu.cpp.
#pragma once
#include "context.h"
#include "problem.h"

namespace holdfast {

/// Compute the gradients of `p`, of degree 1 without normalization.
void backward_on_gpu(holdfast_context &context, const BackwardProblem &p, const Choice &choice);

/// CUDA: bytes of device memory that such a call needs beside its tensors, however those of its shapes lie.
size_t backward_workspace_on_gpu(holdfast_context &context, const BackwardProblem &p, const Choice &choice);

}  // namespace holdfast
