// holdfast_step on a GPU: recurrent_gpu.cpp.
#pragma once
#include "context.h"
#include "problem.h"

namespace holdfast {

/// Run `variant` on the one token of `problem`. `why` it was chosen is for the verbose line.
void step_on_gpu(holdfast_context &context, const Problem &problem, const Variant &variant, const char *why);

/// CUDA: bytes of device memory that such a call needs beside its tensors.
size_t step_workspace_on_gpu(holdfast_context &context, const Problem &problem, const Variant &variant);

}  // namespace holdfast
