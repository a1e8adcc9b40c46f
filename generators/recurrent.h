// One token of gated retention, the algorithm only: no target, no schedule, no layout.
//
//   S <- exp(g) S + k^T v,   o = scale q S          decay first, then write
//
// in one pass over S, row by row: an element is read once, written back where it lay, and added to the output on the way, so
// that the kernel is as fast as the memory that holds the state. Halide does not compute one output inside the loops of
// another; so both are one Tuple, in which the sum's buffer has a stride of 0 along the rows: each row adds to what the one
// before left. Of queries that share a state, that serves the first; the others read the new state. Left out: layout and types (recurrent_generator.cpp), degrees above 1, normalisation.
#pragma once
#include "Halide.h"

namespace holdfast {

struct RecurrentSizes {
    int key, value;  // D, E; 0: any, known at run time only
};

/// b batch, h head of keys, g head of queries in the group that shares it, d key feature, e value feature.
struct RecurrentFuncs {
    Halide::Func q, k, v;           // (d,g,h,b) (d,h,b) (e,h,b): inputs
    Halide::Func log_decay;         // (h,b): input
    Halide::Func decay;             // (h,b): exp(log_decay), a sum of two
    Halide::Func state_and_sum;     // (e,d,h,b): {state, sum}. Update 0 goes down the rows over_key_feature: row d of the state
                                    // in place, and the sum of o until there, for query 0
    Halide::Func others;            // (e,g,h,b): o of all other queries
    Halide::Func out;               // (e,g,h,b): o, of query 0 the last sum
    Halide::RDom over_key_feature;  // state_and_sum: d in [0, D), in that order
    Halide::RDom over_state;        // others: d in [0, D), nothing for query 0

    // set by the generator: what leaves the kernel, in the caller's type
    Halide::Func result;  // (e,g,h,b)
};

/// `key_extent` is D, also where the sizes leave it open.
RecurrentFuncs recurrent(const Halide::Func &q, const Halide::Func &k, const Halide::Func &v, const Halide::Func &log_decay,
                         const Halide::Expr &key_extent, const Halide::Expr &scale);

}  // namespace holdfast
