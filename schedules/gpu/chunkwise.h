// The schedule of chunkwise retention that every GPU API takes, with tiles from whoever knows the GPU.
#pragma once
#include "../../generators/chunkwise.h"

namespace holdfast::gpu {

/// A block's tile of a product, and the piece of it that a thread keeps in registers.
struct Tile {
    int columns, rows;  // of a block
    int wide, high;     // of a thread; columns in one vector
};

constexpr int strip = 32;  // rows of a chunk that a block computes

/// Whether blocks, and divisions of indices, fit these sizes.
bool fits(const ChunkwiseSizes &sizes);

/// `out` has `strip` rows, and its weights as many in shared memory; both have at most 256 threads.
void schedule(ChunkwiseFuncs &f, const ChunkwiseSizes &sizes, const Tile &out, const Tile &state);

}  // namespace holdfast::gpu
