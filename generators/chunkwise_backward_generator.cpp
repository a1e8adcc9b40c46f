// Chunkwise backward kernel: declares the ABI, calls chunkwise_backward(), and scatters rows back to the caller's layout.
#include "../schedules/schedule.h"
#include "chunk_inputs.h"
#include "chunkwise_backward.h"
#include "decay.h"
#include "dtypes.h"

namespace {
using namespace Halide;
using namespace holdfast;

class ChunkwiseBackwardGenerator : public Generator<ChunkwiseBackwardGenerator> {
public:
    GeneratorParam<Dtype> dtype{"dtype", Dtype::f32, dtype_names()};  // of q, k, v, dout and their gradients
    GeneratorParam<int> chunk{"chunk", 64};
    GeneratorParam<int> key_size{"key_size", 64}, value_size{"value_size", 64};  // 0: any
    GeneratorParam<int> causal_tile{"causal_tile", 8};                           // 0: the chunk
    GeneratorParam<bool> round_operands{"round_operands", false};                // products read dtype: chunkwise_backward.h
    GeneratorParam<bool> any_state_strides{"any_state_strides", false};          // also along e: states may be value-major
    GeneratorParam<std::string> forced_schedule{"forced_schedule", ""};          // schedule.h

    // Layout: as in chunkwise_generator.cpp. A call is a segment of each sequence: its state at the start, the gradient of that
    // at its end.
    Input<Buffer<void, 5>> q{"q"};                     // (d, t, g, h, b)
    Input<Buffer<void, 4>> k{"k"};                     // (d, t, h, b)
    Input<Buffer<void, 4>> v{"v"};                     // (e, t, h, b)
    Input<Buffer<float, 3>> log_decay{"log_decay"};    // (t, h, b), any strides
    Input<Buffer<float, 5>> state_in{"state_in"};      // (e, d, s, h, b)
    Input<Buffer<void, 5>> dout{"dout"};               // (e, t, g, h, b)
    Input<Buffer<float, 5>> dstate_out{"dstate_out"};  // (e, d, s, h, b)
    Input<Buffer<int32_t, 2>> chunks{"chunks"};        // (field, slot): chunks.h
    Input<int> count{"count"};                         // chunks, final slots not counted
    Input<float> scale{"scale"};
    Input<int> want_dq{"want_dq"}, want_dk{"want_dk"};  // 1 or 0: not computed and not written
    Input<int> want_dv{"want_dv"}, want_dlog_decay{"want_dlog_decay"}, want_dstate{"want_dstate"};
    Output<Buffer<void, 5>> dq{"dq"};                   // (d, t, g, h, b)
    Output<Buffer<void, 4>> dk{"dk"};                   // (d, t, h, b), summed over g
    Output<Buffer<void, 4>> dv{"dv"};                   // (e, t, h, b), likewise
    Output<Buffer<float, 3>> dlog_decay{"dlog_decay"};  // (t, h, b), any strides, likewise
    Output<Buffer<float, 5>> dstate_in{"dstate_in"};    // (e, d, s, h, b); may not alias an input

    void configure() {
        const Type type = stored_type(dtype);
        q.set_type(type), k.set_type(type), v.set_type(type), dout.set_type(type);
        dq.set_type(type), dk.set_type(type), dv.set_type(type);
    }
    void generate() {
        Var b("b"), h("h"), g("g"), c("c"), i("i"), d("d"), e("e"), t("t"), s("s"), n("n");
        const ChunkwiseSizes size = sizes();
        const Expr D = size.key ? Expr(size.key) : q.dim(0).extent();
        const Expr E = size.value ? Expr(size.value) : v.dim(0).extent();
        const Expr T = q.dim(1).extent(), G = q.dim(2).extent(), H = q.dim(3).extent(), B = q.dim(4).extent();
        Func table("table");
        table(n, c) = chunks(n, c);
        Chunks at{table, count, chunks.dim(1).extent()};
        const Expr N = at.slots - count;

        const ChunkInputs x = in_chunks(dtype, at, q, k, v, log_decay, state_in, D, E);
        Func co("dout_chunks"), cz("dstate_end"), so("dout_stored");
        cz(e, d, s, h, b) = padded_states(dstate_out, D, E)(e, d, s, h, b);
        Expr row_of_dout = padded_rows(dout, E)(e, at.time(i, c, dout.dim(1).extent()), g, h, b);
        so(e, i, c, g, h, b) = select(i < at.length(c), row_of_dout, cast(stored_type(dtype), 0));
        co(e, i, c, g, h, b) = widen(dtype, so(e, i, c, g, h, b));
        r = chunkwise_backward(x.q, x.k, x.v, x.log_decay, x.state_in, co, cz, at, {D, E, G, H, B}, scale, size);
        r.q_stored = x.q_stored, r.k_stored = x.k_stored, r.v_stored = x.v_stored, r.dout_stored = so;
        r.dq_stored = Func("dq_stored"), r.dk_stored = Func("dk_stored"), r.dv_stored = Func("dv_stored");
        r.dq_stored(d, i, c, g, h, b) = narrow(dtype, r.dq(d, i, c, g, h, b));
        r.dk_stored(d, i, c, h, b) = narrow(dtype, r.dk(d, i, c, h, b));
        r.dv_stored(e, i, c, h, b) = narrow(dtype, r.dv(e, i, c, h, b));

        // Each row of a result is written once, by the chunk that holds it, if it is wanted. What only others need is left out
        // with them.
        auto rows = [&](const Expr &want, const char *name) {
            RDom over(0, size.chunk, 0, count, name);
            over.where(want != 0), over.where(over.x < at.length(over.y));
            return over;
        };
        r.over_dq = rows(want_dq, "over_dq"), r.over_dk = rows(want_dk, "over_dk"), r.over_dv = rows(want_dv, "over_dv");
        r.over_gate = rows(want_dlog_decay, "over_gate");
        auto time = [&](const RDom &over, auto &out, int axis) { return at.time(over.x, over.y, out.dim(axis).extent()); };
        dq(d, t, g, h, b) = undef(stored_type(dtype));
        dq(d, time(r.over_dq, dq, 1), g, h, b) = r.dq_stored(d, r.over_dq.x, r.over_dq.y, g, h, b);
        dk(d, t, h, b) = undef(stored_type(dtype));
        dk(d, time(r.over_dk, dk, 1), h, b) = r.dk_stored(d, r.over_dk.x, r.over_dk.y, h, b);
        dv(e, t, h, b) = undef(stored_type(dtype));
        dv(e, time(r.over_dv, dv, 1), h, b) = r.dv_stored(e, r.over_dv.x, r.over_dv.y, h, b);
        // A decay that keeps nothing has gradient 0, not the rounding of a sum.
        dlog_decay(t, h, b) = undef<float>();
        dlog_decay(time(r.over_gate, dlog_decay, 0), h, b) =
            select(x.log_decay(r.over_gate.x, r.over_gate.y, h, b) > least_log_decay,
                   r.dlog_decay(r.over_gate.x, r.over_gate.y, h, b), 0.0f);
        r.over_states = RDom(0, N, "over_states");
        r.over_states.where(want_dstate != 0);
        dstate_in(e, d, s, h, b) = undef<float>();
        dstate_in(e, d, r.over_states, h, b) = r.dstate(e, d, at.first(r.over_states), h, b);
        r.result_dq = dq, r.result_dk = dk, r.result_dv = dv, r.result_dlog_decay = dlog_decay, r.dstate_in = dstate_in;

        // Layout. The same for every target.
        auto bounds = [](auto &buffer, const std::vector<Expr> &extents) {
            for (int m = 0; m < (int)extents.size(); m++) buffer.dim(m).set_bounds(0, extents[m]);
        };
        bounds(q, {D, T, G, H, B}), bounds(k, {D, T, H, B}), bounds(v, {E, T, H, B}), bounds(dout, {E, T, G, H, B});
        bounds(dq, {D, T, G, H, B}), bounds(dk, {D, T, H, B}), bounds(dv, {E, T, H, B});
        bounds(log_decay, {T, H, B}), log_decay.dim(0).set_stride(Expr());
        bounds(dlog_decay, {T, H, B}), dlog_decay.dim(0).set_stride(Expr());
        bounds(state_in, {E, D, N, H, B}), bounds(dstate_out, {E, D, N, H, B}), bounds(dstate_in, {E, D, N, H, B});
        if (any_state_strides)
            state_in.dim(0).set_stride(Expr()), dstate_out.dim(0).set_stride(Expr()), dstate_in.dim(0).set_stride(Expr());
        bounds(chunks, {chunk_fields, at.slots}), chunks.dim(1).set_stride(chunk_fields);
    }
    void schedule() {
        if (!using_autoscheduler()) apply_schedule(r, sizes(), get_pipeline(), get_target(), forced_schedule.value());
    }

private:
    ChunkwiseBackwardFuncs r;
    ChunkwiseSizes sizes() const {
        const int tile = causal_tile;
        return {chunk, key_size, value_size, tile ? tile : (int)chunk, round_operands ? (Dtype)dtype : Dtype::f32};
    }
};
}  // namespace

HALIDE_REGISTER_GENERATOR(ChunkwiseBackwardGenerator, chunkwise_backward)
