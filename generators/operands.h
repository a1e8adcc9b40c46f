// What matrix products read, where that is less than fp32: the operands of tensor cores. It is part of what is computed, the
// same on every target; sums stay in fp32.
#pragma once
#include "dtypes.h"
#include <vector>

namespace holdfast {

/// Makes the products in `users`, each an update f += a * b, read the fp32 Func `f` as the sum of `parts` numbers of `dtype`:
/// the rounded value; then, rounded as well, what that left out. One part is wrong by 2^-11 of the value in fp16, by 2^-8 in
/// bf16, at most; two by the square of that. fp16 ends at 65504, beyond is infinity. Returns the parts, for schedules to store;
/// for f32 nothing changes and none is returned. Call it after adjoints have been derived: autodiff through a cast to 16 bits
/// would add up in 16 bits.
inline std::vector<Halide::Func> round_operand(const Halide::Func &f, const std::vector<Halide::Func> &users, Dtype dtype,
                                               int parts = 1) {
    using namespace Halide;
    if (dtype == Dtype::f32) return {};
    const Type type = dtype == Dtype::f16 ? Type(Float(16)) : Type(BFloat(16));
    std::vector<Func> rounded;
    Expr left = f(f.args());
    for (int part = 0; part < parts; part++) {
        Func r(f.name() + "_part_" + std::to_string(part));
        r(f.args()) = cast(type, left);
        left = left - cast<float>(r(f.args()));
        rounded.push_back(r);
    }
    struct Replace : Internal::IRMutator {
        const std::string name;
        const std::vector<Func> parts;
        Replace(const std::string &name, const std::vector<Func> &parts) : name(name), parts(parts) {}
        using IRMutator::visit;
        Expr visit(const Internal::Call *op) override {
            if (op->call_type != Internal::Call::Halide || op->name != name) return IRMutator::visit(op);
            Expr sum;
            for (const Func &part : parts) {
                Expr value = cast<float>(part(op->args));
                sum = sum.defined() ? sum + value : value;
            }
            return sum;
        }
    } replace(f.name(), rounded);
    for (Func user : users) user.function().mutate(&replace);
    return rounded;
}

}  // namespace holdfast
