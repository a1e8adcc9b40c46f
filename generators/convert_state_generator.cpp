// Copies states and sums of keys from one place and order of features to another, where the kernels run: what goes into
// kernels, which know the tight order alone, and what comes out of them. Any strides, also 0.
//
// Feature x[a] x[b], a <= b, is a + b (b + 1) / 2 of the tight order. In the tiled one it is 16 a + b % 16 of the block of b, of
// which block Y begins at 128 Y (Y + 1); where a is in that block too, it is there a second time as x[b] x[a].
#include "../schedules/schedule.h"
#include "expansion.h"

namespace {
using namespace Halide;
using namespace holdfast;

Expr triangle(const Expr &n) { return n * (n + 1) / 2; }

/// The largest n with triangle(n) <= x, of x below 2^27. A root of floats is one off at most.
Expr triangle_below(const Expr &x) {
    const Expr near = cast<int32_t>((sqrt(cast<float>(8 * x + 1)) - 1.0f) / 2.0f);
    return near + select(triangle(near + 1) <= x, 1, triangle(near) > x, -1, 0);
}

/// x[a] x[b] in the block of b.
Expr tiled(const Expr &a, const Expr &b) { return 256 * triangle(b / 16) + 16 * a + b % 16; }

class ConvertStateGenerator : public Generator<ConvertStateGenerator> {
public:
    GeneratorParam<std::string> forced_schedule{"forced_schedule", ""};  // schedule.h

    Input<Buffer<float, 4>> from{"from"};  // (e, f, h, b), any strides
    Input<int> order{"order"};             // FeatureOrder
    Output<Buffer<float, 4>> to{"to"};     // likewise; it shares no memory with `from`

    void generate() {
        Var e("e"), f("f"), h("h"), b("b");
        const float root = 1.41421356237309504880f;
        auto value = [&](const Expr &feature) { return from(e, clamp(feature, 0, from.dim(1).extent() - 1), h, b); };

        // To the tiled order: f is x[o] x[i]. The tight one has sqrt(2) x[o] x[i] on both sides; of the tiled one queries have
        // x[o] x[i], so that all of its features that are that product add up to sqrt(2) times the tight one. Of gradients the
        // factor of a single one is the inverse (runtime/src/expansion.cpp).
        const Expr alone = select(order < (int)gradient_to_tiled_order, root, 1 / root);
        const Expr block = triangle_below(f / 256), in_block = f - 256 * triangle(block);
        const Expr o = in_block / 16, i = 16 * block + in_block % 16;
        const Expr tight = value(min(o, i) + triangle(max(o, i)));
        const Expr to_tiled = select(o == i, tight, o / 16 == block, tight / root, tight * alone);
        // And back: f is x[a] x[c].
        const Expr c = triangle_below(f), a = f - triangle(c), mirrored = a / 16 == c / 16;
        const Expr one = value(tiled(a, c)), other = value(select(mirrored, tiled(c, a), tiled(a, c)));
        const Expr to_tight = select(a == c, one, mirrored, (one + other) / root, one / alone);

        auto is = [&](FeatureOrder wanted, FeatureOrder of_gradients) {
            return order == (int)wanted || order == (int)of_gradients;
        };
        to(e, f, h, b) = select(is(to_tiled_order, gradient_to_tiled_order), to_tiled,
                                is(to_tight_order, gradient_to_tight_order), to_tight, value(f));
        auto layout = [&](auto &buffer, const Expr &features) {
            const Expr extents[] = {to.dim(0).extent(), features, to.dim(2).extent(), to.dim(3).extent()};
            for (int m = 0; m < 4; m++) buffer.dim(m).set_bounds(0, extents[m]);
            buffer.dim(0).set_stride(Expr());
        };
        layout(from, from.dim(1).extent()), layout(to, to.dim(1).extent());
        s.converted = to;
    }
    void schedule() {
        if (!using_autoscheduler())
            apply_schedule(s, ConvertStateSizes{}, get_pipeline(), get_target(), forced_schedule.value());
    }

private:
    ConvertStateFuncs s;
};
}  // namespace

HALIDE_REGISTER_GENERATOR(ConvertStateGenerator, convert_state)
