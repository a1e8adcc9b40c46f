// Sums of log decays over the rows of a chunk, and exp() of one for the stages that multiply a state by it again and again.
#pragma once
#include "Halide.h"
#include <vector>

namespace holdfast {

/// exp() of anything below is 0 in fp32, so clamping there changes nothing; it lets -infinity in, and 256 of them fit int32.
constexpr float least_log_decay = -120.0f;

/// Log decays are summed in two parts. Differences of one fp32 sum would lose what small decays add after a large one (a
/// reset in the middle of a chunk); whole steps of 2^-16 add without error in int32, and what is left is below 2^-17 each.
/// Integers, because no compiler may reorder them into the one sum.
constexpr float decay_step = 1.0f / 65536;

/// From the start of a chunk, row i included: over (i, ..).
struct LogDecays {
    Halide::Func steps;     // whole steps of decay_step, an integer
    Halide::Func rest;      // and the rest
    Halide::RDom over_row;  // both: r in [0, C)

    /// Of rows 0 .. `to`.
    Halide::Expr until(const Halide::Expr &to, const std::vector<Halide::Var> &others) const {
        return sum(steps(at(to, others)), rest(at(to, others)));
    }
    /// Of rows `from` + 1 .. `to`.
    Halide::Expr between(const Halide::Expr &from, const Halide::Expr &to, const std::vector<Halide::Var> &others) const {
        return sum(steps(at(to, others)) - steps(at(from, others)), rest(at(to, others)) - rest(at(from, others)));
    }

private:
    static Halide::Expr sum(const Halide::Expr &steps, const Halide::Expr &rest) {
        return Halide::cast<float>(steps) * decay_step + rest;
    }
    static std::vector<Halide::Expr> at(const Halide::Expr &row, const std::vector<Halide::Var> &others) {
        std::vector<Halide::Expr> args(others.begin(), others.end());
        args.insert(args.begin(), row);
        return args;
    }
};

/// `log_decay(row)` of each of `rows` rows, over `args`, of which the first is the row. A masked sum, not a running one: cheap
/// terms, no serial dependence, and autodiff is exact through it.
template<class LogDecay>
LogDecays log_decays(const LogDecay &log_decay, int rows, const std::vector<Halide::Var> &args) {
    using namespace Halide;
    auto steps = [&](const Expr &row) { return cast<int32_t>(round(max(log_decay(row), least_log_decay) / decay_step)); };
    auto rest = [&](const Expr &row) { return max(log_decay(row), least_log_decay) - cast<float>(steps(row)) * decay_step; };
    LogDecays sums;
    sums.over_row = RDom(0, rows, "over_row");
    sums.steps = Func("decay_steps");
    sums.steps(args) += select(sums.over_row <= args[0], steps(sums.over_row), 0);
    sums.rest = Func("decay_rest");
    sums.rest(args) += select(sums.over_row <= args[0], rest(sums.over_row), 0.0f);
    return sums;
}

/// exp(x), x <= 0, as a sum of two: rounded to fp32, and what that left out. A long sequence multiplies its state by the same
/// decay again and again, and the same rounding each time adds up: to 1e-4 over the 4096 tokens that RetNet's slowest head
/// remembers. Far from 1 the state forgets faster than that. Through an integer, because no compiler may
/// reorder those.
inline Halide::Tuple two_part_exp(const Halide::Expr &x) {
    using namespace Halide;
    const float near = -0.35f, unit = 1 << 24;
    Expr series = 1.0f;  // (exp(x) - 1) / x, to 1e-9
    for (int n = 8; n >= 2; n--) series = 1.0f + x / (float)n * series;
    Expr minus_1 = x * series;
    Expr rounded = cast<int32_t>(round((1.0f + minus_1) * unit));
    Expr rest = minus_1 - cast<float>(rounded - (1 << 24)) / unit;
    return Tuple(select(x > near, cast<float>(rounded) / unit, exp(x)), select(x > near, rest, 0.0f));
}

/// decay * state + added, with a decay of two_part_exp. What is small is summed first: next to the large product it would be
/// rounded away. Compilers that reorder sums, or make decay[0] + decay[1] one again, stop at the operation on integers, which
/// costs half a rounding of what is small.
inline Halide::Expr decayed(const Halide::Tuple &decay, const Halide::Expr &state, const Halide::Expr &added) {
    using namespace Halide;
    const Expr small = decay[1] * state + added;
    return decay[0] * state + reinterpret<float>(reinterpret<int32_t>(small) & ~1);
}

}  // namespace holdfast
