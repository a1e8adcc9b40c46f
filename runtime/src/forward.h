// The chunkwise kernel on the CPU: forward.cpp.
#pragma once
#include "context.h"
#include "problem.h"

namespace holdfast {

/// Run `variant` on the whole problem. `why` it was chosen is for the verbose line.
void run_chunkwise(holdfast_context &context, const Problem &problem, const Variant &variant, const char *why);

}  // namespace holdfast
