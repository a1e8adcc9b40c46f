// The gradient of power.h, one chunk, the algorithm only. A sequence is a chain of calls as there, from its last chunk to its first,
// with the gradient of the state carried from one to the one before.
//
//   out = num / den:  dnum = dout / den,  dden = -<out, dout> / den,         or dnum = scale^p dout
//
// Autodiff derives the rest from power(): the gradients of numerators, denominators and of what the chunk adds to its state for
// phi, scores, values and the initial state. Left to be done by hand: phi, whose derivative is in the same table (expansion.h); what
// the state's own decay does, in two parts as in decay.h; units of queries and decays, which are constants; and gates. Those follow from
// Euler's identity without a product: row i is homogeneous of degree p in q_i, and whatever it looks at decays up to it; key j is
// of degree p in k_j, and decays after it:
//
//   dlog_decay_t = (sum over i >= t of (<q_i, dq_i> - <k_i, dk_i by rows>) + sum over j < t of <k_j, dk_j by the final state>) / p
//                + <what is left of the initial state, dstate_out>
//
// Left out: layout (power_backward_generator.cpp).
#pragma once
#include "power.h"

namespace holdfast {

/// Variables as in power.h, in chunk coordinates, and s factor of a feature. dx is the gradient of what p calls x, after its decay and
/// unit.
struct PowerBackwardFuncs {
    PowerFuncs p;                        // the chunk; what is computed of it are its gates, operands, phi, scores and weights
    Halide::Func dout, out;              // (e,i,g,h,b): inputs; dout is 0 past the end, and out counts where it is normalized
    Halide::Func dstate_out, dkeys_out;  // (e,f,h,b) (f,h,b): inputs
    Halide::Func den_block;              // (u,i,g,h,b): sums of weights, as those of power.h, with its blocks
    Halide::Func den_inter, den_intra;   // (i,g,h,b)
    Halide::Func row;                    // (i,g,h,b)
    Halide::Func dnum;                   // (e,i,g,h,b): dout * row
    Halide::Func from_out;               // (i,g,h,b): <out, dout>
    Halide::Func dden;                   // (i,g,h,b): -from_out * row, or 0

    // Derived by autodiff, each a sum whose variables are the RVars of its updates.
    Halide::Func dweights;           // (j,i,g,h,b): over e; and dden
    Halide::Func dscores;            // (j,i,g,h,b)
    Halide::Func dqueries;           // (d,i,g,h,b): over j, by scores
    Halide::Func dkeys;              // (d,j,h,b): over (i,g), by scores
    Halide::Func dvalues;            // (e,j,h,b): over (i,g), by weights; over f, by phi_k
    Halide::Func dphi_q;             // (f,i,g,h,b): over e; and by the sum of keys
    Halide::Func dphi_k;             // (f,j,h,b): over e
    Halide::Func from_queries;       // (e,f,h,b): over (i,g), the state at the start by rows of the chunk
    Halide::Func keys_from_queries;  // (f,h,b): over (i,g), its sum of keys

    Halide::Func dqueries_state;                // (d,i,g,h,b): by phi_q, without its decay
    Halide::Func dkeys_state;                   // (d,j,h,b): by phi_k, without its decay
    Halide::Func dquery;                        // (d,i,g,h,b): both; of queries, which have their unit
    Halide::Func dq, dkey;                      // (d,i,g,h,b) (d,j,h,b): of q and k
    Halide::Func dstate, dkeys_sum;             // (e,f,h,b) (f,h,b): of the initial state and sum of keys
    Halide::Func along_row;                     // (i,h,b): <q, dq>, of a group
    Halide::Func along_key, along_end;          // (j,h,b): <k, dk> by rows; by the final state, without its decay
    Halide::Func along_block, along_state;      // (e,u,h,b) (e,h,b): <state_in, dstate_out> of a block of features; of all
    Halide::Func along_keys_block, along_keys;  // (u,h,b) (h,b): <keys_in, dkeys_out>, likewise
    Halide::Func kept;                          // (h,b): what the chunk's whole decay is the factor of
    Halide::Func dgates;                        // (i,h,b): of log_decay

    Halide::RDom over_feature_weight, over_block, over_key_weight;  // den_block, den_inter, den_intra
    Halide::RDom over_value;                                        // from_out: e
    Halide::RDom over_factor_q, over_factor_k;                      // dqueries_state, dkeys_state: (s,f)
    Halide::RDom over_query_element, over_key_element;              // along_row: (d,g); along_key, along_end: d
    Halide::RDom over_state, over_keys, over_state_block;  // along_block, along_keys_block: f in the block; their sums: u
    Halide::RDom over_kept;                                // kept: e
    Halide::RDom over_row;                                 // dgates: r in [0, C)

    // set by the generator: what leaves the kernel, in the caller's type and layout. Each has one update, over a domain that is empty
    // where it is not wanted.
    Halide::Func result_dq, result_dk, result_dv, result_dlog_decay;  // (d,i,g,h,b) (d,j,h,b) (e,j,h,b) (i,h,b)
    Halide::RDom wanted_dq, wanted_dk, wanted_dv, wanted_dlog_decay;  // d, d, e, i
    Halide::Func dstate_in, dkeys_in;                                 // (e,f,h,b) (f,h,b)
    Halide::RDom wanted_dstate, wanted_dkeys;                         // b
};

/// Extents of the query heads in a group, of heads, batch entries and values beside those of power().
struct PowerExtents {
    Halide::Expr key, features, value, group, heads, batch;
};

/// keys_in and dkeys_out are 0 where options.normalize is.
PowerBackwardFuncs power_backward(const Halide::Func &q, const Halide::Func &k, const Halide::Func &v,
                                  const Halide::Func &log_decay, const Halide::Func &state_in, const Halide::Func &keys_in,
                                  const Halide::Func &out, const Halide::Func &dout, const Halide::Func &dstate_out,
                                  const Halide::Func &dkeys_out, const PowerExtents &extents, const PowerOptions &options,
                                  const PowerSizes &sizes);

}  // namespace holdfast
