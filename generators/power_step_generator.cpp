// Power retention kernel, one token of one batch entry: declares the ABI and calls power_step(). State and sum of keys are updated
// where they lie.
#include "../schedules/schedule.h"
#include "dtypes.h"
#include "power_step.h"

namespace {
using namespace Halide;
using namespace holdfast;

class PowerStepGenerator : public Generator<PowerStepGenerator> {
public:
    GeneratorParam<Dtype> dtype{"dtype", Dtype::f32, dtype_names()};             // of q, k, v and out
    GeneratorParam<int> degree{"degree", 2};                                     // 0: any
    GeneratorParam<int> key_size{"key_size", 64}, value_size{"value_size", 64};  // 0: any
    GeneratorParam<bool> any_state_strides{"any_state_strides", false};          // as in chunkwise_generator.cpp
    GeneratorParam<std::string> forced_schedule{"forced_schedule", ""};          // schedule.h

    // [H, D] with a contiguous last axis and any other strides; a stride may be 0.
    Input<Buffer<void, 3>> q{"q"};                   // (d, g, h)
    Input<Buffer<void, 2>> k{"k"}, v{"v"};           // (d, h) (e, h)
    Input<Buffer<float, 1>> log_decay{"log_decay"};  // (h), any stride
    Input<int> block{"block"}, blocks{"blocks"};     // W, U
    Input<int> run_time_degree{"run_time_degree"};   // where the parameter leaves it open
    Input<int> normalize{"normalize"};               // 1, or 0
    Input<float> scale{"scale"};                     // counts where normalize is 0
    // .0, the state (e, w, g, u, h), read and written: its D features in blocks of W, U of them, of any size, with a stride of 0 along g;
    // .1, memory for sums (e, w, g, u, h), with one of 0 along w: recurrent.h
    Output<Func> state_and_sum{"state_and_sum", {Float(32), Float(32)}, 5};
    // .0, the sum of keys (f, h), read and written; where it does not count, its contents do not; .1, memory for what it was
    Output<Func> keys{"keys", {Float(32), Float(32)}, 2};
    Output<Buffer<void, 3>> out{"out"};  // (e, g, h)

    void configure() {
        q.set_type(stored_type(dtype)), k.set_type(stored_type(dtype)), v.set_type(stored_type(dtype));
        out.set_type(stored_type(dtype));
    }
    void generate() {
        Var h("h"), g("g"), d("d"), e("e");
        const Expr K = key_size ? Expr(key_size.value()) : q.dim(0).extent();
        const Expr V = value_size ? Expr(value_size.value()) : v.dim(0).extent();
        Func queries("queries"), new_keys("new_keys"), values("values"), decays("log_decays");
        queries(d, g, h) = widen(dtype, q(d, g, h));
        new_keys(d, h) = widen(dtype, k(d, h));
        values(e, h) = widen(dtype, v(e, h));
        decays(h) = log_decay(h);
        p = power_step(queries, new_keys, values, decays, K,
                       {run_time_degree, clamp(normalize, 0, 1), scale, block, blocks, out.dim(1).extent()}, sizes());
        state_and_sum = p.state_and_sum;
        keys = p.keys;
        out(e, g, h) = narrow(dtype, p.out(e, g, h));
        p.result = out;

        // Layout. The same for every target.
        OutputImageParam state = p.state_and_sum.output_buffers()[0], sum = p.state_and_sum.output_buffers()[1];
        const Expr G = out.dim(1).extent(), H = out.dim(2).extent();
        auto bounds = [](auto &buffer, const std::vector<Expr> &extents) {
            for (int m = 0; m < (int)extents.size(); m++) buffer.dim(m).set_bounds(0, extents[m]);
        };
        bounds(q, {K, G, H}), bounds(k, {K, H});
        bounds(v, {V, H}), bounds(out, {V, G, H});
        bounds(state, {V, block, G, blocks, H});  // and those of sum, with it
        if (any_state_strides) state.dim(0).set_stride(Expr());
        bounds(p.keys.output_buffers()[0], {block * blocks, H});
        bounds(log_decay, {H}), log_decay.dim(0).set_stride(Expr());
        state.dim(2).set_stride(0), sum.dim(1).set_stride(0);
    }
    void schedule() {
        if (!using_autoscheduler()) apply_schedule(p, sizes(), get_pipeline(), get_target(), forced_schedule.value());
    }

private:
    PowerStepFuncs p;
    PowerStepSizes sizes() const { return {degree, key_size, value_size}; }
};
}  // namespace

HALIDE_REGISTER_GENERATOR(PowerStepGenerator, power_step)
