// A kernel whose gradient comes for free, as docs/autodiff.md shows it: the page's code, against differences of the formula.
#include "../../generators/adjoint.h"

#include <gtest/gtest.h>

#include <cmath>

namespace {
using namespace Halide;
using holdfast::adjoint_of, holdfast::hole_for, holdfast::replace;

constexpr int rows = 4, chunks = 5;
constexpr float decay = 0.75f;

// ---- Begin of what docs/autodiff.md shows
// out_t = x_t S, S: what the chunks before that of t have added up. A chunk: (x, S) -> (out, decay S + sum of x^2).
struct LeakyFuncs {
    Func contribution;  // (c): what a chunk adds
    Func state;         // (c): before the chunk
    Func out;           // (i,c)
    RDom over_row, over_chunk;
};
LeakyFuncs leaky(const Func &x) {
    Var i("i"), c("c");
    LeakyFuncs f;
    f.over_row = RDom(0, rows, "over_row"), f.over_chunk = RDom(1, chunks - 1, "over_chunk");
    f.contribution = Func("contribution"), f.state = Func("state"), f.out = Func("out");
    f.contribution(c) += x(f.over_row, c) * x(f.over_row, c);
    f.state(c) = 0.0f;
    f.state(f.over_chunk) = decay * f.state(f.over_chunk - 1) + f.contribution(f.over_chunk - 1);
    f.out(i, c) = x(i, c) * f.state(c);
    return f;
}

Func leaky_backward(const Func &x, const Func &dout) {
    Var i("i"), c("c");
    LeakyFuncs f = leaky(x);
    // One chunk: autodiff looks neither behind the state before it nor behind the gradient of the state after it.
    const Func state = hole_for(f.state);
    Func dstate("dstate"), dstate_after("dstate_after"), loss("loss"), one("one");
    dstate_after(c) = 0.0f, one(c) = 1.0f;
    replace({f.out}, f.state, state);
    RDom over_out(0, rows, "over_out");
    loss(c) = 0.0f;
    loss(c) += f.out(over_out, c) * dout(over_out, c);
    loss(c) += f.contribution(c) * dstate_after(c);
    const Derivative derived = propagate_adjoints(loss, one, {{0, chunks - 1}});
    const Func dx = adjoint_of(derived, "x", x), dstate_from_out = adjoint_of(derived, "the state", state);
    // The scan back, and what the holes stand for.
    RDom back(1, chunks - 1, "back");
    dstate(c) = dstate_from_out(c);
    dstate(chunks - 1 - back) += decay * dstate(chunks - back);
    Func next("next");
    next(c) = select(c < chunks - 1, dstate(min(c + 1, chunks - 1)), 0.0f);
    replace({dx}, dstate_after, next);
    replace({dx}, state, f.state);
    return dx;
}
// ---- End

double loss_of(const std::vector<double> &x, const std::vector<double> &dout) {
    double state = 0, loss = 0;
    for (int c = 0; c < chunks; c++) {
        double added = 0;
        for (int i = c * rows; i < (c + 1) * rows; i++) loss += x[i] * state * dout[i], added += x[i] * x[i];
        state = decay * state + added;
    }
    return loss;
}

TEST(AdjointOfAScan, IsThatOfTheFormula) {
    std::vector<double> x(rows * chunks), dout(rows * chunks);
    for (int t = 0; t < rows * chunks; t++) x[t] = std::sin(1 + t), dout[t] = std::cos(3 * t);
    auto in_chunks = [](const std::vector<double> &values, const char *name) {
        Buffer<float> buffer(rows, chunks);
        for (int t = 0; t < rows * chunks; t++) buffer(t % rows, t / rows) = (float)values[t];
        Func f(name);
        Var i("i"), c("c");
        f(i, c) = buffer(i, c);
        return f;
    };
    Func dx = leaky_backward(in_chunks(x, "x"), in_chunks(dout, "dout"));
    const Buffer<float> got = dx.realize({rows, chunks});
    double largest = 0;
    for (int t = 0; t < rows * chunks; t++) {
        std::vector<double> more = x, less = x;
        more[t] += 1e-4, less[t] -= 1e-4;
        const double want = (loss_of(more, dout) - loss_of(less, dout)) / 2e-4;
        EXPECT_NEAR(got(t % rows, t / rows), want, 1e-5) << "token " << t;
        largest = std::max(largest, std::abs(want));
    }
    EXPECT_GT(largest, 1) << "nothing would be seen";
}

}  // namespace
