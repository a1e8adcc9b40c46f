// Parallel forward kernel: declares the ABI, calls parallel(), and scatters rows and weights back to the caller's layout.
#include "../schedules/schedule.h"
#include "dtypes.h"
#include "padded.h"
#include "parallel.h"

namespace {
using namespace Halide;
using namespace holdfast;

class ParallelGenerator : public Generator<ParallelGenerator> {
public:
    GeneratorParam<Dtype> dtype{"dtype", Dtype::f32, dtype_names()};             // of q, k, v, out and weights
    GeneratorParam<int> chunk{"chunk", 64};                                      // tokens in a block
    GeneratorParam<int> key_size{"key_size", 64}, value_size{"value_size", 64};  // 0: any
    GeneratorParam<int> causal_tile{"causal_tile", 8};                           // 0: the block
    GeneratorParam<bool> any_state_strides{"any_state_strides", false};          // as in chunkwise_generator.cpp
    GeneratorParam<std::string> forced_schedule{"forced_schedule", ""};          // schedule.h

    // A contiguous last axis and any other strides; a stride may be 0. The rows of q are tokens of k and v, those from
    // first_block * chunk on: calls for parts of the rows make one sequence. All keys until the last of the rows are wanted.
    Input<Buffer<void, 5>> q{"q"};                   // (d, t, g, h, b): g queries share a key
    Input<Buffer<void, 4>> k{"k"}, v{"v"};           // (d, j, h, b), (e, j, h, b)
    Input<Buffer<float, 3>> log_decay{"log_decay"};  // (j, h, b), any strides
    Input<Buffer<float, 5>> state_in{"state_in"};    // (e, f, s, h, b): s of extent 1, or 0: none
    Input<Buffer<float, 4>> keys_in{"keys_in"};      // (f, s, h, b), the sum of keys: as state_in, where normalized
    Input<int> first_block{"first_block"};
    Input<int> degree{"degree"};          // 1 to 4; 1 where there is a final state
    Input<int> normalized{"normalized"};  // 1 or 0
    Input<float> scale{"scale"};
    Output<Buffer<void, 5>> out{"out"};  // (e, t, g, h, b)
    // (e, d, s, h, b): s of extent 1, or 0: not wanted. On GPUs it may be state_in, and keys_out keys_in.
    Output<Buffer<float, 5>> state_out{"state_out"};
    Output<Buffer<float, 4>> keys_out{"keys_out"};  // (d, s, h, b), likewise
    // (j, s, t, g, h, b), s likewise. It has at least as many columns as there are keys; those before them and after them become
    // 0. s comes before t: Halide checks products of the extents so far, and T x T is soon more than it takes.
    Output<Buffer<void, 6>> weights{"weights"};

    void configure() {
        q.set_type(stored_type(dtype)), k.set_type(stored_type(dtype)), v.set_type(stored_type(dtype));
        out.set_type(stored_type(dtype)), weights.set_type(stored_type(dtype));
    }
    void generate() {
        Var b("b"), h("h"), g("g"), c("c"), n("n"), i("i"), j("j"), d("d"), e("e"), t("t"), s("s");
        const int C = chunk;
        const Expr D = key_size ? Expr(key_size.value()) : q.dim(0).extent();
        const Expr E = value_size ? Expr(value_size.value()) : v.dim(0).extent();
        const Expr rows = out.dim(1).extent(), tokens = k.dim(1).extent(), N = state_in.dim(2).extent();
        const Expr features = state_in.dim(1).extent();
        const Expr row_blocks = (rows + C - 1) / C, blocks = (tokens + C - 1) / C;

        // Tokens past the end repeat the last one, so that they hold numbers of the same sequence; what they give is
        // multiplied by zero or not stored.
        auto row = [&](const Expr &i, const Expr &c) { return clamp((c - first_block) * C + i, 0, rows - 1); };
        auto token = [&](const Expr &j, const Expr &n) { return clamp(n * C + j, 0, tokens - 1); };
        Func bq("q_blocks"), bk("k_blocks"), bv("v_blocks"), bg("log_decay_blocks"), bs("state_start"), bz("keys_start");
        bq(d, i, c, g, h, b) = widen(dtype, padded_rows(q, D)(d, row(i, c), g, h, b));
        bk(d, j, n, h, b) = widen(dtype, padded_rows(k, D)(d, token(j, n), h, b));
        bv(e, j, n, h, b) = widen(dtype, padded_rows(v, E)(e, token(j, n), h, b));
        bg(j, n, h, b) = select(n * C + j < tokens, log_decay(token(j, n), h, b), 0.0f);
        bs(e, d, s, h, b) = padded_states(state_in, features, E)(e, d, s, h, b);
        bz(d, s, h, b) = padded_rows(keys_in, features)(d, s, h, b);
        f = parallel(bq, bk, bv, bg, bs, bz, {tokens, degree, normalized, scale, D, features, N}, sizes());

        f.over_result = RDom(0, C, first_block, row_blocks, "over_result");
        RVar i_out = f.over_result.x, c_out = f.over_result.y;
        f.over_result.where(i_out < rows - opaque(c_out - first_block) * C);
        out(e, t, g, h, b) = undef(stored_type(dtype));
        out(e, row(i_out, c_out), g, h, b) = narrow(dtype, f.out(e, i_out, c_out, g, h, b));
        state_out(e, d, s, h, b) = f.state(e, d, h, b);
        keys_out(d, s, h, b) = f.keys(d, h, b);

        weights(j, s, t, g, h, b) = cast(stored_type(dtype), 0);
        f.over_weights = RDom(0, C, 0, C, 0, blocks, first_block, row_blocks, "over_weights");
        RVar jw = f.over_weights.x, iw = f.over_weights.y, nw = f.over_weights.z, cw = f.over_weights.w;
        f.over_weights.where(nw <= cw), f.over_weights.where(nw * C + jw <= cw * C + iw);
        f.over_weights.where((cw - first_block) * C + iw < rows);
        weights(token(jw, nw), s, row(iw, cw), g, h, b) = narrow(dtype, f.weights_shown(iw, jw, nw, cw, g, h, b));
        f.result = out, f.state_out = state_out, f.keys_out = keys_out, f.weights_out = weights;

        // Layout. The same for every target.
        const Expr R = out.dim(2).extent(), H = out.dim(3).extent(), B = out.dim(4).extent();
        auto bounds = [](auto &buffer, const std::vector<Expr> &extents) {
            for (int m = 0; m < (int)extents.size(); m++)
                if (extents[m].defined()) buffer.dim(m).set_bounds(0, extents[m]);
        };
        bounds(q, {D, rows, R, H, B}), bounds(out, {E, rows, R, H, B});
        bounds(k, {D, tokens, H, B}), bounds(v, {E, tokens, H, B});
        bounds(log_decay, {tokens, H, B}), log_decay.dim(0).set_stride(Expr());
        bounds(state_in, {E, features, N, H, B}), bounds(keys_in, {features, N, H, B});
        bounds(state_out, {E, D, state_out.dim(2).extent(), H, B});
        bounds(keys_out, {D, keys_out.dim(1).extent(), H, B});
        bounds(weights, {Expr(), weights.dim(1).extent(), rows, R, H, B});
        if (any_state_strides) state_in.dim(0).set_stride(Expr()), state_out.dim(0).set_stride(Expr());
    }
    void schedule() {
        if (!using_autoscheduler()) apply_schedule(f, sizes(), get_pipeline(), get_target(), forced_schedule.value());
    }

private:
    ParallelFuncs f;
    ParallelSizes sizes() const {
        const int tile = causal_tile;
        return {chunk, key_size, value_size, tile ? tile : (int)chunk};
    }
};
}  // namespace

HALIDE_REGISTER_GENERATOR(ParallelGenerator, parallel)
