// The table of expansion.h.
#include "expansion.h"

#include <cstdint>
#include <string>

using namespace Halide;

namespace holdfast {
namespace {

/// a (a + 1) .. (a + p - 1): p! times the number of monomials of degree p in elements below a.
Expr rising(const Expr &a, int p) {
    Expr product = a;
    for (int n = 1; n < p; n++) product = product * (a + n);
    return product;
}
int factorial(int p) { return p < 2 ? 1 : p * factorial(p - 1); }

/// rising(a, p) / p!, which is whole. By 3 with its inverse of 32 bits: Halide would divide in 64, which not all GPUs have.
Expr monomials_below(const Expr &a, int p) {
    Expr count = cast<uint32_t>(rising(a, p));
    if (p == 2 || p == 3) count = count >> 1;
    if (p == 4) count = count >> 3;
    if (p > 2) count = count * Expr((uint32_t)0xaaaaaaab);
    return cast<int32_t>(count);
}

/// The same list with its first `size` entries evaluated now.
template<class T>
Func compiled_in(const Func &list, int size) {
    const Buffer<T> entries = Func(list).realize({size});
    Func same(list.name() + "_compiled_in");
    same(list.args()) = entries(list.args()[0]);
    return same;
}

}  // namespace

int expanded_size(int key_elements, int degree) {
    int64_t size = 1;
    for (int n = 1; n <= degree; n++) size = size * (key_elements + n - 1) / n;
    return (int)size;
}

Expansion expansion(const Expr &key_extent, const Expr &features, int degree, const Expr &degree_at_run_time) {
    Var f("f");
    Expansion e;
    e.open = degree == 0;
    e.key_extent = key_extent, e.features = features;
    const int most = degree ? degree : most_factors;
    const Expr p = degree ? Expr(degree) : degree_at_run_time;

    // The last factor a_p is the largest with C(a_p + p - 1, p) <= f, found bit by bit; what is left of f says the one before.
    const Expr bits = max(32 - cast<int32_t>(count_leading_zeros(cast<uint32_t>(key_extent - 1))), 1);
    e.over_bit = RDom(0, Internal::simplify(bits), "over_bit");
    e.factors.resize(most);
    Expr left = clamp(f, 0, features - 1);
    for (int s = most; s >= 1; s--) {
        const Expr there = e.open ? s <= p : Internal::const_true();
        Func factor("factor_" + std::to_string(s));
        factor(f) = select(there, 0, key_extent);
        const Expr next = factor(f) + (1 << (bits - 1 - e.over_bit));
        const Expr within = min(next, key_extent - 1);  // so that nothing overflows
        factor(f) = select(there && next < key_extent && rising(within, s) <= factorial(s) * left, next, factor(f));
        left = left - select(there, monomials_below(factor(f), s), 0);
        e.factors[s - 1] = factor;
    }
    Expr run = 1, orders = 1.0f;
    for (int n = 1; n < most; n++) {
        run = select(e.factors[n](f) == e.factors[n - 1](f), run + 1, 1);
        const Expr factor = (float)(n + 1) / cast<float>(run);
        orders = orders * (e.open ? select(n < p, factor, 1.0f) : factor);
    }
    e.weight = Func("weight");
    e.weight(f) = select(f < features, sqrt(orders), 0.0f);
    if (e.open || !Internal::is_const(key_extent)) {
        e.searched = e.factors;
        return e;
    }
    constexpr int most_behind = 256;  // of features that the last block of a schedule holds past the last one
    const int size = expanded_size((int)*as_const_int(key_extent), degree) + most_behind;
    for (Func &factor : e.factors) factor = compiled_in<int32_t>(factor, size);
    e.weight = compiled_in<float>(e.weight, size);
    return e;
}

}  // namespace holdfast
