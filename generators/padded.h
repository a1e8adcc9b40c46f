// Rows and states of the caller, zero past the last feature: schedules may round sizes up.
#pragma once
#include "Halide.h"

namespace holdfast {

/// Rows (x, t, ..), of which x has `size`.
template<class Rows>
Halide::Func padded_rows(Rows &rows, const Halide::Expr &size) {
    Halide::Region region(rows.dimensions());
    region[0] = {0, size};
    return Halide::BoundaryConditions::constant_exterior(rows, Halide::cast(rows.type(), 0), region);
}

/// States (e, d, s, h, b).
template<class States>
Halide::Func padded_states(States &states, const Halide::Expr &D, const Halide::Expr &E) {
    return Halide::BoundaryConditions::constant_exterior(states, 0.0f, {{0, E}, {0, D}, {}, {}, {}});
}

}  // namespace holdfast
