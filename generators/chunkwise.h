// Chunkwise gated retention, the algorithm only: no target, no schedule, no layout.
//
//   S_t = exp(g_t) S_{t-1} + k_t^T v_t,   o_t = scale q_t S_t
//
// computed a chunk of C tokens at a time. Every matrix product is one Func with one update, f += a * b over one RDom, of
// two named Funcs: that is the shape that register tiles, shared-memory tiles, tensor cores and autodiff all take.
// Left out: layout (chunkwise_generator.cpp), degrees above 1, normalisation.
#pragma once
#include "Halide.h"
#include "chunks.h"
#include "dtypes.h"
#include <vector>

namespace holdfast {

struct ChunkwiseSizes {
    int chunk;        // C, a compile-time constant
    int key, value;   // D, E; 0: any, known at run time only
    int causal_tile;  // rows i of a tile share the end of their sum over keys, (i / tile + 1) * tile; must divide chunk.
                      // Only zero terms are left out. chunk itself: nothing is.
    Dtype operands = Dtype::f32;  // of matrix products; any but f32 rounds: operands.h
};

/// b batch, h head of keys, g head of queries in the group that shares it, c chunk or slot, i query and j key in the chunk, d key
/// feature, e value feature.
struct ChunkwiseFuncs {
    Halide::Func q, k, v;    // (d,i,c,g,h,b) (d,j,c,h,b) (e,j,c,h,b): inputs, in chunk coordinates
    Halide::Func log_decay;  // (i,c,h,b): input, 0 past the end of the chunk
    Halide::Func state_in;   // (e,d,s,h,b): input, one per sequence s
    Halide::Func row_steps;  // (i,c,h,b): log decay of a row: its whole part; and the rest
    Halide::Func row_rest;
    Halide::Func decay_steps;       // (i,c,h,b): log decay from the start of the chunk, row i included: its whole part, in
    Halide::Func decay_rest;        // (i,c,h,b): steps of decay_step, an integer; and the rest
    Halide::Func row_decay;         // (i,c,h,b): scale * exp(log decay): what a row keeps of the chunk's initial state
    Halide::Func key_decay;         // (j,c,h,b): what the chunk's final state keeps of key j
    Halide::Func chunk_decay;       // (c,h,b): what it keeps of the initial state, a sum of two
    Halide::Func scores;            // (j,i,c,g,h,b): q . k
    Halide::Func mask;              // (j,i,c,h,b): scale * exp(log decay from j to i), causal
    Halide::Func weights;           // (j,i,c,g,h,b): scores * mask
    Halide::Func keys_decayed;      // (d,j,c,h,b)
    Halide::Func contribution;      // (e,d,c,h,b): what the chunk adds to the state
    Halide::Func state;             // (e,d,c,h,b): at the start of chunk c, and final ones: chunks.h
    Halide::Func inter, intra;      // (e,i,c,g,h,b): from the state; from the chunk's own keys
    Halide::Func out;               // (e,i,c,g,h,b): row_decay * inter + intra
    Halide::RDom over_row;          // decay_steps, decay_rest: r in [0, C)
    Halide::RDom over_key_feature;  // scores:        d in [0, D)
    Halide::RDom over_token;        // contribution:  j in [0, C)
    Halide::RDom over_sequence;     // state, update 0: s
    Halide::RDom over_chunk;        // state, update 1: c, the serial scan
    Halide::RDom over_state;        // inter:         d in [0, D)
    Halide::RDom over_key;          // intra:         j in [0, C), trimmed to the causal tile

    // What products read of weights, state and keys_decayed where operands are not fp32; else none.
    std::vector<Halide::Func> weights_read, state_read, keys_read;

    // set by the generator: q, k, v and out in the type that they are stored in; what leaves the kernel, in the caller's layout
    Halide::Func q_stored, k_stored, v_stored, out_stored;
    Halide::Func result;     // (e,t,g,h,b), update 0 over (over_result.x = i, over_result.y = c)
    Halide::Func state_out;  // (e,d,s,h,b)
    Halide::RDom over_result;
};

/// `key_extent` is D, also where sizes.key leaves it open.
ChunkwiseFuncs chunkwise(const Halide::Func &q, const Halide::Func &k, const Halide::Func &v, const Halide::Func &log_decay,
                         const Halide::Func &state_in, const Chunks &chunks, const Halide::Expr &key_extent,
                         const Halide::Expr &scale, const ChunkwiseSizes &sizes);

}  // namespace holdfast
