// The stages of chunkwise.h.
#include "chunkwise.h"
#include "operands.h"

#include "decay.h"

using namespace Halide;

namespace holdfast {

ChunkwiseFuncs chunkwise(const Func &q, const Func &k, const Func &v, const Func &log_decay, const Func &state_in,
                         const Chunks &chunks, const Expr &key_extent, const Expr &scale, const ChunkwiseSizes &sizes) {
    const int C = sizes.chunk;
    Var b("b"), h("h"), g("g"), c("c"), i("i"), j("j"), d("d"), e("e");
    ChunkwiseFuncs f;
    f.q = q, f.k = k, f.v = v, f.log_decay = log_decay, f.state_in = state_in;

    // Gates. A masked sum, not a running one: C^2 cheap terms, no serial dependence, and autodiff is exact through it.
    f.row_steps = Func("row_steps"), f.row_rest = Func("row_rest");
    f.row_steps(i, c, h, b) = decay_steps_of(log_decay(i, c, h, b));
    f.row_rest(i, c, h, b) = decay_rest_of(log_decay(i, c, h, b));
    f.over_row = RDom(0, C, "over_row");
    f.decay_steps = Func("decay_steps");
    f.decay_steps(i, c, h, b) += select(f.over_row <= i, f.row_steps(f.over_row, c, h, b), 0);
    f.decay_rest = Func("decay_rest");
    f.decay_rest(i, c, h, b) += select(f.over_row <= i, f.row_rest(f.over_row, c, h, b), 0.0f);
    auto steps_between = [&](const Expr &from, const Expr &to) {  // tokens from + 1 .. to
        return f.decay_steps(to, c, h, b) - f.decay_steps(from, c, h, b);
    };
    auto rest_between = [&](const Expr &from, const Expr &to) {
        return f.decay_rest(to, c, h, b) - f.decay_rest(from, c, h, b);
    };
    f.row_decay = Func("row_decay");
    f.row_decay(i, c, h, b) = scale * decay_of(f.decay_steps(i, c, h, b), f.decay_rest(i, c, h, b));
    f.key_decay = Func("key_decay");
    Expr kept = decay_of(steps_between(j, C - 1), rest_between(j, C - 1));
    f.key_decay(j, c, h, b) = select(j < chunks.length(c), kept, 0.0f);
    f.chunk_decay = Func("chunk_decay");
    f.chunk_decay(c, h, b) = two_part_decay_of(f.decay_steps(C - 1, c, h, b), f.decay_rest(C - 1, c, h, b));

    // Inside a chunk. The mask is its own Func and a factor, so that bounds inference keeps all of scores; the
    // difference is masked before exp, which could overflow above the diagonal.
    f.over_key_feature = RDom(0, key_extent, "over_key_feature");
    f.scores = Func("scores");
    f.scores(j, i, c, g, h, b) += q(f.over_key_feature, i, c, g, h, b) * k(f.over_key_feature, j, c, h, b);
    f.mask = Func("mask");
    Expr steps = select(j <= i, steps_between(j, i), 0);
    f.mask(j, i, c, h, b) = select(j <= i, scale * decay_of(steps, rest_between(j, i)), 0.0f);
    f.weights = Func("weights");
    f.weights(j, i, c, g, h, b) = f.scores(j, i, c, g, h, b) * f.mask(j, i, c, h, b);

    // Across chunks: a serial scan in which chunk c reads its slot and writes the next one.
    f.keys_decayed = Func("keys_decayed");
    f.keys_decayed(d, j, c, h, b) = k(d, j, c, h, b) * f.key_decay(j, c, h, b);
    f.over_token = RDom(0, C, "over_token");
    f.contribution = Func("contribution");
    f.contribution(e, d, c, h, b) += f.keys_decayed(d, f.over_token, c, h, b) * v(e, f.over_token, c, h, b);
    f.over_sequence = RDom(0, chunks.slots - chunks.count, "over_sequence");
    f.over_chunk = RDom(0, chunks.count, "over_chunk");
    RVar s = f.over_sequence, in = f.over_chunk;
    f.state = Func("state");
    f.state(e, d, c, h, b) = undef<float>();
    f.state(e, d, chunks.first(s), h, b) = state_in(e, d, s, h, b);
    Tuple decay = f.chunk_decay(in, h, b);
    Expr before = f.state(e, d, in, h, b);
    f.state(e, d, chunks.next(in), h, b) = decayed(decay, before, f.contribution(e, d, in, h, b));

    f.over_state = RDom(0, key_extent, "over_state");
    f.inter = Func("inter");
    f.inter(e, i, c, g, h, b) += q(f.over_state, i, c, g, h, b) * f.state(e, f.over_state, c, h, b);
    f.over_key = RDom(0, C, "over_key");
    if (sizes.causal_tile < C) {
        f.over_key.where(f.over_key < (i / sizes.causal_tile + 1) * sizes.causal_tile);
    }
    f.intra = Func("intra");
    f.intra(e, i, c, g, h, b) += f.weights(f.over_key, i, c, g, h, b) * v(e, f.over_key, c, h, b);
    f.out = Func("out");
    f.out(e, i, c, g, h, b) = f.row_decay(i, c, h, b) * f.inter(e, i, c, g, h, b) + f.intra(e, i, c, g, h, b);

    // Operands of 16 bits. Roundings of weights and state each meet an output once, as its own rounding does. Keys go into a
    // state that is summed in fp32, and its rounding comes on top: in two parts theirs does not count.
    f.weights_read = round_operand(f.weights, {f.intra}, sizes.operands);
    f.state_read = round_operand(f.state, {f.inter}, sizes.operands);
    f.keys_read = round_operand(f.keys_decayed, {f.contribution}, sizes.operands, 2);
    return f;
}

}  // namespace holdfast
