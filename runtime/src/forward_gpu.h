// holdfast_forward on a GPU: forward_gpu.cpp.
#pragma once
#include "context.h"
#include "problem.h"

namespace holdfast {

/// Run `variant` on the whole problem. `why` it was chosen is for the verbose line.
void forward_on_gpu(holdfast_context &context, const Problem &problem, const Variant &variant, const char *why);

/// CUDA: bytes of device memory that such a call needs beside its tensors, however those of its shapes lie.
size_t workspace_on_gpu(holdfast_context &context, const Problem &problem, const Variant &variant);

}  // namespace holdfast
