// Gated retention token by token, the algorithm only: no target, no schedule, no layout.
//
//   S <- exp(g) S + k^T v,   o = scale q S          decay first, then write
//
// for blocks of a few tokens, in one pass over S for each of them, row by row: an element is read once, takes in all tokens of the
// block, is added to each one's output on the way, and is written back where it lay. A step is a block of one token: as fast as
// the memory that holds the state. More of them leave an element in its register, and read the state less often.
//
// Halide does not compute one output inside the loops of another; so both are one Tuple, over all tokens and rows. The state's
// buffer has a stride of 0 along tokens, that of sums a stride of 0 along rows: each token goes on with what the one before left of
// a row, and each row adds to what the one before left of a token's sum. Of queries that share a state, that serves the first; the
// others read the new state, and so want one token a call. Left out: layout and types (recurrent_generator.cpp), degrees above 1,
// normalisation.
#pragma once
#include "Halide.h"

namespace holdfast {

struct RecurrentSizes {
    int key, value;  // D, E; 0: any, known at run time only
    int tokens;      // in a block
};

/// b batch, h head of keys, g head of queries in the group that shares it, n block of tokens, i token in the block, d key feature, e
/// value feature.
struct RecurrentFuncs {
    Halide::Func q, k, v;    // (d,i,n,g,h,b) (d,i,n,h,b) (e,i,n,h,b): inputs
    Halide::Func log_decay;  // (i,n,h,b): input
    Halide::Func decay;      // (i,n,h,b): exp(log_decay), a sum of two; of blocks {rounded; what that left out, as a share}
    Halide::Func left_out;   // (n,h,b): the sum of those shares: the first token makes up for the whole block
    // (e,i,d,n,h,b): {state, sum}. Update 0: row d = over_key_feature of the state in place, and the sum of q S until there, for
    // query 0. For each element tokens are to come in their order, and for each token rows
    Halide::Func state_and_sum;
    Halide::Func others;            // (e,i,n,g,h,b): o of all other queries
    Halide::Func out;               // (e,i,n,g,h,b): o, of query 0 the last sum
    Halide::RDom over_key_feature;  // state_and_sum: d in [0, D), in that order
    Halide::RDom over_state;        // others: d in [0, D), nothing for query 0

    // set by the generator: what leaves the kernel, in the caller's type
    Halide::Func result;  // (e,i,n,g,h,b)
};

/// `key_extent` is D, also where the sizes leave it open.
RecurrentFuncs recurrent(const Halide::Func &q, const Halide::Func &k, const Halide::Func &v, const Halide::Func &log_decay,
                         const Halide::Expr &key_extent, int tokens, const Halide::Expr &scale);

}  // namespace holdfast
