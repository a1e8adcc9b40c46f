// Gradient of the parallel form: declares the ABI, calls parallel_backward(), and scatters rows back to the caller's layout.
#include "../schedules/schedule.h"
#include "decay.h"
#include "dtypes.h"
#include "padded.h"
#include "parallel_backward.h"

namespace {
using namespace Halide;
using namespace holdfast;

class ParallelBackwardGenerator : public Generator<ParallelBackwardGenerator> {
public:
    GeneratorParam<Dtype> dtype{"dtype", Dtype::f32, dtype_names()};             // of all but log_decay and dlog_decay
    GeneratorParam<int> chunk{"chunk", 64};                                      // tokens in a block
    GeneratorParam<int> key_size{"key_size", 64}, value_size{"value_size", 64};  // 0: any
    GeneratorParam<std::string> forced_schedule{"forced_schedule", ""};          // schedule.h

    // Layout: as in parallel_generator.cpp. A call has whole sequences.
    Input<Buffer<void, 5>> q{"q"};                   // (d, t, g, h, b): g queries share a key
    Input<Buffer<void, 4>> k{"k"}, v{"v"};           // (d, t, h, b), (e, t, h, b)
    Input<Buffer<float, 3>> log_decay{"log_decay"};  // (t, h, b), any strides
    Input<Buffer<void, 5>> out{"out"};               // (e, t, g, h, b): of the forward; looked at where normalized
    Input<Buffer<void, 5>> dout{"dout"};             // (e, t, g, h, b)
    Input<int> degree{"degree"};                     // 1 to 4
    Input<int> normalized{"normalized"};             // 1 or 0
    Input<float> scale{"scale"};
    Input<int> want_dq{"want_dq"}, want_dk{"want_dk"}, want_dv{"want_dv"}, want_dlog_decay{"want_dlog_decay"};  // 1 or 0
    // As q, k, v and log_decay. What is not wanted is not written.
    Output<Buffer<void, 5>> dq{"dq"};
    Output<Buffer<void, 4>> dk{"dk"}, dv{"dv"};
    Output<Buffer<float, 3>> dlog_decay{"dlog_decay"};

    void configure() {
        const Type stored = stored_type(dtype);
        q.set_type(stored), k.set_type(stored), v.set_type(stored), out.set_type(stored), dout.set_type(stored);
        dq.set_type(stored), dk.set_type(stored), dv.set_type(stored);
    }
    void generate() {
        Var b("b"), h("h"), g("g"), c("c"), n("n"), i("i"), j("j"), d("d"), e("e"), t("t");
        const int C = chunk;
        const Expr D = key_size ? Expr(key_size.value()) : q.dim(0).extent();
        const Expr E = value_size ? Expr(value_size.value()) : v.dim(0).extent();
        const Expr tokens = k.dim(1).extent(), R = q.dim(2).extent(), blocks = (tokens + C - 1) / C;

        // Tokens past the end repeat the last one, with a gradient of 0.
        auto token = [&](const Expr &i, const Expr &c) { return clamp(c * C + i, 0, tokens - 1); };
        Func bq("q_blocks"), bk("k_blocks"), bv("v_blocks"), bg("log_decay_blocks"), bo("out_blocks"), bd("dout_blocks");
        bq(d, i, c, g, h, b) = widen(dtype, padded_rows(q, D)(d, token(i, c), g, h, b));
        bk(d, j, n, h, b) = widen(dtype, padded_rows(k, D)(d, token(j, n), h, b));
        bv(e, j, n, h, b) = widen(dtype, padded_rows(v, E)(e, token(j, n), h, b));
        bg(j, n, h, b) = select(n * C + j < tokens, log_decay(token(j, n), h, b), 0.0f);
        bo(e, i, c, g, h, b) = widen(dtype, padded_rows(out, E)(e, token(i, c), g, h, b));
        bd(e, i, c, g, h, b) = select(c * C + i < tokens, widen(dtype, padded_rows(dout, E)(e, token(i, c), g, h, b)), 0.0f);
        f = parallel_backward(bq, bk, bv, bg, bo, bd, E, R, {tokens, degree, normalized, scale, D, D, 0},
                              {want_dq, want_dk, want_dv, want_dlog_decay}, sizes());

        auto rows = [&](RDom &over, const Expr &want) {
            over = RDom(0, C, 0, blocks, "over_result");
            over.where(over.x < tokens - opaque(over.y) * C), over.where(want != 0);
            return token(over.x, over.y);
        };
        Expr row = rows(f.over_result_dq, want_dq);
        RVar i_out = f.over_result_dq.x, c_out = f.over_result_dq.y;
        dq(d, t, g, h, b) = undef(stored_type(dtype));
        dq(d, row, g, h, b) = narrow(dtype, f.dq(d, i_out, c_out, g, h, b) * f.f.weights.unit(i_out, c_out, g, h, b));
        row = rows(f.over_result_dk, want_dk), i_out = f.over_result_dk.x, c_out = f.over_result_dk.y;
        dk(d, t, h, b) = undef(stored_type(dtype));
        dk(d, row, h, b) = narrow(dtype, f.dk(d, i_out, c_out, h, b));
        row = rows(f.over_result_dv, want_dv), i_out = f.over_result_dv.x, c_out = f.over_result_dv.y;
        dv(e, t, h, b) = undef(stored_type(dtype));
        dv(e, row, h, b) = narrow(dtype, f.dv(e, i_out, c_out, h, b));
        row = rows(f.over_result_dlog_decay, want_dlog_decay);
        i_out = f.over_result_dlog_decay.x, c_out = f.over_result_dlog_decay.y;
        dlog_decay(t, h, b) = undef<float>();
        // What keeps nothing has gradient 0, not the rounding of a sum.
        dlog_decay(row, h, b) = select(bg(i_out, c_out, h, b) > least_log_decay, f.dlog_decay(i_out, c_out, h, b), 0.0f);
        f.result_dq = dq, f.result_dk = dk, f.result_dv = dv, f.result_dlog_decay = dlog_decay;

        // Layout. The same for every target.
        const Expr H = k.dim(2).extent(), B = k.dim(3).extent();
        auto bounds = [](auto &buffer, const std::vector<Expr> &extents) {
            for (int m = 0; m < (int)extents.size(); m++) buffer.dim(m).set_bounds(0, extents[m]);
        };
        bounds(q, {D, tokens, R, H, B}), bounds(dq, {D, tokens, R, H, B});
        bounds(k, {D, tokens, H, B}), bounds(dk, {D, tokens, H, B});
        bounds(v, {E, tokens, H, B}), bounds(dv, {E, tokens, H, B});
        bounds(out, {E, tokens, R, H, B}), bounds(dout, {E, tokens, R, H, B});
        bounds(log_decay, {tokens, H, B}), log_decay.dim(0).set_stride(Expr());
        bounds(dlog_decay, {tokens, H, B}), dlog_decay.dim(0).set_stride(Expr());
    }
    void schedule() {
        if (!using_autoscheduler()) apply_schedule(f, sizes(), get_pipeline(), get_target(), forced_schedule.value());
    }

private:
    ParallelBackwardFuncs f;
    // No causal tile: Halide cannot differentiate a sum whose RDom has a predicate on a pure variable.
    ParallelSizes sizes() const { return {chunk, key_size, value_size, chunk}; }
};
}  // namespace

HALIDE_REGISTER_GENERATOR(ParallelBackwardGenerator, parallel_backward)
