// Rotation kernel, any number of tokens: declares the ABI and calls rotate().
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
    Input<Buffer<void, 5>> x{"x"};                    // (j, p, h, t, b), any strides
    Input<Buffer<float, 1>> theta{"theta"};           // (j)
    Input<Buffer<uint32_t, 3>> position{"position"};  // (2, t, b), any strides: integers as a little-endian machine
    Input<int32_t> position_bits{"position_bits"};    // stores them, of 64 bits; of 32 bits, twice; or 0: not looked at
    Input<uint32_t> start{"start"}, start_upper{"start_upper"};  // where it is 0: the position of token 0, in two halves
    Input<int32_t> backward{"backward"};                         // condition: turn the other way
    Output<Buffer<void, 5>> out{"out"};                          // (j, p, h, t, b), any strides

    void configure() { x.set_type(stored_type(dtype)), out.set_type(stored_type(dtype)); }
    void generate() {
        Var j("j"), p("p"), h("h"), t("t"), b("b");
        Func rows("rows"), thetas("thetas"), positions("positions");
        rows(j, p, h, t, b) = widen(dtype, x(j, p, h, t, b));
        thetas(j) = theta(j);
        const Expr counted = start + cast<uint32_t>(t), counted_upper = start_upper + cast<uint32_t>(counted < start);
        const Expr given = position(0, t, b), sign = cast<uint32_t>(0) - (given >> 31);
        positions(t, b) = Tuple(select(position_bits == 0, counted, given),
                                select(position_bits == 0, counted_upper, position_bits == 64, position(1, t, b), sign));
        f = rotate(rows, thetas, positions, backward != 0);
        out(j, p, h, t, b) = narrow(dtype, f.out(j, p, h, t, b));
        f.result = out;
        auto strides = [&](int m, int stride) { return x.dim(m).stride() == stride && out.dim(m).stride() == stride; };
        f.half_split = strides(0, 1), f.interleaved = strides(1, 1) && strides(0, 2);

        // Layout. The same for every target.
        auto bounds = [](auto &buffer, const std::vector<Expr> &extents) {
            for (int m = 0; m < (int)extents.size(); m++) buffer.dim(m).set_bounds(0, extents[m]);
        };
        const Expr J = out.dim(0).extent(), H = out.dim(2).extent(), T = out.dim(3).extent(), B = out.dim(4).extent();
        bounds(x, {J, 2, H, T, B}), x.dim(0).set_stride(Expr());
        out.dim(0).set_stride(Expr()), out.dim(1).set_extent(2);
        for (int m = 0; m < 5; m++) out.dim(m).set_min(0);
        bounds(theta, {J}), bounds(position, {2, T, B}), position.dim(0).set_stride(Expr());
    }
    void schedule() {
        if (!using_autoscheduler()) apply_schedule(f, RotateSizes{}, get_pipeline(), get_target(), forced_schedule.value());
    }

private:
    RotateFuncs f;
};
}  // namespace

HALIDE_REGISTER_GENERATOR(RotateGenerator, rotate)
