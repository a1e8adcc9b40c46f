// Types of q, k, v and out. Everything else is fp32: a kernel's first Funcs widen what it reads, its last one rounds once.
//
// bf16 lies in buffers of uint16: Halide's own bfloat type is wrong or refused on its GPU back ends. The shifts below are the
// same numbers on every target.
#pragma once
#include "Halide.h"

#include <map>
#include <string>

namespace holdfast {

enum class Dtype { f32, f16, bf16 };

/// Values of the generator parameter `dtype`, as in cmake/kernels.cmake.
inline std::map<std::string, Dtype> dtype_names() { return {{"f32", Dtype::f32}, {"f16", Dtype::f16}, {"bf16", Dtype::bf16}}; }

/// Element type of a kernel's buffers.
inline Halide::Type stored_type(Dtype dtype) {
    return dtype == Dtype::f32 ? Halide::Float(32) : dtype == Dtype::f16 ? Halide::Float(16) : Halide::UInt(16);
}

/// The number, exactly, in fp32 that `stored` stands for.
inline Halide::Expr widen(Dtype dtype, const Halide::Expr &stored) {
    using namespace Halide;
    if (dtype != Dtype::bf16) return cast<float>(stored);
    return reinterpret<float>(cast<uint32_t>(stored) << 16);  // bf16 is the upper half of an fp32
}

/// The fp32 `x` rounded to the nearest number of the type, to the even one of two that are as near; infinity beyond the
/// largest. Infinities stay what they are and NaN stays NaN.
inline Halide::Expr narrow(Dtype dtype, const Halide::Expr &x) {
    using namespace Halide;
    if (dtype == Dtype::f32) return x;
    const auto constant = [](uint32_t bits) { return Expr(bits); };
    // Rounding up would carry a NaN of bf16 into infinity, and Halide's fp16 without hardware for it makes all NaN infinite:
    // compilers take what has been computed for numbers. The comparison is one of integers, which they leave alone.
    Expr bits = reinterpret<uint32_t>(x), nan = (bits & constant(0x7fffffff)) > constant(0x7f800000);
    if (dtype == Dtype::f16)
        return reinterpret<float16_t>(select(nan, cast<uint16_t>(0x7e00), reinterpret<uint16_t>(cast<float16_t>(x))));
    Expr rounded = bits + constant(0x7fff) + ((bits >> 16) & constant(1)), quiet = bits | constant(0x400000);
    return cast<uint16_t>(select(nan, quiet, rounded) >> 16);  // chosen before there are two to make short
}

}  // namespace holdfast
