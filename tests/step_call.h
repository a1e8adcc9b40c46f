// Calls of a recurrent kernel by its own C signature, a token or blocks of them at a time, against the reference: for kernels
// compiled ahead of time or just in time.
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
    int64_t B, T, H;  // H heads of keys and values
    Layout layout;
    Gates gates;
    int64_t group = 1;               // heads of queries for each
    int64_t blocks = 1, tokens = 1;  // of a call, and of a block; the last call has fewer blocks
};

/// For kernels that take blocks of so many tokens.
inline std::vector<StepCase> step_cases(int64_t tokens) {
    std::vector<StepCase> cases;
    if (tokens == 1) {
        for (Gates gates : all_gates) cases.push_back({std::string("gates_") + name(gates), 2, 40, 3, Layout::padded, gates});
        for (Layout layout : layouts) cases.push_back({std::string("layout_") + name(layout), 3, 2, 2, layout, Gates::strong});
        cases.push_back({"groups", 2, 5, 2, Layout::padded, Gates::strong, 3});
        cases.push_back({"one_group", 1, 2, 1, Layout::swapped, Gates::per_head, 8});
        cases.push_back({"several", 1, 11, 2, Layout::padded, Gates::strong, 1, 4});
    } else {
        for (Gates gates : all_gates)
            cases.push_back({std::string("gates_") + name(gates), 2, 5 * tokens, 2, Layout::padded, gates, 1, 3});
        for (Layout layout : layouts)
            cases.push_back({std::string("layout_") + name(layout), 2, tokens, 3, layout, Gates::strong});
    }
    cases.push_back({"one", 1, tokens, 1, Layout::compact, Gates::weak});
    cases.push_back({"no_heads", 2, tokens, 0, Layout::compact, Gates::weak});
    cases.push_back({"no_batch", 0, tokens, 2, Layout::compact, Gates::weak});
    for (StepCase &c : cases) c.tokens = tokens;
    return cases;
}

class StepCall {
public:
    StepCall(const StepCase &c, Size size, const Dtype &dtype = f32)
        : c(c), dtype(dtype), K(size.K), V(size.V), q(array({c.B, c.T, c.H * c.group, K})), k(array({c.B, c.T, c.H, K})),
          v(array({c.B, c.T, c.H, V})), log_decay(log_decays(c.gates, c.B, c.T, c.H, c.layout, random)),
          state(array({c.B, c.H, K, V})), sum(array({c.B, c.H, c.blocks, c.tokens * V}).forget()),
          out(array({c.B, c.T, c.H * c.group, V}).forget()) {
        for (Array *x : {&q, &k, &v}) round_to(dtype, *x);
    }

    /// kernel(q, k, v, log_decay, scale, state, sum, out) returns 0 for every call, and together they do what the reference does.
    template<class Kernel>
    void expect_reference(const Kernel &kernel) {
        SCOPED_TRACE(c.name);
        reference::Inputs in{c.B, c.T, c.H * c.group, K, V, c.group};
        const Array initial_state = state;
        in.q = strided(q), in.k = strided(k), in.v = strided(v), in.log_decay = strided(log_decay);
        in.initial_state = strided(initial_state);
        in.scale = scale;
        const reference::Result want = reference::retention(in), spread = reference::spread(in);

        const Array inputs[] = {q, k, v, log_decay};
        Stored sq(dtype, q), sk(dtype, k), sv(dtype, v), so(dtype, out);
        for (int64_t t = 0, N; t < c.T; t += N * c.tokens) {
            N = std::min(c.blocks, (c.T - t) / c.tokens);
            Buffer bq = in_blocks(in_groups(rows(sq, q, t, N), 2, c.group), N), bk = in_blocks(rows(sk, k, t, N), N);
            Buffer bv = in_blocks(rows(sv, v, t, N), N), bo = in_blocks(in_groups(rows(so, out, t, N), 2, c.group), N);
            Buffer bg =
                in_blocks(view(log_decay.data() + t * log_decay.stride[1], f32, tokens_of(log_decay, N), {1, 2, 0}), N, 0);
            // Every token of every block goes on with the same state, and each row of it adds to the same sum.
            Buffer bs = view(state.data(), f32, state, {3, 2, 1, 0});
            bs.embed(1, 0), bs.embed(3, 0);
            bs.raw_buffer()->dim[1] = {0, (int32_t)c.tokens, 0}, bs.raw_buffer()->dim[3] = {0, (int32_t)N, 0};
            Buffer bm = view(sum.data(), f32, sum, {3, 2, 1, 0});
            bm.embed(1, 0), bm.embed(2, 0);
            bm.raw_buffer()->dim[0].extent = (int32_t)V, bm.raw_buffer()->dim[1] = {0, (int32_t)c.tokens, (int32_t)V};
            bm.raw_buffer()->dim[2] = {0, (int32_t)K, 0}, bm.raw_buffer()->dim[3].extent = (int32_t)N;
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

    /// The array with the extent of N blocks of tokens.
    Array tokens_of(const Array &a, int64_t N) const {
        Array some = a;
        some.shape[1] = N * c.tokens;
        return some;
    }

    /// Halide's view of N blocks from token t on: (d, t, h, b).
    Buffer rows(Stored &stored, const Array &a, int64_t t, int64_t N) const {
        const int64_t bytes = dtype == f32 ? sizeof(float) : sizeof(uint16_t);
        return view((char *)stored.data() + t * a.stride[1] * bytes, dtype, tokens_of(a, N), {3, 1, 2, 0});
    }

    /// Its tokens, axis `t`, in N blocks.
    Buffer in_blocks(Buffer x, int64_t N, int t = 1) const {
        x.embed(t + 1, 0);
        halide_dimension_t *dim = x.raw_buffer()->dim;
        dim[t].extent = (int32_t)c.tokens, dim[t + 1] = {0, (int32_t)N, dim[t].stride * (int32_t)c.tokens};
        return x;
    }

    static reference::Strided strided(const Array &a) {
        reference::Strided x{a.data(), {}};
        std::copy(a.stride.begin(), a.stride.end(), x.stride.begin());
        return x;
    }
};

}  // namespace test
