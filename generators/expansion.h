// phi(x) of degree p, the features of an expanded key: phi(x) . phi(y) = (x . y)^p. The algorithm only, as in chunkwise.h.
//
// Feature f is a product of p elements of x, a monomial, times the root of how often it stands in the p-th power. Which ones is
// data, a table, part of the compiled kernel where K and p are known, else made in it, in a few operations a feature, where the
// feature is then met by whole matrix products. The loops that use it are the same for every degree and order of features, dense
// along time, without padding.
#pragma once
#include "Halide.h"
#include <vector>

namespace holdfast {

constexpr int most_factors = 4;  // the highest degree

/// The monomials x[a_1] x[a_2] .. x[a_p] of a_1 <= a_2 <= .. <= a_p, that one as feature
/// f = C(a_1, 1) + C(a_2 + 1, 2) + .. + C(a_p + p - 1, p): by the last factor, then by the one before. It does not depend on K: what a
/// smaller K has are the first ones. x[K] stands for 1.
struct Expansion {
    std::vector<Halide::Func> factors;  // (f): the elements a_1, a_2, ..; where the degree is known at run time only,
    bool open;                          // most_factors of them, K in those that are left over
    Halide::Func weight;                // (f): sqrt(p! / (how often each element is there)!); 0 past the last feature
    Halide::Expr key_extent, features;  // K, D

    // For schedules, of a table that the kernel makes, once; nothing where that is compiled in.
    std::vector<Halide::Func> searched;  // the factors
    Halide::RDom over_bit;               // searched, update 0
    std::vector<Halide::Func> table() const {
        std::vector<Halide::Func> all = searched;
        if (!all.empty()) all.push_back(weight);
        return all;
    }

    /// weight(f) x[a_1] x[a_2] ..: `element(s, d)` is element d of what factor s is taken of.
    template<class Element>
    Halide::Expr product(const Halide::Expr &f, const Element &element) const {
        using namespace Halide;
        Expr result = weight(f);
        for (int s = 0; s < (int)factors.size(); s++)  // the table is data, which bounds inference cannot see through
            result = result * element(s, unsafe_promise_clamped(factors[s](f), 0, open ? key_extent : key_extent - 1));
        return result;
    }

    /// The element that factor s is, and what product(f, element) is without it: its derivative by that, for one s after the other
    /// of an RDom. Autodiff of product() would go over the features once for each factor.
    Halide::Expr element_of(const Halide::Expr &s, const Halide::Expr &f) const {
        using namespace Halide;
        Expr element = factors.back()(f);
        for (int n = (int)factors.size() - 2; n >= 0; n--) element = select(s == n, factors[n](f), element);
        return unsafe_promise_clamped(element, 0, open ? key_extent : key_extent - 1);
    }
    template<class Element>
    Halide::Expr without(const Halide::Expr &s, const Halide::Expr &f, const Element &element) const {
        using namespace Halide;
        Expr result = weight(f);
        for (int n = 0; n < (int)factors.size(); n++)
            result = result * select(s == n, 1.0f,
                                     element(unsafe_promise_clamped(factors[n](f), 0, open ? key_extent : key_extent - 1)));
        return result;
    }

    /// x to the power p, which is `run_time_degree` where that is open.
    Halide::Expr power(const Halide::Expr &x, const Halide::Expr &run_time_degree) const {
        Halide::Expr result = x;
        for (int n = 2; n <= (int)factors.size(); n++)
            result = open ? Halide::select(n <= run_time_degree, result * x, result) : result * x;
        return result;
    }
};

/// The power of two that brings the largest element of a query to 1 .. 2, so that products of p of them stay in range. Exact, and
/// gone from a quotient.
inline Halide::Expr unit_of(const Halide::Expr &largest) {
    using namespace Halide;
    const Expr in_range = clamp(largest, 0x1p-100f, 0x1p100f), exponent_bits = 0x7f800000;
    return reinterpret<float>(0x7f000000 - (reinterpret<int32_t>(in_range) & exponent_bits));
}

/// D for x of `key_elements`.
int expanded_size(int key_elements, int degree);

/// `degree` 0: that at run time, 1 .. most_factors. `features` is D.
Expansion expansion(const Halide::Expr &key_extent, const Halide::Expr &features, int degree,
                    const Halide::Expr &degree_at_run_time);

/// Between orders of the features of degree 2.
enum FeatureOrder {
    keep_order = 0,
    to_tiled_order = 1,           ///< of holdfast.h
    to_tight_order = 2,           ///< back
    gradient_to_tiled_order = 3,  ///< 2 more: of gradients, which turn by the transpose of the way back
    gradient_to_tight_order = 4
};

/// States, or sums of keys with one value feature, in another order: phi(q) . state stays the same; or gradients by them.
struct ConvertStateFuncs {
    Halide::Func converted;  // (e,f,h,b)
};
struct ConvertStateSizes {};

}  // namespace holdfast
