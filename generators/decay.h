// Sums of log decays, and exp() of one for the stages that multiply a state by it again and again.
#pragma once
#include "Halide.h"

namespace holdfast {

/// exp() of anything below is 0 in fp32, so clamping there changes nothing; it lets -infinity in, and 256 of them fit int32.
constexpr float least_log_decay = -120.0f;

// Log decays are summed in two parts. Differences of one fp32 sum would lose what small decays add after a large one (a
// reset in the middle of a chunk); whole steps of 2^-16 add without error in int32, and what is left is below 2^-17 each.
// Integers, because no compiler may reorder them into the one sum.
constexpr float decay_step = 1.0f / 65536;

inline Halide::Expr decay_steps_of(const Halide::Expr &log_decay) {
    return Halide::cast<int32_t>(Halide::round(Halide::max(log_decay, least_log_decay) / decay_step));
}
inline Halide::Expr decay_rest_of(const Halide::Expr &log_decay) {
    return Halide::max(log_decay, least_log_decay) - Halide::cast<float>(decay_steps_of(log_decay)) * decay_step;
}
/// The sum that these are the parts of.
inline Halide::Expr log_decay_of(const Halide::Expr &steps, const Halide::Expr &rest) {
    return Halide::cast<float>(steps) * decay_step + rest;
}

/// exp() of it. The rest is a factor of its own, good to 1e-9 for those of 256 tokens: next to steps that add up to less than -32
/// it would be rounded, and with it the result by 2e-6 and more.
inline Halide::Expr decay_of(const Halide::Expr &steps, const Halide::Expr &rest) {
    // exp() stands here once: of one that stands twice Halide 21 loses the select() around it, where it cuts a loop for a vector's tail.
    return exp(Halide::cast<float>(steps) * decay_step) * (1.0f + rest * (1.0f + 0.5f * rest));
}

/// exp(x), x <= 0, as a sum of two: 1, and what is missing to it. A long sequence multiplies its state by the same decay again
/// and again, and the same rounding each time adds up: to 1e-4 over the 4096 tokens that RetNet's slowest head remembers. Far from
/// 1 the state forgets faster than that: there the sum is exp(x) as given, rounded, and 0.
inline Halide::Tuple two_part_exp(const Halide::Expr &x, const Halide::Expr &far_from_1) {
    using namespace Halide;
    const Expr near = abs(x) < 0.35f;  // above 0, which a GPU is not kept from, too
    Expr series = 1.0f;                // (exp(x) - 1) / x, to 1e-9
    for (int n = 8; n >= 2; n--) series = 1.0f + x / (float)n * series;
    return Tuple(select(near, 1.0f, far_from_1), select(near, x * series, 0.0f));
}

/// The same of steps and rest, and of one log decay.
inline Halide::Tuple two_part_decay_of(const Halide::Expr &steps, const Halide::Expr &rest) {
    return two_part_exp(log_decay_of(steps, rest), decay_of(steps, rest));
}
inline Halide::Tuple two_part_decay_of(const Halide::Expr &log_decay) {
    const Halide::Expr x = max(log_decay, least_log_decay);
    return two_part_exp(x, exp(x));
}

/// The same sum, of which the first is all of it, rounded, and the other what that left out: for a state that is multiplied by
/// the first alone, and by the other now and then. Through an integer, because no compiler may reorder those.
inline Halide::Tuple rounded_first(const Halide::Tuple &decay) {
    using namespace Halide;
    const float unit = 1 << 24;
    const Expr near = decay[1] < 0.0f, rounded = cast<int32_t>(round((decay[0] + decay[1]) * unit));
    const Expr rest = decay[1] - cast<float>(rounded - (1 << 24)) / unit;
    return Tuple(select(near, cast<float>(rounded) / unit, decay[0]), select(near, rest, 0.0f));
}

/// decay * state + added, with a decay of two_part_exp. What is small is summed first: next to the large product it would be
/// rounded away. That product is the state itself where it matters, so that all is rounded once, with or without fused
/// multiply-add. Compilers that reorder sums, or make decay[0] + decay[1] one again, stop at the operation on integers, which
/// costs half a rounding of what is small.
inline Halide::Expr decayed(const Halide::Tuple &decay, const Halide::Expr &state, const Halide::Expr &added) {
    using namespace Halide;
    const Expr small = decay[1] * state + added;
    return decay[0] * state + reinterpret<float>(reinterpret<int32_t>(small) & ~1);
}

}  // namespace holdfast
