// Gradient of norm and gate of heads, any number of tokens: declares the ABI and calls head_norm_gate_backward().
#include "../schedules/schedule.h"
#include "dtypes.h"
#include "head_norm_gate_backward.h"

namespace {
using namespace Halide;
using namespace holdfast;

class HeadNormGateBackwardGenerator : public Generator<HeadNormGateBackwardGenerator> {
public:
    GeneratorParam<Dtype> dtype{"dtype", Dtype::f32, dtype_names()};     // of all rows
    GeneratorParam<std::string> forced_schedule{"forced_schedule", ""};  // schedule.h

    // (e, h, t, b) with a contiguous first dimension and any other strides, and (e, h), as of head_norm_gate.
    Input<Buffer<void, 4>> x{"x"}, gate{"gate"};
    Input<Buffer<float, 2>> weight{"weight"};
    Input<Buffer<void, 4>> dout{"dout"};
    Input<int32_t> layer_norm{"layer_norm"}, gated{"gated"}, weighted{"weighted"};  // conditions
    Input<float> eps{"eps"};
    // Conditions. What is not wanted is not written: any buffer of its shape will do, such as x, or weight. dgate is wanted only
    // where it is gated, dweight only where it is weighted.
    Input<int32_t> want_dx{"want_dx"}, want_dgate{"want_dgate"}, want_dweight{"want_dweight"};
    Input<int32_t> add_dweight{"add_dweight"};  // condition: dweight is added to what is there
    Output<Buffer<void, 4>> dx{"dx"}, dgate{"dgate"};
    Output<Buffer<float, 2>> dweight{"dweight"};  // (e, w): w is h, or 1 for all h together

    void configure() {
        for (auto *rows : {&x, &gate, &dout}) rows->set_type(stored_type(dtype));
        for (auto *rows : {&dx, &dgate}) rows->set_type(stored_type(dtype));
    }
    void generate() {
        Var e("e"), h("h"), t("t"), b("b"), w("w");
        Func rows("rows"), gates("gates"), weights("weights"), gradients("gradients");
        rows(e, h, t, b) = widen(dtype, x(e, h, t, b));
        gates(e, h, t, b) = widen(dtype, gate(e, h, t, b));
        weights(e, h) = weight(e, h);
        gradients(e, h, t, b) = widen(dtype, dout(e, h, t, b));
        const Expr V = x.dim(0).extent(), H = x.dim(1).extent(), T = x.dim(2).extent(), B = x.dim(3).extent();
        f = head_norm_gate_backward(rows, gates, weights, gradients, V, H, T, B, layer_norm != 0, gated != 0, weighted != 0,
                                    eps, want_dweight != 0);

        // Asked inside its own loop: what is computed with a gradient in one loop has a condition of its own.
        auto once_if = [](const char *name, const Expr &wanted) {
            RDom once(0, 1, name);
            once.where(once < cast<int>(wanted != 0));
            return once;
        };
        f.want_dx = once_if("once_dx", want_dx), f.want_dgate = once_if("once_dgate", want_dgate);
        f.want_dweight = once_if("once_dweight", want_dweight);
        dx(e, h, t, b) = undef(stored_type(dtype));
        dx(e, h, t, b) = narrow(dtype, f.dx(e, h, t, b + f.want_dx));
        dgate(e, h, t, b) = undef(stored_type(dtype));
        dgate(e, h, t, b) = narrow(dtype, f.dgate(e, h, t, b + f.want_dgate));
        const Expr W = dweight.dim(1).extent();
        f.over_heads = RDom(0, H / max(W, 1), "over_heads");
        f.over_heads.where(want_dweight != 0);
        dweight(e, w) = undef<float>();
        dweight(e, w) = select(add_dweight != f.want_dweight, dweight(e, w), 0.0f);  // the RVar is 0
        dweight(e, w) += f.dweight(e, w + f.over_heads * W);
        f.result_dx = dx, f.result_dgate = dgate, f.result_dweight = dweight;

        // Layout. The same for every target.
        auto bounds = [](auto &buffer, const std::vector<Expr> &extents) {
            for (int m = 0; m < (int)extents.size(); m++) buffer.dim(m).set_bounds(0, extents[m]);
        };
        for (auto *buffer : {&x, &gate, &dout}) bounds(*buffer, {V, H, T, B});
        for (auto *buffer : {&dx, &dgate}) bounds(*buffer, {V, H, T, B});
        bounds(weight, {V, H}), bounds(dweight, {V, W});
    }
    void schedule() {
        if (!using_autoscheduler())
            apply_schedule(f, HeadNormGateBackwardSizes{}, get_pipeline(), get_target(), forced_schedule.value());
    }

private:
    HeadNormGateBackwardFuncs f;
};
}  // namespace

HALIDE_REGISTER_GENERATOR(HeadNormGateBackwardGenerator, head_norm_gate_backward)
