// What autodiff derived, by name. For a stage that it finds no way to, Halide has an undefined Func, or one that is zero: a gradient
// that misses a term, in silence. Here both end the build of the generator.
#pragma once
#include <Halide.h>

#include <string>

namespace holdfast {

/// The adjoint of a stage, or of one of its updates, which is called `name`.
inline Halide::Func adjoint_of(const Halide::Derivative &derivative, const std::string &name, const Halide::Func &stage,
                               int update = -1) {
    Halide::Func adjoint = derivative(stage, update);
    const bool there =
        adjoint.defined() && (adjoint.has_update_definition() || !Halide::Internal::is_const_zero(adjoint.value()));
    _halide_user_assert(there) << "autodiff has no adjoint of " << name << "\n";
    return adjoint;
}

}  // namespace holdfast
