// Rotation of pairs of features by angles that grow with the position (RoPE, the rotary half of xPos), the algorithm only: no
// target, no schedule, no layout, no types.
//
//   angle = theta_j position,   (x_0, x_1) <- (x_0 cos - x_1 sin, x_0 sin + x_1 cos)
//
// An angle in fp32 would be wrong by whole turns at large positions. So theta becomes a fraction of a turn, theta / 2 pi modulo
// 1, exactly, in 96 bits; times any position of 64 bits, modulo 1, that is integer arithmetic. Of 32 bits, since not every GPU
// API has longer integers. The phase is good to 2^-29 of a turn; cos and sin are series, good to 2e-9, in fp32: together wrong
// by 1.7e-7 at most, for every theta and position.
#pragma once
#include "Halide.h"

namespace holdfast {

struct RotateSizes {};

/// j pair of features, p which one of the pair, h head, t token, b batch entry.
struct RotateFuncs {
    Halide::Func x;         // (j,p,h,t,b): input
    Halide::Func theta;     // (j): input, finite
    Halide::Func position;  // (t,b): input, {uint32, uint32}: the lower and the upper half of a signed integer
    Halide::Func turn;      // (j): {uint32, uint32, uint32}: |theta| / 2 pi modulo 1, in 96 bits, the upper ones first
    Halide::Func phase;     // (j,t,b): uint32: |theta| position / 2 pi modulo 1, times 2^32
    Halide::Func rotation;  // (j,t,b): {cos, sin}
    Halide::Func out;       // (j,p,h,t,b)

    // set by the generator
    Halide::Func result;                   // (j,p,h,t,b): what leaves the kernel, in the caller's type
    Halide::Expr half_split, interleaved;  // pairs lie so in memory: neighbours in j side by side; both of a pair side by side
};

/// `backward`: by the opposite angles, which is the gradient with respect to x, of out = x.
RotateFuncs rotate(const Halide::Func &x, const Halide::Func &theta, const Halide::Func &position,
                   const Halide::Expr &backward);

}  // namespace holdfast
