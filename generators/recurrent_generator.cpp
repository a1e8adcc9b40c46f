// Recurrent kernel, blocks of tokens: declares the ABI and calls recurrent(). The state is updated where it lies.
#include "../schedules/schedule.h"
#include "dtypes.h"
#include "recurrent.h"

#include <algorithm>

namespace {
using namespace Halide;
using namespace holdfast;

class RecurrentGenerator : public Generator<RecurrentGenerator> {
public:
    GeneratorParam<Dtype> dtype{"dtype", Dtype::f32, dtype_names()};             // of q, k, v and out
    GeneratorParam<int> key_size{"key_size", 64}, value_size{"value_size", 64};  // 0: any
    GeneratorParam<int> chunk{"chunk", 0};                                       // tokens of a block; 0: one, a step
    GeneratorParam<bool> any_state_strides{"any_state_strides", false};          // as in chunkwise_generator.cpp
    GeneratorParam<std::string> forced_schedule{"forced_schedule", ""};          // schedule.h

    // [B, heads, blocks, tokens, D] with a contiguous last axis and any other strides; a stride may be 0 (one decay per head). The
    // heads of q and out are those of the others, h, and g in the group that shares one; of more than one the kernel takes one token.
    Input<Buffer<void, 6>> q{"q"};                   // (d, i, n, g, h, b)
    Input<Buffer<void, 5>> k{"k"};                   // (d, i, n, h, b)
    Input<Buffer<void, 5>> v{"v"};                   // (e, i, n, h, b)
    Input<Buffer<float, 4>> log_decay{"log_decay"};  // (i, n, h, b), any strides
    Input<float> scale{"scale"};
    // .0, the state, read and written, with a stride of 0 along tokens and blocks; .1, memory for sums, with one of 0 along d:
    // recurrent.h
    Output<Func> state_and_sum{"state_and_sum", {Float(32), Float(32)}, 6};  // (e, i, d, n, h, b)
    Output<Buffer<void, 6>> out{"out"};                                      // (e, i, n, g, h, b)

    void configure() {
        q.set_type(stored_type(dtype)), k.set_type(stored_type(dtype)), v.set_type(stored_type(dtype));
        out.set_type(stored_type(dtype));
    }
    void generate() {
        Var b("b"), h("h"), g("g"), n("n"), i("i"), d("d"), e("e");
        const Expr D = key_size ? Expr(key_size.value()) : q.dim(0).extent();
        const Expr E = value_size ? Expr(value_size.value()) : v.dim(0).extent();
        const int I = tokens();
        const Expr N = out.dim(2).extent();
        Func queries("queries"), keys("keys"), values("values"), decays("log_decays");
        queries(d, i, n, g, h, b) = widen(dtype, q(d, i, n, g, h, b));
        keys(d, i, n, h, b) = widen(dtype, k(d, i, n, h, b));
        values(e, i, n, h, b) = widen(dtype, v(e, i, n, h, b));
        decays(i, n, h, b) = log_decay(i, n, h, b);
        f = recurrent(queries, keys, values, decays, D, I, scale);
        state_and_sum = f.state_and_sum;
        out(e, i, n, g, h, b) = narrow(dtype, f.out(e, i, n, g, h, b));
        f.result = out;

        // Layout. The same for every target.
        OutputImageParam state = f.state_and_sum.output_buffers()[0], sum = f.state_and_sum.output_buffers()[1];
        const Expr G = out.dim(3).extent(), H = out.dim(4).extent(), B = out.dim(5).extent();
        auto bounds = [](auto &buffer, const std::vector<Expr> &extents) {
            for (int m = 0; m < (int)extents.size(); m++) buffer.dim(m).set_bounds(0, extents[m]);
        };
        bounds(q, {D, I, N, G, H, B}), bounds(k, {D, I, N, H, B});
        bounds(v, {E, I, N, H, B}), bounds(out, {E, I, N, G, H, B});
        bounds(state, {E, I, D, N, H, B});  // and those of sum, with it
        if (any_state_strides) state.dim(0).set_stride(Expr());
        bounds(log_decay, {I, N, H, B}), log_decay.dim(0).set_stride(Expr());
        for (int along : {1, 3}) state.dim(along).set_stride(0);
        sum.dim(1).set_stride(E), sum.dim(2).set_stride(0);
    }
    void schedule() {
        if (!using_autoscheduler())
            apply_schedule(f, RecurrentSizes{key_size, value_size, tokens()}, get_pipeline(), get_target(),
                           forced_schedule.value());
    }

private:
    RecurrentFuncs f;

    int tokens() const { return std::max(chunk.value(), 1); }
};
}  // namespace

HALIDE_REGISTER_GENERATOR(RecurrentGenerator, recurrent)
