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

/// e value feature, h head, t token.
struct HeadNormGateFuncs {
    Halide::Func x, gate;            // (e,h,t): inputs
    Halide::Func weight;             // (e,h): input
    Halide::Func first;              // (h,t): x of the first feature. Read before anything is written: out may lie where x does
    Halide::Func sum;                // (h,t): of x - first; layer norm
    Halide::Func centered;           // (e,h,t): x, or what the mean leaves of it
    Halide::Func squares;            // (h,t): the sum of centered^2
    Halide::Func factor;             // (h,t): 1 / sqrt(variance + eps)
    Halide::Func out;                // (e,h,t)
    Halide::RDom over_value;         // sum, squares: e in [0, V)
    Halide::Expr value_extent;       // V
    Halide::Expr layer_norm, gated;  // conditions: what a call is. The gate is not read unless it is gated

    // set by the generator
    Halide::Func result;  // (e,h,t): what leaves the kernel, in the caller's type
};

HeadNormGateFuncs head_norm_gate(const Halide::Func &x, const Halide::Func &gate, const Halide::Func &weight,
                                 const Halide::Expr &value_extent, const Halide::Expr &layer_norm, const Halide::Expr &gated,
                                 const Halide::Expr &eps);

}  // namespace holdfast
