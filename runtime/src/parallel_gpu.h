// The parallel form on a GPU: parallel_gpu.cpp.
#pragma once
#include "context.h"
#include "problem.h"

#include <cstddef>

namespace holdfast {

/// Compute `p`; and the bytes of workspace that this takes. Throw UNSUPPORTED for what no kernel of it does there.
void parallel_on_gpu(holdfast_context &context, const Problem &p, const Choice &choice);
size_t parallel_workspace_on_gpu(holdfast_context &context, const Problem &p, const Choice &choice);

}  // namespace holdfast
