// Where the chunks of a call lie. One table serves whole chunks, a partial last chunk, and packed sequences of different
// length: the matrix products always see full chunks, only the two small factors that need it look at the length.
//
// The runtime fills the table (runtime/src/chunk_table.h), on GPUs by a kernel (chunk_table_generator.cpp); column z describes
// *state slot* z. Slots 0 .. n-1 are the states at the start of chunks 0 .. n-1; slot n+s is the final state of sequence s. Memory
// safety does not depend on the table: rows and slots are clamped.
#pragma once
#include "Halide.h"

namespace holdfast {

enum ChunkField {
    chunk_start = 0,   // of chunk c: its first token, in the time axis of the tensors
    chunk_length = 1,  // of chunk c: tokens in it, 1 .. C
    chunk_next = 2,    // of chunk c: the slot that its final state goes to: c + 1, or n + s for the last of sequence s
    chunk_first = 3,   // of final slot n + s: the first slot of sequence s (n + s itself for an empty one)
    chunk_fields = 4,
};

struct Chunks {
    Halide::Func table;         // table(field, slot), int32
    Halide::Expr count, slots;  // n chunks; n + number of sequences

    Halide::Expr length(const Halide::Expr &c) const { return table((int)chunk_length, c); }
    Halide::Expr next(const Halide::Expr &c) const { return clamp(table((int)chunk_next, c), 0, slots - 1); }
    Halide::Expr first(const Halide::Expr &s) const { return clamp(table((int)chunk_first, count + s), 0, slots - 1); }

    /// Time of row i of chunk c, of T. Rows past the end repeat the chunk's last row, so that they hold numbers of the same
    /// sequence; whatever they produce is multiplied by zero or not stored.
    Halide::Expr time(const Halide::Expr &i, const Halide::Expr &c, const Halide::Expr &T) const {
        return clamp(table((int)chunk_start, c) + min(i, length(c) - 1), 0, T - 1);
    }
};

/// The table, filled where the kernel runs: no copy, and no wait for one.
struct ChunkTableFuncs {
    Halide::Func entries;  // (n): field n % 4 of slot n / 4, and zeros after the last
};
struct ChunkTableSizes {};

}  // namespace holdfast
