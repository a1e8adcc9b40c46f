// Fills the chunk table that kernels read. generators/chunks.h says what its columns mean.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace holdfast {

struct ChunkTable {
    static constexpr int fields = 4;
    std::vector<int32_t> columns;  // start, length, next, first of each slot
    int count = 0, slots = 0;

    /// Sequence s is tokens starts[s] .. starts[s + 1] - 1, cut into chunks of at most `chunk` tokens.
    ChunkTable(const std::vector<int64_t> &starts, int64_t chunk) {
        const int sequences = (int)starts.size() - 1;
        for (int s = 0; s < sequences; s++) count += (int)((starts[s + 1] - starts[s] + chunk - 1) / chunk);
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
