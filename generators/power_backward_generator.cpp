// Gradient of power retention, one chunk: declares the ABI and calls power_backward().
#include "../schedules/schedule.h"
#include "decay.h"
#include "dtypes.h"
#include "power_backward.h"

namespace {
using namespace Halide;
using namespace holdfast;

class PowerBackwardGenerator : public Generator<PowerBackwardGenerator> {
public:
    // As in power_generator.cpp.
    GeneratorParam<Dtype> dtype{"dtype", Dtype::f32, dtype_names()};  // of q, k, v, out, dout, dq, dk and dv
    GeneratorParam<int> degree{"degree", 2};
    GeneratorParam<int> chunk{"chunk", 64};
    GeneratorParam<int> key_size{"key_size", 64}, value_size{"value_size", 64};
    GeneratorParam<int> block{"block", 0};
    GeneratorParam<int> causal_tile{"causal_tile", 0};
    GeneratorParam<bool> any_state_strides{"any_state_strides", false};
    GeneratorParam<std::string> forced_schedule{"forced_schedule", ""};

    // Shapes, strides and groups as in power_generator.cpp; d... is the gradient of what is called so.
    Input<Buffer<void, 5>> q{"q"};                     // (d, t, g, h, b)
    Input<Buffer<void, 4>> k{"k"}, v{"v"};             // (d, t, h, b) (e, t, h, b)
    Input<Buffer<float, 3>> log_decay{"log_decay"};    // (t, h, b), any strides
    Input<Buffer<float, 4>> state_in{"state_in"};      // (e, f, h, b)
    Input<Buffer<float, 3>> keys_in{"keys_in"};        // (f, h, b): not looked at where it does not count
    Input<Buffer<void, 5>> out{"out"}, dout{"dout"};   // (e, t, g, h, b); out is not looked at where keys_in is not
    Input<Buffer<float, 4>> dstate_out{"dstate_out"};  // (e, f, h, b): of the state at the end of the chunk
    Input<Buffer<float, 3>> dkeys_out{"dkeys_out"};    // (f, h, b): not looked at where keys_in is not
    Input<int> run_time_degree{"run_time_degree"};     // where the parameter leaves it open
    Input<int> normalize{"normalize"};                 // 1, or 0
    Input<float> scale{"scale"};                       // counts where normalize is 0
    // 1, or 0: it costs nothing, and its buffer is not written.
    Input<int> want_dq{"want_dq"}, want_dk{"want_dk"}, want_dv{"want_dv"}, want_dlog_decay{"want_dlog_decay"};
    Input<int> want_dstate{"want_dstate"}, want_dkeys{"want_dkeys"};  // of dstate_in, dkeys_in
    Output<Buffer<void, 5>> dq{"dq"};                                 // (d, t, g, h, b)
    Output<Buffer<void, 4>> dk{"dk"}, dv{"dv"};         // (d, t, h, b) (e, t, h, b): of a group together, as dlog_decay
    Output<Buffer<float, 3>> dlog_decay{"dlog_decay"};  // (t, h, b)
    Output<Buffer<float, 4>> dstate_in{"dstate_in"};  // (e, f, h, b); it may be dstate_out: Halide makes outputs in this order
    Output<Buffer<float, 3>> dkeys_in{"dkeys_in"};    // (f, h, b): 0 where keys_in does not count; it may be dkeys_out

    void configure() {
        const Type stored = stored_type(dtype);
        q.set_type(stored), k.set_type(stored), v.set_type(stored), out.set_type(stored), dout.set_type(stored);
        dq.set_type(stored), dk.set_type(stored), dv.set_type(stored);
    }
    void generate() {
        Var b("b"), h("h"), g("g"), i("i"), j("j"), d("d"), e("e"), f("f");
        const PowerSizes size = sizes();
        const Expr K = size.key ? Expr(size.key) : q.dim(0).extent();
        const Expr V = size.value ? Expr(size.value) : v.dim(0).extent();
        const bool known = size.degree && size.key;
        const Expr T = q.dim(1).extent(), D = known ? Expr(expanded_size(size.key, size.degree)) : state_in.dim(1).extent();
        const Expr G = q.dim(2).extent(), H = q.dim(3).extent(), B = q.dim(4).extent();
        const Expr counts = clamp(normalize, 0, 1);

        // Rows past the end as in power_generator.cpp; their gradients are zero.
        Func queries("q_chunk"), keys("k_chunk"), values("v_chunk"), decays("log_decay_chunk"), state("state_start");
        Func outs("out_chunk"), douts("dout_chunk"), state_end("dstate_end"), start_of_keys("keys_start"),
            end_of_keys("dkeys_end");
        auto row = [&](const Expr &n) { return clamp(n, 0, T - 1); };
        queries(d, i, g, h, b) = widen(dtype, q(d, row(i), g, h, b));
        keys(d, j, h, b) = select(j < T, widen(dtype, k(d, row(j), h, b)), 0.0f);
        values(e, j, h, b) = select(j < T, widen(dtype, v(e, row(j), h, b)), 0.0f);
        decays(i, h, b) = select(i < T, log_decay(row(i), h, b), 0.0f);
        state(e, f, h, b) = state_in(e, f, h, b);
        start_of_keys(f, h, b) = select(counts != 0, keys_in(f, h, b), 0.0f);
        outs(e, i, g, h, b) = widen(dtype, out(e, row(i), g, h, b));
        douts(e, i, g, h, b) = select(i < T, widen(dtype, dout(e, row(i), g, h, b)), 0.0f);
        const Expr feature = known ? Expr(f) : min(f, D - 1);  // a tile of them may reach past the last one
        state_end(e, f, h, b) = dstate_out(e, feature, h, b);
        end_of_keys(f, h, b) = select(counts != 0, dkeys_out(feature, h, b), 0.0f);
        w = power_backward(queries, keys, values, decays, state, start_of_keys, outs, douts, state_end, end_of_keys,
                           {K, D, V, G, H, B}, {run_time_degree, counts, scale}, size);

        auto wanted = [](const Expr &want, const Expr &extent, const char *name) {
            RDom domain(0, extent, name);
            domain.where(want != 0);
            return domain;
        };
        w.wanted_dq = wanted(want_dq, K, "wanted_dq"), w.wanted_dk = wanted(want_dk, K, "wanted_dk");
        w.wanted_dv = wanted(want_dv, V, "wanted_dv"), w.wanted_dlog_decay = wanted(want_dlog_decay, T, "wanted_dlog_decay");
        dq(d, i, g, h, b) = undef(stored_type(dtype));
        dq(w.wanted_dq, i, g, h, b) = narrow(dtype, w.dq(w.wanted_dq, i, g, h, b));
        dk(d, j, h, b) = undef(stored_type(dtype));
        dk(w.wanted_dk, j, h, b) = narrow(dtype, w.dkey(w.wanted_dk, j, h, b));
        dv(e, j, h, b) = undef(stored_type(dtype));
        dv(w.wanted_dv, j, h, b) = narrow(dtype, w.dvalues(w.wanted_dv, j, h, b));
        dlog_decay(i, h, b) = undef<float>();
        const RVar t = w.wanted_dlog_decay.x;  // what keeps nothing has gradient 0, not the rounding of a sum
        dlog_decay(t, h, b) = select(decays(t, h, b) > least_log_decay, w.dgates(t, h, b), 0.0f);
        w.wanted_dstate = wanted(want_dstate, B, "wanted_dstate"), w.wanted_dkeys = wanted(want_dkeys, B, "wanted_dkeys");
        dstate_in(e, f, h, b) = undef<float>(), dkeys_in(f, h, b) = undef<float>();
        dstate_in(e, f, h, w.wanted_dstate) = w.dstate(e, f, h, w.wanted_dstate);
        dkeys_in(f, h, w.wanted_dkeys) = w.dkeys_sum(f, h, w.wanted_dkeys);
        w.result_dq = dq, w.result_dk = dk, w.result_dv = dv, w.result_dlog_decay = dlog_decay;
        w.dstate_in = dstate_in, w.dkeys_in = dkeys_in;

        // Layout. The same for every target.
        auto bounds = [](auto &buffer, const std::vector<Expr> &extents) {
            for (int m = 0; m < (int)extents.size(); m++) buffer.dim(m).set_bounds(0, extents[m]);
        };
        bounds(q, {K, T, G, H, B}), bounds(dq, {K, T, G, H, B});
        bounds(out, {V, T, G, H, B}), bounds(dout, {V, T, G, H, B});
        bounds(k, {K, T, H, B}), bounds(dk, {K, T, H, B});
        bounds(v, {V, T, H, B}), bounds(dv, {V, T, H, B});
        bounds(log_decay, {T, H, B}), log_decay.dim(0).set_stride(Expr());
        bounds(dlog_decay, {T, H, B}), dlog_decay.dim(0).set_stride(Expr());
        bounds(state_in, {V, D, H, B}), bounds(dstate_out, {V, D, H, B}), bounds(dstate_in, {V, D, H, B});
        bounds(keys_in, {D, H, B}), bounds(dkeys_out, {D, H, B}), bounds(dkeys_in, {D, H, B});
        if (any_state_strides)
            state_in.dim(0).set_stride(Expr()), dstate_out.dim(0).set_stride(Expr()), dstate_in.dim(0).set_stride(Expr());
        else if (size.value)
            state_in.dim(1).set_stride(V), dstate_out.dim(1).set_stride(V), dstate_in.dim(1).set_stride(V);
    }
    void schedule() {
        if (!using_autoscheduler()) apply_schedule(w, sizes(), get_pipeline(), get_target(), forced_schedule.value());
    }

private:
    PowerBackwardFuncs w;

    PowerSizes sizes() const {
        const int features = degree && key_size ? expanded_size(key_size, degree) : 0;
        return {degree,
                chunk,
                key_size,
                value_size,
                block ? (int)block : feature_block(features),
                causal_tile ? (int)causal_tile : (int)chunk};
    }
};
}  // namespace

HALIDE_REGISTER_GENERATOR(PowerBackwardGenerator, power_backward)
