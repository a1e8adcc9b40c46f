// A call of holdfast_forward or holdfast_step: its arguments, checked.
#pragma once
#include "context.h"
#include "holdfast/holdfast.h"
#include "tensor.h"

#include <cstdint>
#include <string>

namespace holdfast {

/// What to compute. A step is a call for one token whose initial state is its final one.
struct Problem {
    int64_t B, T, H, K, V;
    int64_t state_bytes() const { return K * V * (int64_t)sizeof(float); }

    Tensor q, k, v, out;                // [B, T, H, K or V]
    Tensor log_decay;                   // [H] or [B, T, H]; rank 0: not given
    Tensor initial_state, final_state;  // [B, H, K, V]; rank 0: not given
    float scale;
    int64_t chunk_size;         // 0: the library's choice
    const DLTensor *workspace;  // null: not given. Not checked: only a GPU looks at it

    Backend home() const;  // where all tensors are
};

/// Check all arguments. Throws a Failure that names the first that is wrong.
Problem checked_problem(const holdfast_forward_args *args);
Problem checked_problem(const holdfast_step_args *args);

/// Check that strides fit kernels' 32 bits: along time for `tokens` in one call of a kernel, and along K of a state.
void check_kernel_strides(const Problem &p, int64_t tokens);

/// Tell the context's listener, if there is one, what runs for `call` ("forward"), `how` ("chunks of 32") and why.
void announce(const holdfast_context &context, const char *call, const Variant &variant, const char *why, const Problem &p,
              const std::string &how, int64_t pieces);

}  // namespace holdfast
