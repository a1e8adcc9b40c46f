// The gradient of power retention, and of any degree whose outputs are normalised, on the CPU: power_backward.cpp.
#pragma once
#include "context.h"
#include "problem.h"

namespace holdfast {

/// Chunks in a segment of `count` of them, of each of which one state is kept: as few as memory for so many states allows, since
/// fewer states are made twice, up to what takes least.
int64_t chunks_in_segment(int64_t count, double most_states);

/// Bytes of the rows that the call has: what the memory for its states is measured by.
double bytes_of_rows(const BackwardProblem &p);

/// Compute the gradients of `p` chunk by chunk, of any degree, normalized or not.
void run_power_backward(holdfast_context &context, const BackwardProblem &p, const Choice &choice);

}  // namespace holdfast
