// Operands of x86's products of bf16: vdpbf16ps and tdpbf16ps add up the terms of a sum two at a time, and want both of a pair
// side by side in memory. These functions change what products read and how they are cut up, not what they compute.
#pragma once
#include "Halide.h"

#include <functional>
#include <string>
#include <vector>

namespace holdfast::x86 {

using Replacement = std::function<Halide::Expr(std::vector<Halide::Expr>)>;

struct ReplaceCalls : Halide::Internal::IRMutator {
    const std::string name;
    const Replacement &replacement;
    ReplaceCalls(const std::string &name, const Replacement &r) : name(name), replacement(r) {}
    using IRMutator::visit;
    Halide::Expr visit(const Halide::Internal::Call *op) override {
        if (op->call_type != Halide::Internal::Call::Halide || op->name != name) return IRMutator::visit(op);
        return replacement(op->args);
    }
};

/// `e`, or what `user` is defined as, with replacement(arguments) wherever it reads f(arguments).
inline Halide::Expr replace_calls(const Halide::Expr &e, const Halide::Func &f, const Replacement &replacement) {
    return ReplaceCalls(f.name(), replacement).mutate(e);
}
inline void replace_calls(Halide::Func user, const Halide::Func &f, const Replacement &replacement) {
    ReplaceCalls replace(f.name(), replacement);
    user.function().mutate(&replace);
}

/// The Func `f` of (x, y, ...), a pair at a time along its argument `axis`, 0 or 1: (two, the other of x and y, pair, ...)
/// holds f at 2 pair + two.
inline Halide::Func pairs_of(const Halide::Func &f, int axis) {
    using namespace Halide;
    Var two("two"), pair("pair");
    std::vector<Var> args = f.args();
    std::vector<Expr> at(args.begin(), args.end());
    at[axis] = 2 * pair + two;
    args.erase(args.begin() + axis), args.insert(args.begin(), two), args.insert(args.begin() + 2, pair);
    Func pairs(f.name() + "_pairs");
    pairs(args) = f(at);
    return pairs;
}

/// The element of pairs_of(f, axis) that is f at `args`.
inline Halide::Expr in_pairs(const Halide::Func &pairs, int axis, std::vector<Halide::Expr> args) {
    using namespace Halide;
    const Expr at = args[axis];
    args.erase(args.begin() + axis), args.insert(args.begin(), at % 2), args.insert(args.begin() + 2, at / 2);
    return pairs(args);
}

/// The product f += (a0 + a1 + ...) * b as one that adds up a0 * b, a1 * b, ... in updates of their own, where an are reads of
/// `parts`; for `user`, which reads f.
inline Halide::Func sum_of_parts(const Halide::Func &f, const std::vector<Halide::Func> &parts, Halide::Func user) {
    using namespace Halide;
    struct OnePart : Internal::IRMutator {  // a simplifier would commute factors
        const std::vector<Func> &parts;
        const std::string name;
        OnePart(const std::vector<Func> &parts, const std::string &name) : parts(parts), name(name) {}
        using IRMutator::visit;
        Expr visit(const Internal::Cast *op) override {
            const auto *read = op->value.as<Internal::Call>();
            for (const Func &other : parts)
                if (read && read->name == other.name() && read->name != name) return 0.0f;
            return op;
        }
        Expr visit(const Internal::Add *op) override {
            const Expr a = mutate(op->a), b = mutate(op->b);
            return Internal::is_const_zero(a) ? b : Internal::is_const_zero(b) ? a : a + b;
        }
    };
    Func sum(f.name() + "_of_parts");
    const std::vector<Var> args = f.args();
    sum(args) = 0.0f;
    for (const Func &part : parts)
        sum(args) = replace_calls(OnePart(parts, part.name()).mutate(f.update_value()), f, [&](auto at) { return sum(at); });
    replace_calls(user, f, [&](auto at) { return sum(at); });
    return sum;
}

/// Cuts the sum of `f` off at pairs: where its domain `over` ends at r < end, an even number, both terms of a pair are in, or
/// neither.
inline void end_at_pairs(Halide::Func f, const Halide::RDom &over) {
    using namespace Halide;
    struct WholePairs : Internal::IRMutator {
        const std::string name;
        explicit WholePairs(const std::string &name) : name(name) {}
        using IRMutator::visit;
        Expr visit(const Internal::LT *op) override {
            const auto *r = op->a.as<Internal::Variable>();
            return r && r->name == name ? op->a / 2 * 2 < op->b : IRMutator::visit(op);
        }
    } whole_pairs(over.x.name());
    f.function().mutate(&whole_pairs);
}

}  // namespace holdfast::x86
