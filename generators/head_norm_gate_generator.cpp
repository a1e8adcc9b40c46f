// Norm and gate of heads, any number of tokens: declares the ABI and calls head_norm_gate().
#include "../schedules/schedule.h"
#include "dtypes.h"
#include "head_norm_gate.h"

namespace {
using namespace Halide;
using namespace holdfast;

class HeadNormGateGenerator : public Generator<HeadNormGateGenerator> {
public:
    GeneratorParam<Dtype> dtype{"dtype", Dtype::f32, dtype_names()};     // of x, gate and out
    GeneratorParam<std::string> forced_schedule{"forced_schedule", ""};  // schedule.h

    // (e, h, t, b) with a contiguous first dimension and any other strides. out may lie where x or gate does.
    Input<Buffer<void, 4>> x{"x"}, gate{"gate"};  // gate: any buffer of that shape where it is not gated, such as x
    Input<Buffer<float, 2>> weight{"weight"};     // (e, h); a stride may be 0. Not read where it is not weighted
    Input<int32_t> layer_norm{"layer_norm"}, gated{"gated"}, weighted{"weighted"};  // conditions
    Input<float> eps{"eps"};
    Output<Buffer<void, 4>> out{"out"};

    void configure() { x.set_type(stored_type(dtype)), gate.set_type(stored_type(dtype)), out.set_type(stored_type(dtype)); }
    void generate() {
        Var e("e"), h("h"), t("t"), b("b");
        Func rows("rows"), gates("gates"), weights("weights");
        rows(e, h, t, b) = widen(dtype, x(e, h, t, b));
        gates(e, h, t, b) = widen(dtype, gate(e, h, t, b));
        weights(e, h) = weight(e, h);
        const Expr V = out.dim(0).extent(), H = out.dim(1).extent(), T = out.dim(2).extent(), B = out.dim(3).extent();
        f = head_norm_gate(rows, gates, weights, V, layer_norm != 0, gated != 0, weighted != 0, eps);
        out(e, h, t, b) = narrow(dtype, f.out(e, h, t, b));
        f.result = out;

        // Layout. The same for every target.
        auto bounds = [](auto &buffer, const std::vector<Expr> &extents) {
            for (int m = 0; m < (int)extents.size(); m++) buffer.dim(m).set_bounds(0, extents[m]);
        };
        bounds(x, {V, H, T, B}), bounds(gate, {V, H, T, B}), bounds(weight, {V, H});
        for (int m = 0; m < 4; m++) out.dim(m).set_min(0);
    }
    void schedule() {
        if (!using_autoscheduler())
            apply_schedule(f, HeadNormGateSizes{}, get_pipeline(), get_target(), forced_schedule.value());
    }

private:
    HeadNormGateFuncs f;
};
}  // namespace

HALIDE_REGISTER_GENERATOR(HeadNormGateGenerator, head_norm_gate)
