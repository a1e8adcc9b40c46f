// The lengths, sizes and gates that every ring of tests goes through.
#pragma once
#include "array.h"

#include <cmath>
#include <limits>

namespace test {

/// Lengths at which the chunks of a sequence change, for chunks of C tokens.
inline Index lengths(int64_t C) { return {0, 1, C - 1, C, C + 1, 3 * C + 2}; }

struct Size {
    int64_t K, V;
};

/// For kernels that take any size: one element, less than a vector, a vector and one more, K < V and K > V, and an even one.
constexpr Size odd_sizes[] = {{1, 1}, {3, 1}, {5, 7}, {33, 17}, {80, 96}};

/// How a head forgets.
enum class Gates {
    none,      // not at all
    per_head,  // RetNet: log(1 - 2^-(5 + h)), the same for every token
    weak,      // per token, near 1: what is wrong far back shows
    strong,    // per token, down to e^-6
    resets,    // weak, and now and then e^-100 to e^-10, e^-1000, or nothing kept at all
};
constexpr Gates all_gates[] = {Gates::none, Gates::per_head, Gates::weak, Gates::strong, Gates::resets};
inline const char *name(Gates gates) {
    const char *names[] = {"none", "per_head", "weak", "strong", "resets"};
    return names[(int)gates];
}

/// log_decay, [B, T, H]. Gates that are the same for every token have strides of 0.
inline Array log_decays(Gates gates, int64_t B, int64_t T, int64_t H, Layout layout, Random &random) {
    const Index shape = {B, T, H};
    if (gates == Gates::none || gates == Gates::per_head) {
        Array g({1, 1, H}, {0, 0, gates == Gates::none ? 0 : strides({H}, layout, false)[0]});
        each(g.shape, [&](const Index &i) { g(i) = gates == Gates::none ? 0 : (float)std::log1p(-std::exp2(-5.0 - i[2])); });
        g.shape = shape;
        return g;
    }
    Array g(shape, strides(shape, layout, false));
    g.fill(random, gates == Gates::strong ? -6 : -1e-3, 0);
    if (gates == Gates::resets)
        each(shape, [&](const Index &i) {
            const double dice = random(0, 1);
            if (dice < 0.02)
                g(i) = -1000;
            else if (dice < 0.04)
                g(i) = -std::numeric_limits<float>::infinity();
            else if (dice < 0.06)
                g(i) = (float)random(-100, -10);
        });
    return g;
}

}  // namespace test
