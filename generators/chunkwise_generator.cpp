// Chunkwise forward kernel: declares the ABI, calls chunkwise(), and scatters rows back to the caller's layout.
#include "../schedules/schedule.h"
#include "chunk_inputs.h"
#include "chunkwise.h"
#include "dtypes.h"

namespace {
using namespace Halide;
using namespace holdfast;

class ChunkwiseGenerator : public Generator<ChunkwiseGenerator> {
public:
    GeneratorParam<Dtype> dtype{"dtype", Dtype::f32, dtype_names()};  // of q, k, v and out
    GeneratorParam<int> chunk{"chunk", 64};
    GeneratorParam<int> key_size{"key_size", 64}, value_size{"value_size", 64};  // 0: any
    GeneratorParam<int> causal_tile{"causal_tile", 8};  // measured best of 8, 16, 32 on AVX-512 and AVX2; 0: the chunk
    GeneratorParam<bool> round_operands{"round_operands", false};  // matrix products read dtype: operands.h
    GeneratorParam<int> row_alignment{"row_alignment", 1};  // rows of q, k, v and out start at multiples of so many elements
    GeneratorParam<bool> any_state_strides{"any_state_strides", false};  // also along e: states may be value-major
    GeneratorParam<std::string> forced_schedule{"forced_schedule", ""};  // schedule.h

    // [B, T, heads, D] with a contiguous last axis and any other strides; a stride may be 0 (one decay per head). The heads of q
    // and out are those of the others, h, and g in the group that shares one.
    Input<Buffer<void, 5>> q{"q"};                   // (d, t, g, h, b)
    Input<Buffer<void, 4>> k{"k"};                   // (d, t, h, b)
    Input<Buffer<void, 4>> v{"v"};                   // (e, t, h, b)
    Input<Buffer<float, 3>> log_decay{"log_decay"};  // (t, h, b), any strides
    Input<Buffer<float, 5>> state_in{"state_in"};    // (e, d, s, h, b): one state per sequence s of batch entry b
    Input<Buffer<int32_t, 2>> chunks{"chunks"};      // (field, slot): chunks.h
    Input<int> count{"count"};                       // chunks, final slots not counted
    Input<float> scale{"scale"};
    Output<Buffer<void, 5>> out{"out"};               // (e, t, g, h, b)
    Output<Buffer<float, 5>> state_out{"state_out"};  // (e, d, s, h, b); may not alias state_in

    void configure() {
        q.set_type(stored_type(dtype)), k.set_type(stored_type(dtype)), v.set_type(stored_type(dtype));
        out.set_type(stored_type(dtype));
    }
    void generate() {
        Var b("b"), h("h"), g("g"), c("c"), i("i"), d("d"), e("e"), t("t"), s("s"), n("n");
        const ChunkwiseSizes size = sizes();
        const Expr D = size.key ? Expr(size.key) : q.dim(0).extent();
        const Expr E = size.value ? Expr(size.value) : v.dim(0).extent();
        Func table("table");
        table(n, c) = chunks(n, c);
        Chunks at{table, count, chunks.dim(1).extent()};

        const ChunkInputs x = in_chunks(dtype, at, q, k, v, log_decay, state_in, D, E);
        f = chunkwise(x.q, x.k, x.v, x.log_decay, x.state_in, at, D, scale, size);
        f.q_stored = x.q_stored, f.k_stored = x.k_stored, f.v_stored = x.v_stored;

        // Each row of the result is written once, by the chunk that holds it. Without heads of queries there are none, and what
        // computes them costs nothing: a call for states alone.
        f.over_result = RDom(0, size.chunk, 0, select(out.dim(2).extent() > 0, count, 0), "over_result");
        RVar row = f.over_result.x, in = f.over_result.y;
        f.over_result.where(row < at.length(in));
        out(e, t, g, h, b) = undef(stored_type(dtype));
        f.out_stored = Func("out_stored");
        f.out_stored(e, i, c, g, h, b) = narrow(dtype, f.out(e, i, c, g, h, b));
        out(e, at.time(row, in, out.dim(1).extent()), g, h, b) = f.out_stored(e, row, in, g, h, b);
        state_out(e, d, s, h, b) = f.state(e, d, count + s, h, b);
        f.result = out, f.state_out = state_out;

        // Layout. The same for every target.
        const Expr T = out.dim(1).extent(), G = out.dim(2).extent(), H = out.dim(3).extent(), B = out.dim(4).extent(),
                   N = at.slots - count;
        auto bounds = [](auto &buffer, const std::vector<Expr> &extents) {
            for (int m = 0; m < (int)extents.size(); m++) buffer.dim(m).set_bounds(0, extents[m]);
        };
        bounds(q, {D, T, G, H, B}), bounds(k, {D, T, H, B});
        bounds(v, {E, T, H, B}), bounds(out, {E, T, G, H, B});
        bounds(log_decay, {T, H, B}), log_decay.dim(0).set_stride(Expr());
        bounds(state_in, {E, D, N, H, B}), bounds(state_out, {E, D, N, H, B});
        if (any_state_strides) state_in.dim(0).set_stride(Expr()), state_out.dim(0).set_stride(Expr());
        auto align = [&](auto &buffer) {
            if (row_alignment == 1) return;
            buffer.set_host_alignment(row_alignment * stored_type(dtype).bytes());
            for (int m = 1; m < buffer.dimensions(); m++)
                buffer.dim(m).set_stride(buffer.dim(m).stride() / row_alignment * row_alignment);
        };
        align(q), align(k), align(v), align(out);
        bounds(chunks, {chunk_fields, at.slots}), chunks.dim(1).set_stride(chunk_fields);
    }
    void schedule() {
        if (!using_autoscheduler()) apply_schedule(f, sizes(), get_pipeline(), get_target(), forced_schedule.value());
    }

private:
    ChunkwiseFuncs f;
    ChunkwiseSizes sizes() const {
        const int tile = causal_tile;
        return {chunk, key_size, value_size, tile ? tile : (int)chunk, round_operands ? (Dtype)dtype : Dtype::f32};
    }
};
}  // namespace

HALIDE_REGISTER_GENERATOR(ChunkwiseGenerator, chunkwise)
