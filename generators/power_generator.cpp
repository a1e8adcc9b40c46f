// Power retention kernel, one chunk: declares the ABI and calls power().
#include "../schedules/schedule.h"
#include "dtypes.h"
#include "power.h"

namespace {
using namespace Halide;
using namespace holdfast;

class PowerGenerator : public Generator<PowerGenerator> {
public:
    GeneratorParam<Dtype> dtype{"dtype", Dtype::f32, dtype_names()};  // of q, k, v and out
    GeneratorParam<int> degree{"degree", 2};                          // 0: any
    GeneratorParam<int> chunk{"chunk", 128};
    GeneratorParam<int> key_size{"key_size", 64}, value_size{"value_size", 64};  // 0: any
    GeneratorParam<int> block{"block", 0};               // features in a block; 0: as many as divide D, where that is known
    GeneratorParam<int> causal_tile{"causal_tile", 32};  // 0: the chunk
    GeneratorParam<bool> any_state_strides{"any_state_strides", false};  // as in chunkwise_generator.cpp
    GeneratorParam<std::string> forced_schedule{"forced_schedule", ""};  // schedule.h

    // [B, T, H, D] with a contiguous last axis and any other strides; a stride may be 0 (one decay per head). T is that of the
    // chunk, 1 .. C. Query head h G + g shares the keys and values of head h.
    Input<Buffer<void, 5>> q{"q"};                   // (d, t, g, h, b)
    Input<Buffer<void, 4>> k{"k"}, v{"v"};           // (d, t, h, b) (e, t, h, b)
    Input<Buffer<float, 3>> log_decay{"log_decay"};  // (t, h, b), any strides
    // (e, f, h, b); where V is known, without gaps between rows, as state_out, unless they have any strides
    Input<Buffer<float, 4>> state_in{"state_in"};
    Input<Buffer<float, 3>> keys_in{"keys_in"};       // (f, h, b): the sum of keys, not looked at where it does not count
    Input<int> run_time_degree{"run_time_degree"};    // where the parameter leaves it open
    Input<int> normalize{"normalize"};                // 1, or 0
    Input<float> scale{"scale"};                      // counts where normalize is 0
    Output<Buffer<void, 5>> out{"out"};               // (e, t, g, h, b)
    Output<Buffer<float, 4>> state_out{"state_out"};  // (e, f, h, b); it may be state_in
    Output<Buffer<float, 3>> keys_out{"keys_out"};    // (f, h, b); it may be keys_in

    void configure() {
        q.set_type(stored_type(dtype)), k.set_type(stored_type(dtype)), v.set_type(stored_type(dtype));
        out.set_type(stored_type(dtype));
    }
    void generate() {
        Var b("b"), h("h"), g("g"), i("i"), j("j"), d("d"), e("e"), f("f");
        const PowerSizes size = sizes();
        const Expr K = size.key ? Expr(size.key) : q.dim(0).extent();
        const Expr V = size.value ? Expr(size.value) : v.dim(0).extent();
        const bool known = size.degree && size.key;
        const Expr T = q.dim(1).extent(), D = known ? Expr(expanded_size(size.key, size.degree)) : state_in.dim(1).extent();
        const Expr counts = clamp(normalize, 0, 1);

        // Rows past the end repeat the last query, whose row is then not stored; their keys and values are zero.
        Func queries("q_chunk"), keys("k_chunk"), values("v_chunk"), decays("log_decay_chunk"), state("state_start");
        auto row = [&](const Expr &n) { return clamp(n, 0, T - 1); };
        queries(d, i, g, h, b) = widen(dtype, q(d, row(i), g, h, b));
        keys(d, j, h, b) = select(j < T, widen(dtype, k(d, row(j), h, b)), 0.0f);
        values(e, j, h, b) = select(j < T, widen(dtype, v(e, row(j), h, b)), 0.0f);
        decays(i, h, b) = select(i < T, log_decay(row(i), h, b), 0.0f);
        state(e, f, h, b) = state_in(e, f, h, b);
        Func start_of_keys("keys_start");
        start_of_keys(f, h, b) = keys_in(f, h, b);
        p = power(queries, keys, values, decays, state, start_of_keys, K, D, {run_time_degree, counts, scale}, size);

        out(e, i, g, h, b) = narrow(dtype, p.out(e, i, g, h, b));
        state_out(e, f, h, b) = p.state(e, f, h, b);
        keys_out(f, h, b) = p.keys_sum(f, h, b);
        p.result = out, p.state_out = state_out, p.keys_out = keys_out;

        // Layout. The same for every target.
        const Expr G = q.dim(2).extent(), H = q.dim(3).extent(), B = q.dim(4).extent();
        auto bounds = [](auto &buffer, const std::vector<Expr> &extents) {
            for (int m = 0; m < (int)extents.size(); m++) buffer.dim(m).set_bounds(0, extents[m]);
        };
        bounds(q, {K, T, G, H, B}), bounds(out, {V, T, G, H, B});
        bounds(k, {K, T, H, B}), bounds(v, {V, T, H, B});
        bounds(log_decay, {T, H, B}), log_decay.dim(0).set_stride(Expr());
        bounds(state_in, {V, D, H, B}), bounds(state_out, {V, D, H, B});
        bounds(keys_in, {D, H, B}), bounds(keys_out, {D, H, B});
        if (any_state_strides)
            state_in.dim(0).set_stride(Expr()), state_out.dim(0).set_stride(Expr());
        else if (size.value)
            state_in.dim(1).set_stride(V), state_out.dim(1).set_stride(V);
    }
    void schedule() {
        if (!using_autoscheduler()) apply_schedule(p, sizes(), get_pipeline(), get_target(), forced_schedule.value());
    }

private:
    PowerFuncs p;

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

HALIDE_REGISTER_GENERATOR(PowerGenerator, power)
