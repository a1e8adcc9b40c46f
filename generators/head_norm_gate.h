// The norm of each head's outputs and the gate after it, the algorithm only: no target, no schedule, no layout, no types.
//
//   out = (x - mean) / sqrt(variance + eps) * weight * gate / (1 + exp(-gate))
//
// RMS norm: mean = 0 and variance that of the squares, sum x^2 / V. Layer norm: both of the row. The variance is that of what is
// left after the mean, so that nothing cancels; and the mean is taken of the distances to the first element, because the mean
// of numbers far from 0 would be rounded by more than they differ.
#pragma once
#include "Halide.h"

namespace holdfast {

struct HeadNormGateSizes {};

/// e value feature, h head, t token, b batch entry.
struct HeadNormGateFuncs {
    Halide::Func x, gate;        // (e,h,t,b): inputs
    Halide::Func weight;         // (e,h): input
    Halide::Func weight_or_one;  // (e,h). Update 0: the weight, where there is one; else it is not read
    Halide::Func first;          // (h,t,b): x of the first feature. Read before anything is written: out may lie where x does
    Halide::Func distance;       // (e,h,t,b): x - first, but for its last bit
    Halide::Func sum;            // (h,t,b): of distances; layer norm
    Halide::Func centered;       // (e,h,t,b): x, or what the mean leaves of it
    Halide::Func squares;        // (h,t,b): the sum of centered^2
    Halide::Func factor;         // (h,t,b): 1 / sqrt(variance + eps)
    Halide::Func normed;         // (e,h,t,b): centered factor weight_or_one
    Halide::Func power;          // (e,h,t,b): exp(-gate)
    Halide::Func sigmoid;        // (e,h,t,b): 1 / (1 + power)
    Halide::Func swish;          // (e,h,t,b): gate sigmoid
    Halide::Func out;            // (e,h,t,b)
    Halide::RDom over_value;     // sum, squares: e in [0, V)
    Halide::RDom over_weight;    // weight_or_one: once, or not at all
    Halide::Expr value_extent;   // V
    Halide::Expr layer_norm, gated;  // conditions: what a call is. The gate is not read unless it is gated

    // set by the generator
    Halide::Func result;  // (e,h,t,b): what leaves the kernel, in the caller's type
};

HeadNormGateFuncs head_norm_gate(const Halide::Func &x, const Halide::Func &gate, const Halide::Func &weight,
                                 const Halide::Expr &value_extent, const Halide::Expr &layer_norm, const Halide::Expr &gated,
                                 const Halide::Expr &weighted, const Halide::Expr &eps);

/// The derivative of swish, of a gate, its power and its sigmoid. By hand, because autodiff would square 1 + power, which fp32 cannot
/// hold for gates below -44.
Halide::Expr swish_slope(const Halide::Expr &gate, const Halide::Expr &power, const Halide::Expr &sigmoid);

}  // namespace holdfast
