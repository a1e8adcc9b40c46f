// The gradient of power retention, and of any degree whose outputs are normalised, on the CPU: power_backward.cpp.
#pragma once
#include "context.h"
#include "problem.h"

#include <cstdint>
#include <functional>

namespace holdfast {

/// The states that chunks begin with, while these are walked back: some are kept, those behind one are made again from it, in what has
/// become free behind them.
class KeptStates {
public:
    /// Memory for as many as `most_states`, since what is not kept is made again, but for so many that none is made more than three
    /// times. The first one, from which all can be made, is not among them.
    KeptStates(int64_t chunks, double most_states);
    int64_t places() const { return count; }

    /// advance(chunk, from, to) makes the state at the end of a chunk from that at its start, where `to` may be `from`; retreat(chunk,
    /// from) is for each chunk from the last to the first. Place 0 is that of the first state, which is never written, others are 1 to
    /// places().
    void walk_back(const std::function<void(int64_t chunk, int64_t from, int64_t to)> &advance,
                   const std::function<void(int64_t chunk, int64_t from)> &retreat) const;

private:
    int64_t chunks, count;
};

/// Bytes of the call's tensors: what the memory for its states is measured by.
double bytes_of_tensors(const BackwardProblem &p);

/// Compute the gradients of `p` chunk by chunk, of any degree, normalized or not.
void run_power_backward(holdfast_context &context, const BackwardProblem &p, const Choice &choice);

}  // namespace holdfast
