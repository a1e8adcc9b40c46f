// Power retention in double, in plain loops: from all pairs of tokens, without phi but for states. What every kernel of a degree,
// or of normalised outputs, is compared with.
#pragma once
#include "retention.h"

namespace reference {

/// x[a_1] .. x[a_p], a_p first, times sqrt(p! / (how often each index is there)!).
struct Monomial {
    std::vector<int> elements;
    double weight;
};

/// Of a_1 <= .. <= a_p < K, a_p outermost: the features of phi.
std::vector<Monomial> monomials(int64_t K, int degree);

/// phi(x): monomials(K, degree) of the K elements of x.
std::vector<double> phi(const std::vector<double> &x, int degree);

/// Sizes of `of`: H heads of keys; those of q and out are G to each, H G in all.
struct PowerInputs {
    int64_t B, T, H, G, K, V;
    int degree;
    bool normalize;
    Strided q = {}, k = {}, v = {};                 // [B, T, H G, K], [B, T, H, K], [B, T, H, V]
    Strided log_decay = {};                         // [B, T, H]
    Strided initial_state = {}, initial_keys = {};  // [B, H, D, V], [B, H, D]
    double scale = 1;
    bool states = true;  // there is an initial one, and the final one is wanted
};

struct PowerResult {
    int64_t D;
    std::vector<double> out, state, keys;  // row-major [B, T, H G, V], [B, H, D, V], [B, H, D]
    // Of each element: what rounding errors are measured by. The root of the sum of the squares of what its terms are sensitive
    // to; a weight (q.k)^p is a sum of products of spread s, to the power p: it changes by p s |q.k|^(p-1). And half of its own
    // size: where all terms have one sign, partial sums are as large as it is.
    std::vector<double> out_spread, state_spread, keys_spread;
};

///   S = exp(g) S + phi(k)^T v,   s = exp(g) s + phi(k),   out = phi(q) S / phi(q) s, or scale^p phi(q) S
PowerResult power(const PowerInputs &in);

}  // namespace reference
