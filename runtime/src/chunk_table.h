// The chunk table that kernels read: filled for a CPU; the kernel chunk_table does it on a GPU. generators/chunks.h says what its
// columns mean.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace holdfast {

/// How many chunks of at most `chunk` tokens there are in the sequences of tokens starts[s] .. starts[s + 1] - 1.
inline int chunks_of(const std::vector<int64_t> &starts, int64_t chunk) {
    int count = 0;
    for (size_t s = 1; s < starts.size(); s++) count += (int)((starts[s] - starts[s - 1] + chunk - 1) / chunk);
    return count;
}

struct ChunkTable {
    static constexpr int fields = 4;
    std::vector<int32_t> columns;  // start, length, next, first of each slot
    int count, slots;

    ChunkTable(const std::vector<int64_t> &starts, int64_t chunk) : count(chunks_of(starts, chunk)) {
        const int sequences = (int)starts.size() - 1;
        slots = count + sequences;
        columns.resize((size_t)slots * fields);
        int c = 0;
        for (int s = 0; s < sequences; s++) {
            const int final_slot = count + s;
            put(final_slot, 0, 0, 0, starts[s + 1] > starts[s] ? c : final_slot);
            for (int64_t t = starts[s]; t < starts[s + 1]; t += chunk, c++) {
                const int64_t length = std::min<int64_t>(chunk, starts[s + 1] - t);
                put(c, (int32_t)t, (int32_t)length, t + length < starts[s + 1] ? c + 1 : final_slot, 0);
            }
        }
    }

private:
    void put(int slot, int32_t start, int32_t length, int32_t next, int32_t first) {
        const int32_t column[fields] = {start, length, next, first};
        std::copy(column, column + fields, &columns[(size_t)slot * fields]);
    }
};

}  // namespace holdfast
