// One token of power retention, the algorithm only: no target, no schedule, no layout.
//
//   w = (q . k)^p,   o = (exp(g) phi(q) S + w v) / (exp(g) phi(q) s + w), or scale^p times what is divided there
//   S <- exp(g) S + phi(k)^T v,   s <- exp(g) s + phi(k)
//
// Outputs read the state before the token: of its own key and value (q . k)^p is a small rest of many large features' products, which
// must not be taken from their sum. In one pass over S, block by block of features: each has a sum of its own, or the sum over all D
// of them would lose digits. Of queries that share a state, that pass serves the last; the others read it before.
#pragma once
#include "Halide.h"
#include "expansion.h"

namespace holdfast {

struct PowerStepSizes {
    int degree;      // p; 0: known at run time only
    int key, value;  // K, V; 0: any, known at run time only
};

/// h head of keys, g query head of its group, d key element, f feature, w feature in its block u, e value feature.
struct PowerStepFuncs {
    Halide::Func q, k, v;        // (d,g,h) (d,h) (e,h): inputs
    Halide::Func log_decay;      // (h): input
    Expansion phi;               // the table
    Halide::Func decay;          // (h): exp(log_decay), a sum of two
    Halide::Func largest, unit;  // (g,h): as in power.h, and so is
    Halide::Func queries;        // (d,g,h): q * unit. Schedules store it
    Halide::Func phi_q, phi_k;   // (f,g,h) (f,h)
    Halide::Func score;          // (g,h): queries . k
    // (e,w,g,u,h): {state, sum}, the state the same for all g, the sum for all w. Both updates go down the rows w of a block, with the sum
    // of its part of the product until there: 0 for other queries, over_others, 1 for the last one, over_feature, with the state in
    // place.
    Halide::Func state_and_sum;
    Halide::Func num;             // (e,g,h): phi_q . state before the token
    Halide::Func keys;            // (f,h): {the sum of keys, what it was}. Update 0 is in place
    Halide::Func den_block, den;  // (g,u,h) (g,h): phi_q . keys before the token
    Halide::Func out;             // (e,g,h)

    Halide::RDom over_element;                   // largest: d in [0, K)
    Halide::RDom over_key_element;               // score: d
    Halide::RDom over_others;                    // state_and_sum: w in the block, in that order, and g
    Halide::RDom over_feature;                   // state_and_sum: w
    Halide::RDom over_feature_weight;            // den_block: w
    Halide::RDom over_block, over_block_weight;  // num, den: u

    // set by the generator: what leaves the kernel, in the caller's type
    Halide::Func result;  // (e,g,h)
};

struct PowerStepOptions {
    Halide::Expr degree, normalize, scale;  // as PowerOptions
    Halide::Expr block, blocks;             // D is the product of both
    Halide::Expr group;                     // queries that share a state
};

PowerStepFuncs power_step(const Halide::Func &q, const Halide::Func &k, const Halide::Func &v, const Halide::Func &log_decay,
                          const Halide::Expr &key_extent, const PowerStepOptions &options, const PowerStepSizes &sizes);

}  // namespace holdfast
