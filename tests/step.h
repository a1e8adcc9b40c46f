// Calls of holdfast_step for tests.
#pragma once
#include "forward.h"

namespace test {

/// The arguments that every step has, tensors that may be NULL; all options are off.
inline holdfast_step_args step_args(const DLTensor *q, const DLTensor *k, const DLTensor *v, const DLTensor *log_decay,
                                    DLTensor *state, DLTensor *out) {
    holdfast_step_args args = {};
    args.struct_size = sizeof args;
    args.q = q, args.k = k, args.v = v, args.log_decay = log_decay, args.state = state, args.out = out;
    return args;
}

/// Arguments of holdfast_step. A Tensor without data is not given. Types are as in Forward.
struct Step {
    Tensor q, k, v, log_decay, state, out;
    float scale = 0;
    Dtype dtype = f32;
    holdfast_state_layout state_layout = HOLDFAST_STATE_KEY_MAJOR;

    holdfast_status run(holdfast_context *context) {
        Tensor *tensors[] = {&q, &k, &v, &log_decay, &state, &out};
        DLTensor dl[6];
        for (int n = 0; n < 6; n++) dl[n] = tensors[n]->dl();
        std::deque<Stored> stored;
        for (int n : {0, 1, 2, 5}) {
            stored.emplace_back(dtype, tensors[n]->data, tensors[n]->shape, tensors[n]->stride);
            dl[n].data = stored.back().data(), dl[n].dtype = dl_type(dtype);
        }
        auto given = [&](int n) { return tensors[n]->data ? &dl[n] : nullptr; };
        holdfast_step_args args = step_args(given(0), given(1), given(2), given(3), given(4), given(5));
        args.scale = scale, args.state_layout = state_layout;
        const holdfast_status status = holdfast_step(context, &args);
        for (int n : {0, 1, 2}) EXPECT_TRUE(stored[n].unchanged()) << "input " << n << " was written";
        EXPECT_TRUE(stored[3].gaps_intact()) << "memory between the elements of out was written";
        stored[3].load();
        return status;
    }
};

/// Token t of a tensor [B, T, H, ...].
inline Tensor token(Tensor x, int64_t t) {
    x = x.part(1, t, t + 1);
    x.shape.erase(x.shape.begin() + 1), x.stride.erase(x.stride.begin() + 1);
    return x;
}

/// Token t of a call, on its final state.
inline Step step(const Forward &f, int64_t t) {
    Step s{token(f.q, t), token(f.k, t), token(f.v, t), f.log_decay, f.final_state, token(f.out, t)};
    if (f.log_decay.shape.size() == 3) s.log_decay = token(f.log_decay, t);
    s.scale = f.scale, s.dtype = f.dtype, s.state_layout = f.state_layout;
    return s;
}

/// All tokens of a problem by steps: what its forward() call computes.
inline void run_steps(Problem &p, holdfast_context *context) {
    each(p.final_state.shape, [&](const Index &i) { p.final_state(i) = p.initial ? p.initial_state(i) : 0; });
    for (int64_t t = 0; t < p.T; t++) ASSERT_EQ(step(p.forward(), t).run(context), HOLDFAST_OK) << holdfast_last_error(context);
}

}  // namespace test
