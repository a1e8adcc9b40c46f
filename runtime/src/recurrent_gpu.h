// The recurrent form on a GPU: recurrent_gpu.cpp.
#pragma once
#include "context.h"
#include "problem.h"

namespace holdfast {

/// Run `variant` on the tokens of `problem` one after the other, for the public function `call` ("step"). `why` it was chosen is for
/// the verbose line.
void recurrent_on_gpu(holdfast_context &context, const char *call, const Problem &problem, const Variant &variant,
                      const char *why);

/// CUDA: bytes of device memory that such a call needs beside its tensors.
size_t recurrent_workspace_on_gpu(holdfast_context &context, const Problem &problem, const Variant &variant);

}  // namespace holdfast
