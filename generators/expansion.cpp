// The table of expansion.h.
#include "expansion.h"

#include <cstdint>
#include <vector>

using namespace Halide;
using Halide::Internal::simplify;

namespace holdfast {
namespace {

/// C(n + k - 1, k): sorted lists of k numbers below n. Each quotient is whole.
Expr sorted_lists(const Expr &n, int k) {
    Expr product = n;
    for (int m = 2; m <= k; m++) product = product * (n + (m - 1));
    int factorial = 1;
    for (int m = 2; m <= k; m++) factorial *= m;
    return product / factorial;
}

}  // namespace

int expanded_size(int key_elements, int degree) {
    int64_t size = 1;
    for (int n = 1; n <= degree; n++) size = size * (key_elements + n - 1) / n;
    return (int)size;
}

Expansion expansion(const Expr &key_extent, const Expr &features, int degree, const Expr &degree_at_run_time) {
    Var s("s"), f("f");
    Expansion e;
    e.open = degree == 0;
    e.factors = degree ? degree : most_factors;
    e.key_extent = key_extent;
    e.features = features;
    const Expr p = degree ? Expr(degree) : degree_at_run_time;

    // Loops over a_1 <= .. <= a_p, a_p outermost. A factor that there is not stays at 0, and neither moves nor weighs.
    Region extents;
    for (int n = 0; n < e.factors; n++) extents.emplace_back(0, simplify(select(n < p, key_extent, 1)));
    e.over_list = RDom(extents, "over_list");
    std::vector<Expr> index;
    Expr at = 0, run = 1, orders = 1;
    for (int n = 0; n < e.factors; n++) {
        const Expr a = e.over_list[n], there = simplify(n < p);
        index.push_back(select(there, a, key_extent));
        at += select(there, sorted_lists(a, n + 1), 0);
        if (n == 0) continue;
        e.over_list.where(!there || e.over_list[n - 1] <= a);
        run = select(e.over_list[n - 1] == a, run + 1, 1);
        orders = orders * select(there, (n + 1) / cast<float>(run), 1.0f);
    }
    at = unsafe_promise_clamped(simplify(at), 0, e.features - 1);
    e.index = Func("index"), e.weight = Func("weight");
    e.index(s, f) = 0;
    e.index(s, at) = mux(s, index);
    e.weight(f) = 0.0f;
    e.weight(at) = sqrt(orders);
    return e;
}

}  // namespace holdfast
