// The gradient of chunkwise.h. Autodiff gives the adjoint of one chunk, of (q, k, v, state before it) -> (out, what it adds to
// the state); the scan over chunks, which Halide cannot differentiate, is reversed here by its own recurrence:
//
//   dS_c = exp(log decay of chunk c) dS_next(c) + W_c,   W_c the derived adjoint of the state before chunk c
//
// Gates take part as constants. Their gradient needs no product, by Euler: out and state are linear in what decays up to row i,
// which counts in out_i and, for the last row, in the state after the chunk, and is taken back in key i; so its gradient is
// q_i.dq_i - k_i.dk_i, and <S, dS> of the state after the chunk for its last row. A log decay counts for all rows from its own on.
// Left out: as in chunkwise.h.
//
// Operands of 16 bits (ChunkwiseSizes::operands): products that make dq, dk and dv read what is not an input rounded, one factor
// of each term. What a row has for a factor in all of its terms is taken out of the sum, whose other operand then is an input. Sums
// that go into states are of fp32: those of keys and queries in two parts would take as many instructions.
#pragma once
#include "chunkwise.h"

#include <vector>

namespace holdfast {

/// Variables are those of ChunkwiseFuncs.
struct ChunkwiseBackwardFuncs {
    ChunkwiseFuncs f;         // the forward stages, of which some are recomputed; f.state without the final ones
    Halide::Func dout;        // (e,i,c,g,h,b): input, 0 past the end of the chunk
    Halide::Func dstate_out;  // (e,d,s,h,b): input

    // Adjoints of stages of f, derived. A product is an update of its own, f += a * b.
    Halide::Func dout_staged;        // (e,i,c,g,h,b): equal to dout
    Halide::Func dintra;             // (e,i,c,g,h,b): likewise
    Halide::Func dinter;             // (e,i,c,g,h,b): row_decay * dout
    Halide::Func dstate_from_inter;  // (e,d,c,h,b): W, dinter . q
    Halide::Func dweights;           // (j,i,c,g,h,b): dout . v
    Halide::Func dscores;            // (j,i,c,g,h,b): dweights * mask
    Halide::Func dcontribution;      // (e,d,c,h,b): equal to dstate_next
    Halide::Func dkeys_decayed;      // (d,j,c,h,b): dcontribution . v
    Halide::Func dq;                 // (d,i,c,g,h,b): dscores . k, and dinter . state
    Halide::Func dk;                 // (d,j,c,h,b): dscores . q, and key_decay * dkeys_decayed
    Halide::Func dv;                 // (e,j,c,h,b): weights . dout, and keys_decayed . dcontribution

    // The scan back.
    Halide::Func dstate;         // (e,d,c,h,b): per slot
    Halide::Func dstate_next;    // (e,d,c,h,b): of the slot after chunk c
    Halide::RDom over_sequence;  // dstate, update 0: s
    Halide::RDom over_chunk;     // dstate, update 1: of chunk count - 1 - over_chunk

    // Where operands are not fp32, else undefined or none: what row_decay and key_decay are factors of; and what products read of
    // weights, dscores, state and dcontribution.
    Halide::Func dq_from_state;  // (d,i,c,g,h,b): dout . state
    Halide::Func dv_from_state;  // (e,j,c,h,b): k . dcontribution
    std::vector<Halide::Func> weights_read, dscores_read, state_read, dstate_read;

    // Gates.
    Halide::Func row_product;  // (i,c,h,b): q . dq, of all queries of the group
    Halide::Func key_product;  // (j,c,h,b): k . dk
    Halide::Func
        state_product;  // (d,c,h,b): <S, dS> of the state after the chunk, in two parts: of the state before it, its decay
    Halide::Func added_product;  // (d,c,h,b): left out; and of what the chunk adds
    Halide::Func end_product;    // (c,h,b): both
    Halide::Func dlog_decay;     // (i,c,h,b)
    Halide::RDom over_query;     // row_product:   d in [0, D), g
    Halide::RDom over_key;       // key_product:   d in [0, D)
    Halide::RDom over_value;     // state_product: e in [0, E)
    Halide::RDom over_token;     // added_product: j in [0, C)
    Halide::RDom over_state;     // end_product:   d in [0, D)
    Halide::RDom over_row;       // dlog_decay:    r in [0, C)

    // set by the generator: inputs and gradients in the type that they are stored in; what leaves the kernel, in the caller's layout
    Halide::Func q_stored, k_stored, v_stored, dout_stored, dq_stored, dk_stored, dv_stored;
    Halide::Func result_dq, result_dk, result_dv;  // (d,t,g,h,b) (d,t,h,b) (e,t,h,b), update 0 over (x = i, y = c)
    Halide::Func result_dlog_decay;                // (t,h,b), likewise
    Halide::Func dstate_in;                        // (e,d,s,h,b), update 0 over s
    Halide::RDom over_dq, over_dk, over_dv, over_gate, over_states;  // where it is wanted
};

/// Extents of d, e, g, h and b.
struct ChunkwiseBackwardExtents {
    Halide::Expr key, value, group, heads, batch;
};

/// dq, dk and dv sum over (g and) keys or queries in the chunk up to the end, or from the start, of a causal tile.
ChunkwiseBackwardFuncs chunkwise_backward(const Halide::Func &q, const Halide::Func &k, const Halide::Func &v,
                                          const Halide::Func &log_decay, const Halide::Func &state_in, const Halide::Func &dout,
                                          const Halide::Func &dstate_out, const Chunks &chunks,
                                          const ChunkwiseBackwardExtents &extents, const Halide::Expr &scale,
                                          const ChunkwiseSizes &sizes);

}  // namespace holdfast
