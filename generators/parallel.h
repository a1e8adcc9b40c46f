// Retention in the parallel form, the algorithm only: no target, no schedule, no layout.
//
//   w_ij = (scale q_i.k_j)^p exp(G_i - G_j) for j <= i, else 0       G: sum of the log decays up to a token, itself included
//   o_i = sum_j w_ij v_j, or divided by sum_j w_ij
//
// a block of C rows at a time against blocks of C keys, so that nothing of T x T is ever stored, unless the weights are asked
// for. A row takes a key of an earlier block by three factors, none above 1 and none computed from a difference of large sums:
//
//   exp(G_i - G_j) = row_decay(i) exp(decay of the blocks between) exp(decay of j's block after j)
//
// of which the last two are key_decay, and the first one waits for the end of the sum. Only the row's own block has a mask.
// Degree, normalisation, the initial state and what is written beside out are arguments of a call, not variants: those that are
// not wanted are loops of no turns.
//
// An initial state is met as the keys of a block are, block of features after block of features: phi (expansion.h) of the row in the
// place of weights, rows of the state in that of values. So it is one algorithm for all degrees; that of 1 is a table like any.
// Left out: layout (parallel_generator.cpp); the final state of degrees above 1, which is that of power retention (power.h).
#pragma once
#include "Halide.h"
#include "expansion.h"

#include <functional>
#include <string>
#include <vector>

namespace holdfast {

struct ParallelSizes {
    int block;        // C, a compile-time constant
    int key, value;   // D, E; 0: any, known at run time only
    int causal_tile;  // in a row's own block the rows i of a tile share the end of their sum over keys, as in chunkwise.h
};

/// x, which is not negative. Where it is in a condition, Halide would bound it by that, and then not see that there is one value
/// of it: GPUs need constant sizes.
inline Halide::Expr opaque(const Halide::Expr &x) { return Halide::cast<int32_t>(Halide::abs(x)); }

/// What a call computes. All are known at run time only.
struct ParallelCall {
    Halide::Expr tokens;      // T, of k and v
    Halide::Expr degree;      // p, 1 to 4
    Halide::Expr normalized;  // 1 or 0
    Halide::Expr scale;
    Halide::Expr key_extent;  // D, also where the sizes leave it open
    Halide::Expr features;    // of an expanded key, of the initial state
    Halide::Expr states_in;   // initial states given: 1 or 0
};

/// A block of rows against a block of keys, its own or an earlier one. The blocks are the last arguments.
struct ParallelPair {
    Halide::Func scores;            // (i,j,..): queries . keys
    Halide::Func weights;           // (i,j,..): scores^p * what the rows see of each key
    Halide::Func sum;               // (i,..): of the weights
    Halide::RDom over_key_feature;  // scores: d
    Halide::RDom over_summed_key;   // sum:    (j, once, or never where sums do not count)
};

/// Element d of row i, or of key j, of a pair.
using ParallelOperand = std::function<Halide::Expr(const Halide::Expr &d)>;

/// `blocks`: the last arguments of its stages. Operands and decay, what rows see of a key, are in terms of i, j and these. Names
/// begin with `prefix` and end in `suffix`.
ParallelPair parallel_pair(const std::vector<Halide::Var> &blocks, const ParallelOperand &query, const ParallelOperand &key,
                           const Halide::Expr &decay, const ParallelCall &call, const ParallelSizes &sizes,
                           const std::string &prefix, const std::string &suffix = "");

/// Weights of the rows of block c on the keys of block n: of an earlier one (past), and of the rows' own. Without row_decay (past)
/// and factor (both).
struct ParallelWeights {
    Halide::Func decay_before;   // (s,c,h,b): log decay of the s blocks before c, as {steps, rest}
    Halide::Func row_decay;      // (i,c,h,b): what a row keeps of what was there before its block
    Halide::Func initial_decay;  // (c,h,b): what is there before the block, of the initial state
    Halide::Func key_decay;      // (j,n,c,h,b): what is there before block c, of key j of block n
    Halide::Func mask;           // (i,j,c,h,b): exp(log decay from j to i), causal
    Halide::Func unit;         // (i,c,g,h,b): a power of two that brings a row of q near 1, so that its p-th power is in range
    Halide::Func queries;      // (d,i,c,g,h,b): q * unit
    Halide::Func phi;          // (i,j,u,c,g,h,b): of queries, feature j of block u
    Halide::Func past_scores;  // (i,j,n,c,g,h,b): queries . k
    Halide::Func past;         // (i,j,n,c,g,h,b): past_scores^p * key_decay
    Halide::Func own_scores;   // (i,j,c,g,h,b)
    Halide::Func own;          // (i,j,c,g,h,b): own_scores^p * mask
    Halide::Func initial_block_sum;  // (i,u,c,g,h,b): from the initial sum of keys, of one block of features
    Halide::Func past_block_sum;     // (i,n,c,g,h,b): of the keys of one block
    Halide::Func past_sum;           // (i,c,g,h,b): update 0 of the initial sum, update 1 of the blocks before
    Halide::Func own_sum;            // (i,c,g,h,b)
    Halide::Func factor;             // (i,c,g,h,b): 1 / the sum of all, or what stands for (scale / unit)^p
    Halide::RDom over_size;          // unit:          d
    Halide::RDom over_distance;      // decay_before:  s, a serial scan
    Halide::RDom over_past_key_feature, over_own_key_feature;  // past_scores, own_scores: d
    Halide::RDom over_initial_block;                           // past_sum, and past of ParallelFuncs, update 0: (u, states_in)
    Halide::RDom over_past_block;                              // and update 1: n < c
    Halide::RDom over_summed_key, over_summed_own_key;         // past_block_sum, own_sum: (j, once, or never where sums do
    Halide::RDom over_summed_feature;                          // not count); initial_block_sum, likewise
};

/// b batch, h head of keys, g head of queries that shares it, c block of rows, i row in it, n block of keys, j key in it,
/// u block of C features of the state and j one of them, d key feature or row of a state, e value feature.
struct ParallelFuncs {
    Halide::Func q;             // (d,i,c,g,h,b): input, in coordinates of blocks
    Halide::Func k, v;          // (d,j,n,h,b) (e,j,n,h,b): inputs
    Halide::Func log_decay;     // (j,n,h,b): input, 0 past the end
    Halide::Func decay_steps;   // (i,n,h,b): log decay from the start of the block, row i included: whole steps of decay_step,
    Halide::Func decay_rest;    // (i,n,h,b): and the rest
    Halide::Func state_in;      // (e,d,h,b): the initial state, or 0; 0 past the last feature
    Halide::Func keys_in;       // (d,h,b): the initial sum of keys, likewise
    Expansion phi;              // the table
    Halide::RDom over_row;      // decay_steps, decay_rest
    Halide::RDom over_initial;  // state_in, keys_in, update 0

    ParallelWeights weights;     // those that out is made of
    Halide::Func initial_block;  // (e,i,u,c,g,h,b): from one block of features of the initial state
    Halide::Func past_block;     // (e,i,n,c,g,h,b): from the keys of one block
    Halide::Func past;           // (e,i,c,g,h,b): update 0 from the initial state, update 1 from all blocks before
    Halide::Func own;            // (e,i,c,g,h,b): from the row's own block
    Halide::Func out;            // (e,i,c,g,h,b)
    Halide::RDom over_feature;   // initial_block: j
    Halide::RDom over_past_key;  // past_block:    j
    Halide::RDom over_own_key;   // own:           j, trimmed to the causal tile

    ParallelWeights shown;                // the same once more, of the weights that are written
    Halide::Func shown_scores;            // (i,j,n,c,g,h,b)
    Halide::Func weights_shown;           // (i,j,n,c,g,h,b), n <= c: what the values are multiplied by, in full
    Halide::RDom over_shown_key_feature;  // shown_scores: d

    Halide::Func end_decay_before;                     // (s,h,b): decay_before of the end
    Halide::Func end_decay;                            // (h,b): what the final state keeps of the initial one, a sum of two
    Halide::Func end_key_decay;                        // (j,n,h,b): what it keeps of key j
    Halide::Func keys_decayed;                         // (d,j,n,h,b)
    Halide::Func contribution_block;                   // (e,d,n,h,b): what the keys of a block add to the final state
    Halide::Func contribution;                         // (e,d,h,b)
    Halide::Func state;                                // (e,d,h,b): the final one, of degree 1
    Halide::Func keys_block, keys_contribution, keys;  // (d,n,h,b) (d,h,b) (d,h,b): likewise, of the sum of keys
    Halide::RDom over_end_distance;                    // end_decay_before: s
    Halide::RDom over_token, over_block;               // contribution_block: j; contribution: n
    Halide::RDom over_keys_token, over_keys_block;     // the same of keys_block and keys_contribution

    // set by the generator: what leaves the kernel, in the caller's layout and type
    Halide::Func result;       // (e,t,g,h,b), update 0 over (over_result.x = i, over_result.y = c)
    Halide::Func state_out;    // (e,d,s,h,b)
    Halide::Func keys_out;     // (d,s,h,b)
    Halide::Func weights_out;  // (j,s,t,g,h,b): 0; update 0 over (over_weights.x = j, .y = i, .z = n, .w = c)
    Halide::RDom over_result, over_weights;
};

/// What row i of block c sees of key j of block n <= c.
Halide::Expr decay_of_key(const ParallelWeights &w);

/// What rows are multiplied by where their weights are not normalized: scale^p, of queries times unit.
Halide::Expr scale_of_row(const ParallelWeights &w, const ParallelCall &call);

/// Fills all but what the generator sets. state_in and keys_in of the call are (e,d,s,h,b) and (d,s,h,b), s < states_in.
ParallelFuncs parallel(const Halide::Func &q, const Halide::Func &k, const Halide::Func &v, const Halide::Func &log_decay,
                       const Halide::Func &state_in, const Halide::Func &keys_in, const ParallelCall &call,
                       const ParallelSizes &sizes);

}  // namespace holdfast
