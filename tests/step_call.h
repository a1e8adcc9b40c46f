// Calls of a recurrent kernel by its own C signature, a token at a time, against the reference: for kernels compiled ahead of
// time or just in time.
#pragma once
#include "check.h"
#include "reference/retention.h"
#include "shapes.h"
#include "stored.h"
#include "view.h"

#include <algorithm>
#include <string>

namespace test {

/// T tokens one after the other, the state of each call being that of the one before.
struct StepCase {
    std::string name;
    int64_t B, T, H;
    Layout layout;
    Gates gates;
};

inline std::vector<StepCase> step_cases() {
    std::vector<StepCase> cases;
    for (Gates gates : all_gates) cases.push_back({std::string("gates_") + name(gates), 2, 40, 3, Layout::padded, gates});
    for (Layout layout : layouts) cases.push_back({std::string("layout_") + name(layout), 3, 2, 2, layout, Gates::strong});
    cases.push_back({"one", 1, 1, 1, Layout::compact, Gates::weak});
    cases.push_back({"no_heads", 2, 1, 0, Layout::compact, Gates::weak});
    cases.push_back({"no_batch", 0, 1, 2, Layout::compact, Gates::weak});
    return cases;
}

class StepCall {
public:
    StepCall(const StepCase &c, Size size, const Dtype &dtype = f32)
        : c(c), dtype(dtype), K(size.K), V(size.V), q(array({c.B, c.T, c.H, K})), k(array({c.B, c.T, c.H, K})),
          v(array({c.B, c.T, c.H, V})), log_decay(log_decays(c.gates, c.B, c.T, c.H, c.layout, random)),
          state(array({c.B, c.H, K, V})), sum(array({c.B, 1, c.H, V}).forget()), out(array({c.B, c.T, c.H, V}).forget()) {
        for (Array *x : {&q, &k, &v}) round_to(dtype, *x);
    }

    /// kernel(q, k, v, log_decay, scale, state, sum, out) returns 0 for every token, and together they do what the reference does.
    template<class Kernel>
    void expect_reference(const Kernel &kernel) {
        SCOPED_TRACE(c.name);
        reference::Inputs in{c.B, c.T, c.H, K, V};
        const Array initial_state = state;
        in.q = strided(q), in.k = strided(k), in.v = strided(v), in.log_decay = strided(log_decay);
        in.initial_state = strided(initial_state);
        in.scale = scale;
        const reference::Result want = reference::retention(in), spread = reference::spread(in);

        const Array inputs[] = {q, k, v, log_decay};
        Stored sq(dtype, q), sk(dtype, k), sv(dtype, v), so(dtype, out);
        for (int64_t t = 0; t < c.T; t++) {
            Buffer bq = row(sq, q, t), bk = row(sk, k, t), bv = row(sv, v, t), bo = row(so, out, t);
            Buffer bg = view(log_decay.data() + t * log_decay.stride[1], f32, log_decay, {2, 0});
            Buffer bs = view(state.data(), f32, state, {3, 2, 1, 0}), bm = view(sum.data(), f32, sum, {3, 2, 0});
            bm.embed(1, 0);  // each row of the state adds to the same sum
            const halide_dimension_t every_row = {0, (int32_t)K, 0};
            bm.raw_buffer()->dim[1] = every_row;
            // A GPU's kernel copies what it reads, and all of an output: what it does not write there stays as it is. Sums are
            // only memory to it.
            for (Buffer *buffer : {&bq, &bk, &bv, &bg, &bs, &bo}) buffer->set_host_dirty();
            ASSERT_EQ(kernel(bq, bk, bv, bg, scale, bs, bm, bo), 0);
            for (Buffer *buffer : {&bs, &bo}) ASSERT_EQ(buffer->copy_to_host(), 0);
        }
        so.load();
        const double share = tolerance::of_spread(K, 1, c.T);
        expect_close("out", out, want.out, spread.out, share, dtype);
        expect_close("state", state, want.state, spread.state, share);
        EXPECT_TRUE(out.gaps_intact() && so.gaps_intact() && sum.gaps_intact() && state.gaps_intact())
            << "memory between the rows was written";
        const Array *after[] = {&q, &k, &v, &log_decay};
        for (int n = 0; n < 4; n++) EXPECT_TRUE(after[n]->same_memory(inputs[n])) << "input " << n << " was written";
        const Stored *stored[] = {&sq, &sk, &sv};
        for (int n = 0; n < 3; n++) EXPECT_TRUE(stored[n]->unchanged()) << "input " << n << " was written";
    }

private:
    using Buffer = Halide::Runtime::Buffer<void>;
    const StepCase c;
    const Dtype dtype;
    const int64_t K, V;
    Random random;
    Array q, k, v, log_decay, state, sum, out;
    const float scale = 0.25f;

    Array array(const Index &shape) { return Array(shape, c.layout).fill(random); }

    /// Halide's view of token t of an array.
    Buffer row(Stored &stored, const Array &a, int64_t t) const {
        const int64_t bytes = dtype == f32 ? sizeof(float) : sizeof(uint16_t);
        return view((char *)stored.data() + t * a.stride[1] * bytes, dtype, a, {3, 2, 0});
    }

    static reference::Strided strided(const Array &a) {
        reference::Strided x{a.data(), {}};
        std::copy(a.stride.begin(), a.stride.end(), x.stride.begin());
        return x;
    }
};

}  // namespace test
