// The recurrent kernel, token by token.
#pragma once
#include "context.h"
#include "problem.h"

namespace holdfast {

/// Compute `p`, each token by itself, for the public function `call` ("step"): what suits few of them. Any p.T; chunk_size
/// does not matter. `choice` is of the CPU.
void run_recurrent(holdfast_context &context, const char *call, const Problem &p, const Choice &choice);

}  // namespace holdfast
