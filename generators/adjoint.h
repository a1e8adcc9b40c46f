// Around autodiff: what it shall not look behind, what it derived, by name, and without its guards.
#pragma once
#include <Halide.h>

#include <string>
#include <vector>

namespace holdfast {

/// Stands for `f` where autodiff shall not look behind it.
inline Halide::Func hole_for(const Halide::Func &f) {
    Halide::Func hole(f.name() + "_hole");
    hole(f.args()) = 0.0f;
    return hole;
}

/// Calls of `from` in what `roots` depend on become calls of `to`; but not its own, of itself.
inline void replace(const std::vector<Halide::Func> &roots, const Halide::Func &from, const Halide::Func &to) {
    for (const Halide::Func &root : roots)
        for (auto &called : Halide::Internal::find_transitive_calls(root.function()))
            if (called.first != from.name()) called.second.substitute_calls(from.function(), to.function());
}

/// The adjoint of a stage, or of one of its updates, which is called `name`. For a stage that it finds no way to, Halide has an
/// undefined Func, or one that is zero: a gradient that misses a term, in silence. Here both end the build of the generator.
inline Halide::Func adjoint_of(const Halide::Derivative &derivative, const std::string &name, const Halide::Func &stage,
                               int update = -1) {
    Halide::Func adjoint = derivative(stage, update);
    const bool there =
        adjoint.defined() && (adjoint.has_update_definition() || !Halide::Internal::is_const_zero(adjoint.value()));
    _halide_user_assert(there) << "autodiff has no adjoint of " << name << "\n";
    return adjoint;
}

/// Takes away the clamps and selects that autodiff puts around every access, by the bounds that it found for it: for kernels in which
/// nothing leaves them.
class Unguard : public Halide::Internal::IRMutator {
protected:
    using IRMutator::visit;

    Halide::Expr visit(const Halide::Internal::Max *op) override {
        using namespace Halide::Internal;
        const auto *upper = op->a.as<Min>();
        if (!upper || !is_const_zero(op->b)) return IRMutator::visit(op);
        for (Halide::Expr x : {upper->a, upper->b}) {
            if (const auto *likely = Call::as_intrinsic(x, {Call::likely})) x = likely->args[0];
            if (is_index(x)) return x;
        }
        return IRMutator::visit(op);
    }
    Halide::Expr visit(const Halide::Internal::Select *op) override {
        const bool guard = Halide::Internal::is_const_zero(op->false_value) && compares(op->condition);
        return guard ? mutate(op->true_value) : IRMutator::visit(op);
    }

private:
    static bool is_index(const Halide::Expr &x) {
        const auto *variable = x.as<Halide::Internal::Variable>();
        return variable && !variable->param.defined();
    }
    static bool compares(const Halide::Expr &x) {
        const auto *both = x.as<Halide::Internal::And>();
        return both ? compares(both->a) && compares(both->b) : x.as<Halide::Internal::LE>() || x.as<Halide::Internal::LT>();
    }
};

}  // namespace holdfast
