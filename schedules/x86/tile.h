// The register tile of a matrix product.
#pragma once
#include "Halide.h"

namespace holdfast {

struct Tile {
    int rows, columns;  // accumulators: rows * columns registers of a vector each; two more hold operands
};
constexpr Tile avx512_tile = {8, 2};  // of 32 registers
constexpr Tile avx2_tile = {4, 2};    // of 16

inline Tile tile_of(const Halide::Target &t) { return t.has_feature(Halide::Target::AVX512_Skylake) ? avx512_tile : avx2_tile; }

}  // namespace holdfast
