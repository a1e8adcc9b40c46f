// D, and the conversion of states from one order of features to another.
#include "expansion.h"

#include "failure.h"
#include "context.h"
#include "tensor.h"

#include <algorithm>
#include <cstring>

namespace holdfast {

int64_t expanded_size(int64_t K, int degree, holdfast_expansion expansion, int64_t most) {
    double size = 1;  // binomials, exact as far as they matter
    for (int n = 1; n <= degree; n++) size = size * (double)(K + n - 1) / n;
    if (expansion == HOLDFAST_EXPANSION_TILED) size = 128.0 * (double)(K / 16) * (double)(K / 16 + 1);
    return (int64_t)std::min(size, (double)most + 1);
}

/// Where x[a] x[b] is in the tiled order, in the block of b; a below the end of that.
static int64_t tiled_index(int64_t a, int64_t b) {
    const int64_t block = b / 16;
    return 128 * block * (block + 1) + a * 16 + b % 16;
}

void convert(const Features &from, holdfast_expansion order, const Features &to, holdfast_expansion wanted, int64_t D,
             int64_t K, int64_t columns, Of of) {
    if (order == wanted) {
        for (int64_t f = 0; f < D; f++) {
            if (from.column == 1 && to.column == 1)
                std::memcpy(&to(f, 0), &from(f, 0), columns * sizeof(float));
            else
                for (int64_t e = 0; e < columns; e++) to(f, e) = from(f, e);
        }
        return;
    }
    // phi(q) . state is the same in both. The tight order has sqrt(2) x[a] x[b] on both sides; the tiled one x[a] x[b] for
    // queries, so that all of its features that are that product add up to sqrt(2) times the tight one. A gradient's are the
    // other way round: the factor of a single one is the inverse, the others share what there is, and are added, alike.
    constexpr float root = 1.41421356237309504880f;
    const float alone = of == Of::states ? root : 1 / root;
    for (int64_t b = 0, f = 0; b < K; b++)
        for (int64_t a = 0; a <= b; a++, f++) {
            const bool twice = a != b && a / 16 == b / 16;  // also as x[b] x[a]
            const int64_t one = tiled_index(a, b), mirrored = twice ? tiled_index(b, a) : one;
            for (int64_t e = 0; e < columns; e++) {
                if (wanted == HOLDFAST_EXPANSION_TILED) {
                    const float value = from(f, e);
                    to(one, e) = a == b ? value : twice ? value / root : value * alone;
                    if (twice) to(mirrored, e) = value / root;
                } else {
                    const float value = from(one, e);
                    to(f, e) = a == b ? value : twice ? (value + from(mirrored, e)) / root : value / alone;
                }
            }
        }
}

}  // namespace holdfast

using namespace holdfast;

extern "C" {

int64_t holdfast_state_size(int64_t key_size, int32_t degree, int32_t expansion) {
    const bool tiled = expansion == HOLDFAST_EXPANSION_TILED;
    if (key_size < 1 || degree < 0 || degree > 4 || expansion < 0 || expansion > HOLDFAST_EXPANSION_TILED) return 0;
    if (tiled && (degree != 2 || key_size % 16)) return 0;
    constexpr int64_t most = (int64_t)1 << 53;  // exact until there
    const int64_t size = expanded_size(key_size, std::max(degree, 1), (holdfast_expansion)expansion, most);
    return size > most ? 0 : size;
}

holdfast_status holdfast_convert_state(holdfast_context *context, int64_t key_size, const DLTensor *from,
                                       int32_t from_expansion, DLTensor *to, int32_t to_expansion) {
    return guarded(context, [&](holdfast_context &) {
        if (key_size < 16 || key_size % 16)
            fail(HOLDFAST_INVALID_ARGUMENT, "key_size is ", key_size, "; expected a multiple of 16, at least 16");
        const bool state = from && from->ndim == 4;
        auto checked = [&](const char *name, const DLTensor *tensor, const char *option, int32_t expansion) {
            if (expansion < 0 || expansion > HOLDFAST_EXPANSION_TILED)
                fail(HOLDFAST_INVALID_ARGUMENT, option, " is ", expansion, "; expected 0 to ", (int)HOLDFAST_EXPANSION_TILED);
            const TensorSpec spec{name, state ? "NhDV" : "NhD"};
            const Tensor t = check_tensor(spec, tensor);
            if (!t.on_host()) fail(HOLDFAST_UNSUPPORTED, name, " is on ", describe(t.device), "; expected the CPU");
            check_extent(spec, t, 2, holdfast_state_size(key_size, 2, expansion), "the size of key_size features expanded");
            return t;
        };
        const Tensor in = checked("from", from, "from_expansion", from_expansion);
        const Tensor out = checked("to", to, "to_expansion", to_expansion);
        const TensorSpec spec{"to", state ? "NhDV" : "NhD"};
        for (int axis : {0, 1, 3})
            if (axis < in.rank) check_extent(spec, out, axis, in.shape[axis], "that of from");
        check_distinct_elements(out), check_no_overlap(out, in);
        auto features = [&](const Tensor &t, int64_t n, int64_t h) {
            return Features{t.at(n, h), t.stride[2], state ? t.stride[3] : 1};
        };
        for (int64_t n = 0; n < in.shape[0]; n++)
            for (int64_t h = 0; h < in.shape[1]; h++)
                convert(features(in, n, h), (holdfast_expansion)from_expansion, features(out, n, h),
                        (holdfast_expansion)to_expansion, in.shape[2], key_size, state ? in.shape[3] : 1);
    });
}

}  // extern "C"
