// The gradient of power retention, and of any degree whose outputs are normalised, on the CPU: power_backward.cpp.
#pragma once
#include "context.h"
#include "problem.h"

#include <cstdint>
#include <functional>

namespace holdfast {

/// The states that chunks begin with, while these are walked back: the first chunk of each segment has one that is kept, those between
/// are made a second time, in what segments behind them have left.
class KeptStates {
public:
    /// Memory for as many as `most_states`, since fewer are made twice, or for what two walks forward need. Of no chunks for one.
    KeptStates(int64_t chunks, double most_states);
    int64_t places() const { return count; }

    /// advance(chunk, from, to) makes the state at the end of a chunk from that at its start, retreat(chunk, from) is for each chunk
    /// from the last to the first. Places are 0, where the first state is, to places() - 1.
    void walk_back(const std::function<void(int64_t chunk, int64_t from, int64_t to)> &advance,
                   const std::function<void(int64_t chunk, int64_t from)> &retreat) const;

private:
    int64_t chunks, count;
};

/// Bytes of the rows that the call has: what the memory for its states is measured by.
double bytes_of_rows(const BackwardProblem &p);

/// Compute the gradients of `p` chunk by chunk, of any degree, normalized or not.
void run_power_backward(holdfast_context &context, const BackwardProblem &p, const Choice &choice);

}  // namespace holdfast
