// Power retention, one chunk of up to C tokens, the algorithm only: no target, no schedule, no layout.
//
//   S_t = exp(g_t) S_{t-1} + phi(k_t)^T v_t,   s_t = exp(g_t) s_{t-1} + phi(k_t),   phi of degree p: expansion.h
//   o_t = phi(q_t) S_t / phi(q_t) s_t,         or scale^p phi(q_t) S_t
//
// One chunk, because its state is large, D V numbers: a sequence is a chain of calls with the state carried from one to the next,
// and no states between chunks are kept. What does not depend on the query, phi(k) and what it adds to the state, is computed
// once for a group of query heads that share keys and values. Left out: layout (power_generator.cpp).
#pragma once
#include "Halide.h"
#include "expansion.h"
#include <cstdlib>

namespace holdfast {

struct PowerSizes {
    int degree;       // p; 0: known at run time only, 1 .. most_factors
    int chunk;        // C, a compile-time constant
    int key, value;   // K, V; 0: any, known at run time only
    int block;        // features whose products are added up by themselves before they meet the rest: D of the same sign in one
                      // fp32 sum would lose digits; a divisor of D saves looking for the end. 0: one sum over all, without the
                      // stages of blocks, which autodiff does not see through: to be differentiated, not computed
    int causal_tile;  // as in chunkwise.h
};

/// The block for D features; 0: not known. Measured: blocks of 48 to 160 are within 3% of one another on x86. The divisor of D that is
/// nearest to 80.
inline int feature_block(int features) {
    constexpr int good = 80;
    int best = 0;
    for (int m = 1; m <= features; m++)
        if (features % m == 0 && (!best || std::abs(m - good) < std::abs(best - good))) best = m;
    return best ? best : good;
}

/// b batch, h head of keys, g query head of its group, i query and j key in the chunk, d key element, f feature, e value
/// feature, u block of features.
struct PowerFuncs {
    Halide::Func q, k, v;               // (d,i,g,h,b) (d,j,h,b) (e,j,h,b): inputs; k and v are 0 past the end of the chunk
    Halide::Func log_decay;             // (i,h,b): input, 0 past the end
    Halide::Func state_in;              // (e,f,h,b): input
    Halide::Func keys_in;               // (f,h,b): input, the sum of keys
    Expansion phi;                      // the table
    Halide::Func decay_steps;           // (i,h,b): log decay from the start of the chunk, row i included: its whole part, in
    Halide::Func decay_rest;            // (i,h,b): steps of decay_step, an integer; and the rest
    Halide::Func row_decay;             // (i,h,b): exp of it: what a row keeps of the chunk's initial state
    Halide::Func key_decay;             // (j,h,b): what the chunk's final state keeps of key j
    Halide::Func chunk_decay;           // (h,b): what it keeps of the initial state, a sum of two
    Halide::Func largest;               // (i,g,h,b): of |q|
    Halide::Func unit;                  // (i,g,h,b): unit_of it, which brings it into range
    Halide::Func queries;               // (d,i,g,h,b): q * unit; 1 at d = K. Schedules store it: of
                                        // products of q * unit compilers make unit^p, which may be beyond fp32
    Halide::Func queries_decayed;       // (d,i,g,h,b): * row_decay. The decay is on one factor of phi
    Halide::Func keys;                  // (d,j,h,b): k; 1 at d = K
    Halide::Func keys_decayed;          // (d,j,h,b): * key_decay
    Halide::Func phi_q, phi_k;          // (f,i,g,h,b) (f,j,h,b): decayed
    Halide::Func scores;                // (j,i,g,h,b): q . k
    Halide::Func weights;               // (j,i,g,h,b): scores^p * exp(log decay from j to i), causal
    Halide::Func num_block;             // (e,u,i,g,h,b): phi_q . state over a block of features
    Halide::Func num_inter, num_intra;  // (e,i,g,h,b): from the state; from the chunk's own keys
    Halide::Func den_block;  // (u,i,g,h,b) and so on: the same with a value of 1, for the sum of weights. What the sum of
    Halide::Func den_inter, den_intra;  // keys needs is not computed where it does not count
    Halide::Func row;                   // (i,g,h,b): 1 / den, or scale^p over that of the unit
    Halide::Func out;                   // (e,i,g,h,b): (num_inter + num_intra) * row
    Halide::Func contribution;          // (e,f,h,b): what the chunk adds to the state
    Halide::Func keys_contribution;     // (f,h,b): and to the sum of keys
    Halide::Func state, keys_sum;       // (e,f,h,b) (f,h,b): at the end of the chunk

    Halide::RDom over_row;                           // decay_steps, decay_rest: r in [0, C)
    Halide::RDom over_element;                       // largest: d in [0, K)
    Halide::RDom over_key_element;                   // scores: d in [0, K)
    Halide::RDom over_key, over_key_weight;          // num_intra, den_intra: j in [0, C), trimmed to the causal tile
    Halide::RDom over_feature, over_feature_weight;  // num_block, den_block: f in the block
    Halide::RDom over_block;                         // num_inter, den_inter: u
    Halide::RDom over_token, over_token_weight;      // contribution, keys_contribution: j in [0, C)

    // set by the generator: what leaves the kernel, in the caller's type and layout
    Halide::Func result;               // (e,i,g,h,b)
    Halide::Func state_out, keys_out;  // (e,f,h,b) (f,h,b)
};

/// What the kernel is told at run time.
struct PowerOptions {
    Halide::Expr degree;     // looked at where sizes.degree leaves it open
    Halide::Expr normalize;  // 1: out is divided by the sum of weights; 0: multiplied by scale^p, and sums of keys are left
    Halide::Expr scale;
};

/// `key_extent` is K and `features` D, also where sizes leave them open.
PowerFuncs power(const Halide::Func &q, const Halide::Func &k, const Halide::Func &v, const Halide::Func &log_decay,
                 const Halide::Func &state_in, const Halide::Func &keys_in, const Halide::Expr &key_extent,
                 const Halide::Expr &features, const PowerOptions &options, const PowerSizes &sizes);

}  // namespace holdfast
