// The gradient of head_norm_gate.h with respect to x, gate and weight, the algorithm only: no target, no schedule, no layout, no
// types. Autodiff derives it from the stages of head_norm_gate() itself, which are computed again. By hand are only the two ends of
// the chain that it cannot reach: swish_slope(), and
//
//   dx = dcentered   RMS norm: x is centered
//   dx = ddistance   layer norm: x goes through its distances to the first element, and any other point to measure them from
//                    would give the same. So that point counts as a constant, and a distance grows as x does.
#pragma once
#include "head_norm_gate.h"

namespace holdfast {

struct HeadNormGateBackwardSizes {};

/// e value feature, h head, t token, b batch entry. What begins with d is the gradient of the stage, or input, of the rest of its name.
struct HeadNormGateBackwardFuncs {
    HeadNormGateFuncs forward;  // its stages, and inputs
    Halide::Func dout;          // (e,h,t,b): input
    Halide::Func dnormed;       // (e,h,t,b): dout swish, or dout
    Halide::Func through_gate;  // (e,h,t,b): {dnormed, the slope of swish}: of one exponential
    Halide::Func dfactor;       // (h,t,b): a sum over e
    Halide::Func dsquares;      // (h,t,b)
    Halide::Func dcentered;     // (e,h,t,b)
    Halide::Func dsum;          // (h,t,b): a sum over e; layer norm
    Halide::Func ddistance;     // (e,h,t,b): layer norm
    Halide::Func dswish;        // (e,h,t,b)
    Halide::Func dweight;       // (e,h): a sum over t and b
    Halide::Func dx, dgate;     // (e,h,t,b)
    Halide::RDom over_tokens;   // dweight: all t and b, or none

    // Set by the generator: what leaves the kernel, in the callers' types. Each in updates over an RDom, which is empty where the
    // gradient is not wanted: what only it needs is then not computed. result_dweight has two: where sums begin, and of the heads of w.
    Halide::Func result_dx, result_dgate;  // (e,h,t,b)
    Halide::Func result_dweight;           // (e,w)
    Halide::RDom want_dx, want_dgate, want_dweight, over_heads;
};

/// Of tokens t in [0, token_extent) and batch entries b in [0, batch_extent). A stage without a gradient fails the build.
HeadNormGateBackwardFuncs head_norm_gate_backward(const Halide::Func &x, const Halide::Func &gate, const Halide::Func &weight,
                                                  const Halide::Func &dout, const Halide::Expr &value_extent,
                                                  const Halide::Expr &head_extent, const Halide::Expr &token_extent,
                                                  const Halide::Expr &batch_extent, const Halide::Expr &layer_norm,
                                                  const Halide::Expr &gated, const Halide::Expr &weighted,
                                                  const Halide::Expr &eps, const Halide::Expr &want_dweight);

}  // namespace holdfast
