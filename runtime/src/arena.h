// Pieces of one block of memory, which is never looked at: it may be a GPU's.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace holdfast {

/// First fit, the same pieces for the same requests.
class Arena {
public:
    static constexpr size_t alignment = 256;  // of CUDA's own allocations
    Arena(uint64_t start, size_t bytes) : start(start), bytes(bytes) {}

    /// Its address; 0 where it does not fit.
    uint64_t allocate(size_t size) {
        size = (std::max<size_t>(size, 1) + alignment - 1) / alignment * alignment;
        size_t from = 0;
        auto next = pieces.begin();
        while (next != pieces.end() && next->from - from < size) from = next->to, ++next;
        if (size > bytes || from > bytes - size) return 0;
        pieces.insert(next, {from, from + size});
        high = std::max(high, from + size);
        return start + from;
    }
    void free(uint64_t memory) {
        pieces.erase(std::remove_if(pieces.begin(), pieces.end(), [&](const Piece &p) { return start + p.from == memory; }),
                     pieces.end());
    }
    /// Bytes from the start that have been in use.
    size_t most() const { return high; }

private:
    struct Piece {
        size_t from, to;
    };
    uint64_t start;
    size_t bytes, high = 0;
    std::vector<Piece> pieces;  // in use, in order
};

}  // namespace holdfast
