// The stages of sum_decays_generator.cpp.
#pragma once
#include "Halide.h"

namespace holdfast {

struct SumDecaysFuncs {
    Halide::Func of_block;  // (n,h,b): of 256 tokens
    Halide::Func of_head;   // (h): of all blocks and batch entries
    Halide::Func result;    // (h)
};
struct SumDecaysSizes {};

}  // namespace holdfast
