// Rows that become columns, in registers.
#pragma once
#include "Halide.h"

#include <string>
#include <vector>

namespace holdfast::x86 {

/// The Func `rows` of (x, y, ...), to be read along y: in blocks of n x n elements, n = `vec`. A block is a line of n * n
/// elements, row by row; its first half interleaved with its second one, log2(n) times, is the same block column by column. What is
/// interleaved are whole vectors, two shuffles for two of them.
class Transposed {
    const int vec;
    std::vector<Halide::Func> steps;
    Halide::Func last;  // (position in the line, block along x, block along y, ...)

public:
    Transposed(const Halide::Func &rows, int vec) : vec(vec) {
        using namespace Halide;
        Var n("n"), bx("bx"), by("by");
        std::vector<Var> args = rows.args();
        std::vector<Expr> at(args.begin(), args.end());
        at[0] = bx * vec + n % vec, at[1] = by * vec + n / vec;
        args[0] = bx, args[1] = by, args.insert(args.begin(), n);
        last = Func(rows.name() + "_line");
        last(args) = rows(at);
        at.assign(args.begin(), args.end());
        for (int interleaved = 1; interleaved < vec; interleaved *= 2) {
            Func step(rows.name() + "_interleaved_" + std::to_string(steps.size()));
            at[0] = n / 2 + n % 2 * (vec * vec / 2);
            step(args) = last(at);
            steps.push_back(step), last = step;
        }
    }
    /// The element that is rows at `args`.
    Halide::Expr operator()(const std::vector<Halide::Expr> &args) const {
        std::vector<Halide::Expr> at(args);
        at[0] = args[0] / vec, at[1] = args[1] / vec;
        at.insert(at.begin(), in_line(args[0], args[1]));
        return last(at);
    }
    /// Where element (x, y) of a block, x < vec and y < vec, is in its line.
    Halide::Expr in_line(const Halide::Expr &x, const Halide::Expr &y) const { return x % vec * vec + y % vec; }
    const Halide::Func &lines() const { return last; }

    /// `last_at` for the lines, `at` for what leads to them, a loop that needs one block.
    void compute_at(const Halide::LoopLevel &last_at, const Halide::LoopLevel &at) {
        using namespace Halide;
        Var half("half"), x("x");
        for (Func step : steps) {
            const Var n = step.args()[0];
            step.compute_at(step.name() == last.name() ? last_at : at).bound_extent(n, vec * vec);
            step.split(n, x, half, 2).reorder(half, x).unroll(half).vectorize(x, vec).unroll(x);
        }
    }
};

}  // namespace holdfast::x86
