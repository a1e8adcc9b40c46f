// What kernels of chunks begin with: rows, decays and states of the caller, in chunks and in fp32.
#pragma once
#include "chunks.h"
#include "dtypes.h"
#include "padded.h"

namespace holdfast {

/// Variables are those of ChunkwiseFuncs.
struct ChunkInputs {
    Halide::Func q_stored, k_stored, v_stored;  // in the type that they are stored in
    Halide::Func q, k, v, log_decay, state_in;  // log_decay is 0 past the end of the chunk
};

/// Of a generator's inputs: q (d,t,g,h,b), k (d,t,h,b), v (e,t,h,b), log_decay (t,h,b), state_in (e,d,s,h,b).
template<class Queries, class Rows, class Gates, class States>
ChunkInputs in_chunks(Dtype dtype, const Chunks &at, Queries &q, Rows &k, Rows &v, Gates &log_decay, States &state_in,
                      const Halide::Expr &D, const Halide::Expr &E) {
    using namespace Halide;
    Var b("b"), h("h"), g("g"), c("c"), i("i"), d("d"), e("e"), s("s");
    ChunkInputs x;
    x.q = Func("q_chunks"), x.k = Func("k_chunks"), x.v = Func("v_chunks");
    x.log_decay = Func("log_decay_chunks"), x.state_in = Func("state_start");
    x.q_stored = Func("q_stored"), x.k_stored = Func("k_stored"), x.v_stored = Func("v_stored");
    x.q_stored(d, i, c, g, h, b) = padded_rows(q, D)(d, at.time(i, c, q.dim(1).extent()), g, h, b);
    x.k_stored(d, i, c, h, b) = padded_rows(k, D)(d, at.time(i, c, k.dim(1).extent()), h, b);
    x.v_stored(e, i, c, h, b) = padded_rows(v, E)(e, at.time(i, c, v.dim(1).extent()), h, b);
    x.q(d, i, c, g, h, b) = widen(dtype, x.q_stored(d, i, c, g, h, b));
    x.k(d, i, c, h, b) = widen(dtype, x.k_stored(d, i, c, h, b));
    x.v(e, i, c, h, b) = widen(dtype, x.v_stored(e, i, c, h, b));
    const Expr decay = log_decay(at.time(i, c, log_decay.dim(0).extent()), h, b);
    x.log_decay(i, c, h, b) = select(i < at.length(c), decay, 0.0f);
    x.state_in(e, d, s, h, b) = padded_states(state_in, D, E)(e, d, s, h, b);
    return x;
}

}  // namespace holdfast
