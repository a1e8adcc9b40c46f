// Rotation kernel, any number of tokens of one sequence or one token of several: declares the ABI and calls rotate().
#include "../schedules/schedule.h"
#include "dtypes.h"
#include "rotate.h"

namespace {
using namespace Halide;
using namespace holdfast;

class RotateGenerator : public Generator<RotateGenerator> {
public:
    GeneratorParam<Dtype> dtype{"dtype", Dtype::f32, dtype_names()};     // of x and out
    GeneratorParam<std::string> forced_schedule{"forced_schedule", ""};  // schedule.h

    // Which features make a pair is a matter of strides: halves of the row have 1 along j and K/2 along p, neighbours 2 and 1.
    // out may lie where x does.
    Input<Buffer<void, 4>> x{"x"};                    // (j, p, h, t), any strides
    Input<Buffer<float, 1>> theta{"theta"};           // (j)
    Input<Buffer<uint32_t, 2>> position{"position"};  // (2, t): int64, as a little-endian machine stores it
    Output<Buffer<void, 4>> out{"out"};               // (j, p, h, t), any strides

    void configure() { x.set_type(stored_type(dtype)), out.set_type(stored_type(dtype)); }
    void generate() {
        Var j("j"), p("p"), h("h"), t("t"), n("n");
        Func rows("rows"), thetas("thetas"), positions("positions");
        rows(j, p, h, t) = widen(dtype, x(j, p, h, t));
        thetas(j) = theta(j);
        positions(n, t) = position(n, t);
        f = rotate(rows, thetas, positions);
        out(j, p, h, t) = narrow(dtype, f.out(j, p, h, t));
        f.result = out;
        auto strides = [&](int m, int stride) { return x.dim(m).stride() == stride && out.dim(m).stride() == stride; };
        f.half_split = strides(0, 1), f.interleaved = strides(1, 1) && strides(0, 2);

        // Layout. The same for every target.
        auto bounds = [](auto &buffer, const std::vector<Expr> &extents) {
            for (int m = 0; m < (int)extents.size(); m++) buffer.dim(m).set_bounds(0, extents[m]);
        };
        const Expr J = out.dim(0).extent(), H = out.dim(2).extent(), T = out.dim(3).extent();
        bounds(x, {J, 2, H, T}), x.dim(0).set_stride(Expr());
        out.dim(0).set_min(0).set_stride(Expr()), out.dim(1).set_bounds(0, 2), out.dim(2).set_min(0), out.dim(3).set_min(0);
        bounds(theta, {J}), bounds(position, {2, T});
    }
    void schedule() {
        if (!using_autoscheduler()) apply_schedule(f, RotateSizes{}, get_pipeline(), get_target(), forced_schedule.value());
    }

private:
    RotateFuncs f;
};
}  // namespace

HALIDE_REGISTER_GENERATOR(RotateGenerator, rotate)
