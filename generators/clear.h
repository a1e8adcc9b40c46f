// The stage of clear_generator.cpp.
#pragma once
#include "Halide.h"

namespace holdfast {

struct ClearFuncs {
    Halide::Func cleared;  // (x,y,h,b)
};
struct ClearSizes {};

}  // namespace holdfast
