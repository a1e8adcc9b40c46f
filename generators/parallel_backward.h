// The gradient of parallel.h without states, the algorithm only: no target, no schedule, no layout.
//
// Autodiff gives the adjoint of one pair, a block of rows against a block of keys: (queries, keys, values) -> (values of the rows,
// their sums of weights). What the pair has of its neighbours are sums over pairs, whose reverse needs no autodiff. Weights are
// made once more, and nothing of T x T is stored but two numbers of each pair of blocks, for log decays.
//
//   o_i = num_i / den_i:   dnum_i = do_i / den_i,   dden_i = -<o_i, do_i> / den_i;   not normalized: dnum_i = scale^p do_i
//   dq_i, dk_j, dv_j: sums of the adjoints of pairs, over blocks of keys, and over blocks of rows and the queries that share a key
//
// Log decays need no product of their own: w_ij is of degree p in q_i and in k_j, and of the first in exp(G_i - G_j), so that by Euler
//
//   dG_i = (<q_i, dq_i> - <k_i, dk_i>) / p,   d log_decay_t = sum_{s >= t} dG_s
//
// In that sum nearly all of a long sequence cancels: a pair of a row and a key after t has its term twice, with both signs. So only
// a row's own block is summed like this. What later blocks add are the pairs of a later row and a key up to the block's end:
//
//   sum_{s > end} dG_s = sum_{i > end >= j} w_ij dw_ij = sum_{i > end >= j} s_ij ds_ij / p       s: scores
//
// What is wanted are arguments of a call: what is not are loops of no turns.
#pragma once
#include "parallel.h"

namespace holdfast {

/// What a call wants: 1 or 0. The gradient of log_decay takes the sums of those of q and k.
struct ParallelWanted {
    Halide::Expr dq, dk, dv, dlog_decay;
};

/// Variables as in parallel.h.
struct ParallelBackwardFuncs {
    ParallelFuncs f;          // gates and queries are those of f.weights
    Halide::Func out;         // (e,i,c,g,h,b): input, what the forward returned; looked at where normalized
    Halide::Func dout;        // (e,i,c,g,h,b): input, 0 past the end
    ParallelPair pair;        // last arguments n,c,g,h,b, n <= c: all but factor
    Halide::Func sum;         // (i,c,g,h,b): of all weights of a row
    Halide::Func factor;      // (i,c,g,h,b): 1 / sum, or what stands for (scale / unit)^p; 0 past the end
    Halide::Func out_dout;    // (i,c,g,h,b): <out, dout>
    Halide::Func dnum;        // (e,i,c,g,h,b): dout * factor
    Halide::Func dden;        // (i,c,g,h,b)
    Halide::RDom over_block;  // sum:      n <= c
    Halide::RDom over_value;  // out_dout: (e, once, or never where sums do not count)

    // Derived adjoints of a pair's stages of the same name. Of queries: without unit.
    Halide::Func dweights, dscores;  // (i,j,n,c,g,h,b); dweights: an update for each product, of values and of sums
    Halide::Func dqueries;           // (d,i,n,c,g,h,b)
    Halide::Func dkeys;              // (d,j,n,c,g,h,b)
    Halide::Func dvalues;            // (e,j,n,c,g,h,b)

    Halide::Func dq;                         // (d,i,c,g,h,b): sum of dqueries, update 0
    Halide::Func dk, dv;                     // (d,j,n,h,b) (e,j,n,h,b): sums of dkeys and dvalues, update 0
    Halide::RDom over_dq, over_dk, over_dv;  // (once or never, n, c, g), n <= c: the same names, for one loop
    Halide::Func q_dq, k_dk;  // (i,c,h,b): <q_i, dq_i> of all queries that share a key, and <k_i, dk_i>; p dG is the difference
    Halide::Func ddecay_after;     // (i,c,h,b): sum of p dG from row i to the end of its block
    Halide::Func ddecay_of_row;    // (i,n,c,g,h,b): <scores, dscores> of a row and a block of keys
    Halide::Func ddecay_of_pair;   // (n,c,g,h,b): of all rows of the block
    Halide::Func ddecay;           // (n,c,h,b): of all queries that share a key, update 0
    Halide::Func ddecay_before;    // (n,c,h,b): with all blocks of keys up to n; a copy, and a serial scan of that
    Halide::Func ddecay_of_later;  // (c,h,b): sum of p dG of all blocks after c
    Halide::Func dlog_decay;       // (i,c,h,b)
    Halide::RDom over_feature_of_q, over_feature_of_k;  // q_dq: (d, g); k_dk: d
    Halide::RDom over_after;                            // ddecay_after: row
    Halide::RDom over_key, over_row;                    // ddecay_of_row; ddecay_of_pair
    Halide::RDom over_gates;                            // ddecay: as over_dq
    Halide::RDom over_before, over_later;               // ddecay_before: n; ddecay_of_later: c

    // set by the generator: what leaves the kernel, in the caller's layout and type, each with update 0 over (i, c)
    Halide::Func result_dq, result_dk, result_dv, result_dlog_decay;
    Halide::RDom over_result_dq, over_result_dk, over_result_dv, over_result_dlog_decay;
};

/// Fills all but what the generator sets. `value_extent`: E; `group`: how many g there are.
ParallelBackwardFuncs parallel_backward(const Halide::Func &q, const Halide::Func &k, const Halide::Func &v,
                                        const Halide::Func &log_decay, const Halide::Func &out, const Halide::Func &dout,
                                        const Halide::Expr &value_extent, const Halide::Expr &group, const ParallelCall &call,
                                        const ParallelWanted &wanted, const ParallelSizes &sizes);

}  // namespace holdfast
