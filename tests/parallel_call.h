// Calls of a parallel kernel by its own C signature, against the reference: for kernels compiled ahead of time or just in time.
#pragma once
#include "check.h"
#include "reference/parallel.h"
#include "shapes.h"
#include "stored.h"
#include "view.h"

#include <algorithm>
#include <string>

namespace test {

/// A call for the rows from block `first_block` on. H heads of keys have R heads of queries each.
struct ParallelCase {
    std::string name;
    int64_t B, T, H, R;
    Layout layout;
    Gates gates;
    int degree;
    bool normalized;
    bool initial, final, weights;  // which of them there are
    int first_block;
};

/// Everything that a kernel with blocks of C tokens may meet, for keys of K elements. States of high degrees of many are large, and
/// take the reference long.
inline std::vector<ParallelCase> parallel_cases(int C, int64_t K) {
    std::vector<ParallelCase> cases;
    for (int64_t T : {(int64_t)1, (int64_t)7, (int64_t)C - 1, (int64_t)C, (int64_t)C + 1, 3 * (int64_t)C + 2})
        cases.push_back({"T" + std::to_string(T), 1, T, 1, 2, Layout::compact, Gates::weak, 1, false, true, true, true, 0});
    for (Gates gates : all_gates)
        cases.push_back({std::string("gates_") + name(gates), 2, 2 * C + C / 2 + 1, 2, 1, Layout::padded, gates, 1, false, true,
                         true, false, 0});
    for (Layout layout : layouts)
        cases.push_back(
            {std::string("layout_") + name(layout), 2, C + 1, 2, 2, layout, Gates::strong, 1, true, true, true, true, 0});
    for (int degree : {1, 2, 3, 4})
        for (bool normalized : {false, true})
            cases.push_back({"degree_" + std::to_string(degree) + (normalized ? "_normalized" : ""), 1, 2 * C + 1, 1, 2,
                             Layout::swapped, Gates::resets, degree, normalized, K < 8 || degree == 2, degree == 1, true, 0});
    cases.push_back({"out_alone", 1, 2 * C + 1, 2, 1, Layout::compact, Gates::weak, 1, false, false, false, false, 0});
    cases.push_back({"rows_of_the_end", 1, 3 * C - 1, 1, 2, Layout::padded, Gates::weak, 1, false, true, true, true, 2});
    return cases;
}

class ParallelCall {
public:
    ParallelCall(const ParallelCase &c, int C, Size size, const Dtype &dtype = f32)
        : c(c), dtype(dtype), K(size.K), V(size.V), first(c.first_block * C), q(array({c.B, c.T, c.H * c.R, K})),
          k(array({c.B, c.T, c.H, K})), v(array({c.B, c.T, c.H, V})),
          D((int64_t)reference::phi(std::vector<double>(K), c.initial ? c.degree : 1).size()),
          log_decay(log_decays(c.gates, c.B, c.T, c.H, c.layout, random)), state_in(array({c.B, c.initial, c.H, D, V})),
          keys_in(array({c.B, c.initial, c.H, D})), out(array({c.B, c.T - first, c.H * c.R, V})),
          state_out(array({c.B, c.final, c.H, K, V})), keys_out(array({c.B, c.final, c.H, K})),
          weights(array({c.B, c.H * c.R, c.weights, c.T - first, c.T})) {
        // Sums of weights stay away from 0: a quotient there is all rounding errors.
        if (c.normalized)
            for (Array *x : {&q, &k, &keys_in}) each(x->shape, [&](const Index &i) { (*x)(i) = 0.25f + std::abs((*x)(i)); });
        for (Array *x : {&q, &k, &v}) round_to(dtype, *x);
        for (Array *x : {&out, &state_out, &keys_out, &weights}) x->forget();
    }

    /// kernel(q, k, v, log_decay, state_in, keys_in, first_block, degree, normalized, scale, out, state_out, keys_out, weights)
    /// returns 0 and what the reference does. On a `gpu`, what has no elements is in the memory of something else: Halide's
    /// runtime allocates nothing for it.
    template<class Kernel>
    void expect_reference(const Kernel &kernel, const halide_device_interface_t *gpu = nullptr) {
        SCOPED_TRACE(c.name);
        using Buffer = Halide::Runtime::Buffer<void>;
        Stored sq(dtype, q), sk(dtype, k), sv(dtype, v), so(dtype, out), sw(dtype, weights);
        const int64_t bytes = dtype == f32 ? 4 : 2;
        Buffer bq = queries(view((char *)sq.data() + first * q.stride[1] * bytes, dtype, q, {3, 1, 2, 0}), 2);
        bq.raw_buffer()->dim[1].extent = (int32_t)(c.T - first);
        Buffer bk = view(sk.data(), dtype, k, {3, 1, 2, 0}), bv = view(sv.data(), dtype, v, {3, 1, 2, 0});
        Buffer bg = view(log_decay.data(), f32, log_decay, {1, 2, 0}),
               bs = view(state_in.data(), f32, state_in, {4, 3, 1, 2, 0});
        Buffer bz = view(keys_in.data(), f32, keys_in, {3, 1, 2, 0}),
               bo = queries(view(so.data(), dtype, out, {3, 1, 2, 0}), 2);
        Buffer bS = view(state_out.data(), f32, state_out, {4, 3, 1, 2, 0}),
               bZ = view(keys_out.data(), f32, keys_out, {3, 1, 2, 0});
        Buffer bw = queries(view(sw.data(), dtype, weights, {4, 2, 3, 1, 0}), 3);
        const Array inputs[] = {q, k, v, log_decay, state_in, keys_in};
        // A GPU's kernel copies what it reads, and all of an output: what it does not write there stays as it is.
        for (Buffer *buffer : {&bq, &bk, &bv, &bg, &bs, &bz, &bo, &bS, &bZ, &bw}) buffer->set_host_dirty();
        std::vector<halide_buffer_t *> empty;
        if (gpu) {
            ASSERT_EQ(bq.device_malloc(gpu), 0);
        }
        for (Buffer *buffer : {&bs, &bz, &bS, &bZ, &bw}) {
            if (!gpu || buffer->number_of_elements()) continue;
            empty.push_back(buffer->raw_buffer());
            empty.back()->device = bq.raw_buffer()->device, empty.back()->device_interface = gpu;
            buffer->set_host_dirty(false);
        }
        ASSERT_EQ(kernel(bq, bk, bv, bg, bs, bz, c.first_block, c.degree, (int)c.normalized, scale, bo, bS, bZ, bw), 0);
        for (halide_buffer_t *buffer : empty) buffer->device = 0, buffer->device_interface = nullptr, buffer->flags = 0;
        for (Buffer *buffer : {&bo, &bS, &bZ, &bw}) ASSERT_EQ(buffer->copy_to_host(), 0);
        so.load(), sw.load();

        reference::ParallelInputs in;
        static_cast<reference::Inputs &>(in) = {c.B, c.T, c.H * c.R, K, V, c.R};
        in.q = strided(q), in.k = strided(k), in.v = strided(v), in.log_decay = strided(log_decay), in.scale = scale;
        in.degree = c.degree, in.normalized = c.normalized, in.initial = c.initial;
        in.initial_state = states(state_in), in.initial_keys = states(keys_in);
        const reference::ParallelResult want = reference::parallel(in);
        const double share = tolerance::of_power_spread(K, D, c.T, 0);
        expect_close("out", out, rows(want.out, c.B, c.H * c.R * V), rows(want.out_spread, c.B, c.H * c.R * V), share, dtype);
        if (c.weights)
            expect_close("weights", weights, rows(want.weights, c.B * c.H * c.R, c.T),
                         rows(want.weights_spread, c.B * c.H * c.R, c.T), share, dtype);
        if (c.final) {
            static const float zero = 0, one = 1;
            if (!c.initial) in.initial_state = {&zero, {}}, in.initial_keys = {&zero, {}};
            reference::Inputs state = in;
            state.q = {&zero, {}};
            expect_close("state", state_out, reference::retention(state).state, reference::spread(state).state, share);
            state.V = 1, state.v = {&one, {}}, state.initial_state = in.initial_keys;
            expect_close("sum of keys", keys_out, reference::retention(state).state, reference::spread(state).state, share);
        }
        for (Array *x : {&out, &state_out, &keys_out, &weights})
            EXPECT_TRUE(x->gaps_intact()) << "memory between the rows was written";
        EXPECT_TRUE(so.gaps_intact() && sw.gaps_intact()) << "memory between the rows was written";
        const Array *after[] = {&q, &k, &v, &log_decay, &state_in, &keys_in};
        for (int n = 0; n < 6; n++) EXPECT_TRUE(after[n]->same_memory(inputs[n])) << "input " << n << " was written";
        const Stored *stored[] = {&sq, &sk, &sv};
        for (int n = 0; n < 3; n++) EXPECT_TRUE(stored[n]->unchanged()) << "input " << n << " was written";
    }

private:
    const ParallelCase c;
    const Dtype dtype;
    const int64_t K, V, first;
    Random random;
    Array q, k, v;
    const int64_t D;  // rows of an initial state
    Array log_decay, state_in, keys_in, out, state_out, keys_out, weights;
    const float scale = 0.25f;

    Array array(const Index &shape) { return Array(shape, c.layout).fill(random); }

    /// The axis of heads of queries as two: r, and h.
    Halide::Runtime::Buffer<void> queries(Halide::Runtime::Buffer<void> x, int axis) const {
        x.embed(axis, 0);
        halide_dimension_t *r = &x.raw_buffer()->dim[axis], *h = r + 1;
        *r = {0, (int32_t)c.R, h->stride};
        *h = {0, (int32_t)c.H, h->stride * (int32_t)c.R};
        return x;
    }
    static reference::Strided strided(const Array &a) {
        reference::Strided x{a.data(), {}};
        std::copy(a.stride.begin(), a.stride.end(), x.stride.begin());
        return x;
    }
    /// Of an array whose second axis has one element at most.
    static reference::Strided states(const Array &a) {
        reference::Strided x{a.data(), {a.stride[0]}};
        std::copy(a.stride.begin() + 2, a.stride.end(), x.stride.begin() + 1);
        return x;
    }
    /// Of x[outer, T, inner] the rows that the call computes.
    std::vector<double> rows(const std::vector<double> &x, int64_t outer, int64_t inner) const {
        std::vector<double> some;
        for (int64_t n = 0; n < outer; n++)
            some.insert(some.end(), x.begin() + (n * c.T + first) * inner, x.begin() + (n + 1) * c.T * inner);
        return some;
    }
};

}  // namespace test
