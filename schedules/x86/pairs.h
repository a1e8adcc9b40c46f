// Operands of x86's products of bf16: vdpbf16ps and tdpbf16ps add up the terms of a sum two at a time, and want both of a pair
// side by side in memory. These functions change what products read and how they are cut up, not what they compute.
#pragma once
#include "Halide.h"
#include "transpose.h"

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

/// Cuts sums of `f` off at pairs: where the domain of `over` ends at r < end, or begins at r >= first, an even number, both terms
/// of a pair are in, or neither.
inline void cut_at_pairs(Halide::Func f, const Halide::RVar &over) {
    using namespace Halide;
    struct WholePairs : Internal::IRMutator {
        const std::string name;
        explicit WholePairs(const std::string &name) : name(name) {}
        using IRMutator::visit;
        bool is_term(const Expr &e) const {
            const auto *r = e.as<Internal::Variable>();
            return r && r->name == name;
        }
        Expr visit(const Internal::LT *op) override { return is_term(op->a) ? op->a / 2 * 2 < op->b : IRMutator::visit(op); }
        Expr visit(const Internal::GE *op) override { return is_term(op->a) ? op->a / 2 * 2 >= op->b : IRMutator::visit(op); }
    } whole_pairs(over.name());
    f.function().mutate(&whole_pairs);
}

/// The numbers that lie in a Func of 16 bits.
inline Halide::Func as_bf16(const Halide::Func &stored) {
    using namespace Halide;
    Func bits(stored.name() + "_bf16");
    bits(stored.args()) = reinterpret(BFloat(16), stored(stored.args()));
    return bits;
}

/// Halide 21 makes a cast to bf16 six operations on integers; this is its name for the instruction, which takes two vectors.
/// Denormals become zeros, as they are to vdpbf16ps.
inline Halide::Expr rounded(const Halide::Expr &x) {
    return Halide::Internal::Call::make(Halide::UInt(16), "vcvtne2ps2bf16", {x}, Halide::Internal::Call::PureExtern);
}
inline void round_in_hardware(Halide::Func part) {
    using namespace Halide;
    struct Round : Internal::IRMutator {
        using IRMutator::visit;
        Expr visit(const Internal::Cast *op) override {
            return op->type.is_bfloat() ? reinterpret(BFloat(16), rounded(op->value)) : IRMutator::visit(op);
        }
    } round;
    part.function().mutate(&round);
}

/// Two rows become one of pairs, in registers, `width` elements of each at a time.
inline void interleave(Halide::Func pairs, const Halide::LoopLevel &at, int width) {
    const std::vector<Halide::Var> args = pairs.args();
    pairs.compute_at(at).bound_extent(args[0], 2).reorder(args[0], args[1]);
    pairs.vectorize(args[1], width).unroll(args[1]).unroll(args[0]);
}

/// The Func `rows` of (x, y, ...), of 16 bits, for a product that sums along x and reads it along y: pairs of elements as columns,
/// in blocks of `vec` pairs and `vec` rows. A pair is a word of 32 bits on the way.
class PairColumns {
    const int vec;
    Transposed words;
    Halide::Func pairs;  // (two, position in the line, block along x, block along y, ...)

    static Halide::Func words_of(const Halide::Func &rows) {
        using namespace Halide;
        Func words(rows.name() + "_words");
        const std::vector<Var> args = rows.args();
        auto half = [&](int n) {
            std::vector<Expr> at(args.begin(), args.end());
            at[0] = 2 * args[0] + n;
            return cast<uint32_t>(reinterpret(UInt(16), rows(at)));
        };
        words(args) = half(0) | half(1) << 16;
        return words;
    }

public:
    PairColumns(const Halide::Func &rows, int vec)
        : vec(vec), words(words_of(rows), vec), pairs(rows.name() + "_pair_columns") {
        using namespace Halide;
        std::vector<Var> args = words.lines().args();
        const Expr column = words.lines()(std::vector<Expr>(args.begin(), args.end()));
        args.insert(args.begin(), Var("two"));
        pairs(args) = reinterpret(BFloat(16), cast<uint16_t>(column >> (16 * args[0])));
    }
    /// The element that is rows at `args`.
    Halide::Expr operator()(std::vector<Halide::Expr> args) const {
        using namespace Halide;
        const Expr pair = args[0] / 2, two = args[0] % 2, place = words.in_line(pair, args[1]);
        args[0] = pair / vec, args[1] = args[1] / vec;
        args.insert(args.begin(), {two, place});
        return pairs(args);
    }
    void compute_at(const Halide::LoopLevel &at) {
        using namespace Halide;
        const Var two = pairs.args()[0], n = pairs.args()[1], block = pairs.args()[2];
        words.compute_at({pairs, block}, {pairs, block});
        pairs.compute_at(at).bound_extent(two, 2).bound_extent(n, vec * vec).reorder(two, n);
        pairs.vectorize(n, vec).unroll(n).unroll(two);
    }
};

}  // namespace holdfast::x86
