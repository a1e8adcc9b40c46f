// Recurrent kernel, one token: declares the ABI and calls recurrent(). The state is updated where it lies.
#include "../schedules/schedule.h"
#include "dtypes.h"
#include "recurrent.h"

namespace {
using namespace Halide;
using namespace holdfast;

class RecurrentGenerator : public Generator<RecurrentGenerator> {
public:
    GeneratorParam<Dtype> dtype{"dtype", Dtype::f32, dtype_names()};             // of q, k, v and out
    GeneratorParam<int> key_size{"key_size", 64}, value_size{"value_size", 64};  // 0: any
    GeneratorParam<bool> any_state_strides{"any_state_strides", false};          // as in chunkwise_generator.cpp
    GeneratorParam<std::string> forced_schedule{"forced_schedule", ""};          // schedule.h

    // [B, heads, D] with a contiguous last axis and any other strides; a stride may be 0 (one decay per head). The heads of q and
    // out are those of the others, h, and g in the group that shares one.
    Input<Buffer<void, 4>> q{"q"};                   // (d, g, h, b)
    Input<Buffer<void, 3>> k{"k"};                   // (d, h, b)
    Input<Buffer<void, 3>> v{"v"};                   // (e, h, b)
    Input<Buffer<float, 2>> log_decay{"log_decay"};  // (h, b), any strides
    Input<float> scale{"scale"};
    // .0, the state (e, d, h, b), read and written; .1, memory for sums (e, d, h, b), with a stride of 0 along d: recurrent.h
    Output<Func> state_and_sum{"state_and_sum", {Float(32), Float(32)}, 4};
    Output<Buffer<void, 4>> out{"out"};  // (e, g, h, b)

    void configure() {
        q.set_type(stored_type(dtype)), k.set_type(stored_type(dtype)), v.set_type(stored_type(dtype));
        out.set_type(stored_type(dtype));
    }
    void generate() {
        Var b("b"), h("h"), g("g"), d("d"), e("e");
        const Expr D = key_size ? Expr(key_size.value()) : q.dim(0).extent();
        const Expr E = value_size ? Expr(value_size.value()) : v.dim(0).extent();
        Func queries("queries"), keys("keys"), values("values"), decays("log_decays");
        queries(d, g, h, b) = widen(dtype, q(d, g, h, b));
        keys(d, h, b) = widen(dtype, k(d, h, b));
        values(e, h, b) = widen(dtype, v(e, h, b));
        decays(h, b) = log_decay(h, b);
        f = recurrent(queries, keys, values, decays, D, scale);
        state_and_sum = f.state_and_sum;
        out(e, g, h, b) = narrow(dtype, f.out(e, g, h, b));
        f.result = out;

        // Layout. The same for every target.
        OutputImageParam state = f.state_and_sum.output_buffers()[0], sum = f.state_and_sum.output_buffers()[1];
        const Expr G = out.dim(1).extent(), H = out.dim(2).extent(), B = out.dim(3).extent();
        auto bounds = [](auto &buffer, const std::vector<Expr> &extents) {
            for (int m = 0; m < (int)extents.size(); m++) buffer.dim(m).set_bounds(0, extents[m]);
        };
        bounds(q, {D, G, H, B}), bounds(k, {D, H, B});
        bounds(v, {E, H, B}), bounds(out, {E, G, H, B});
        bounds(state, {E, D, H, B});  // and those of sum, with it
        if (any_state_strides) state.dim(0).set_stride(Expr());
        bounds(log_decay, {H, B}), log_decay.dim(0).set_stride(Expr());
        sum.dim(1).set_stride(0);
    }
    void schedule() {
        if (!using_autoscheduler())
            apply_schedule(f, RecurrentSizes{key_size, value_size}, get_pipeline(), get_target(), forced_schedule.value());
    }

private:
    RecurrentFuncs f;
};
}  // namespace

HALIDE_REGISTER_GENERATOR(RecurrentGenerator, recurrent)
