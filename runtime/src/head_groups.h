// Heads that a thread works on in turn, a few chunks of each at a time.
#pragma once
#include "context.h"
#include "problem.h"

#include <algorithm>
#include <cstdint>

namespace holdfast {

/// Groups of neighbouring heads of keys of a sequence.
class HeadGroups {
public:
    int64_t count;

    /// As few as give all threads the same number of pieces, or several each, and have their states in cache.
    HeadGroups(const Problem &p, const holdfast_context &context) : heads(p.Hk) {
        const int64_t sequences = p.long_sequences();  // those beside them are little work, or none
        const int64_t threads = context.threads_for(sequences * heads), most = std::max<int64_t>(heads, 1);
        count = std::min(most, heads * p.state_bytes() / in_cache + 1);
        while (count < most && sequences * count % threads != 0 && sequences * count < 4 * threads) count++;
    }
    /// The first head of a group, or of that after the last.
    int64_t begin(int64_t group) const { return group * heads / count; }

private:
    int64_t heads;

    // With the states of one call of a kernel they should stay in L2 (1 to 2 MB in today's x86): as many as fit, since they share the
    // pages of their rows, and a page that must be looked up for each row holds up the products (K = V = 128 of 8 heads: 6%).
    static constexpr int64_t in_cache = 640 * 1024;
};

}  // namespace holdfast
