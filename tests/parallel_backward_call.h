// Calls of a kernel of the parallel form's gradient by its own C signature, against the reference: for kernels compiled ahead of
// time or just in time.
#pragma once
#include "check.h"
#include "reference/power_backward.h"
#include "shapes.h"
#include "stored.h"
#include "view.h"

#include <algorithm>
#include <string>

namespace test {

/// H heads of keys have R heads of queries each.
struct ParallelBackwardCase {
    std::string name;
    int64_t B, T, H, R;
    Layout layout;
    Gates gates;
    int degree;
    bool normalized;
    bool dq = true, dk = true, dv = true, dlog_decay = true;  // which are wanted
};

/// Everything that a kernel with blocks of C tokens may meet.
inline std::vector<ParallelBackwardCase> parallel_backward_cases(int C) {
    std::vector<ParallelBackwardCase> cases;
    for (int64_t T : {(int64_t)1, (int64_t)7, (int64_t)C - 1, (int64_t)C, (int64_t)C + 1, 3 * (int64_t)C + 2})
        cases.push_back({"T" + std::to_string(T), 1, T, 1, 2, Layout::compact, Gates::weak, 2, true});
    for (Gates gates : all_gates)
        cases.push_back({std::string("gates_") + name(gates), 2, 2 * C + C / 2 + 1, 2, 1, Layout::padded, gates, 1, false});
    for (Layout layout : layouts)
        cases.push_back({std::string("layout_") + name(layout), 2, C + 1, 2, 3, layout, Gates::strong, 1, true});
    for (int degree : {1, 2, 3, 4})
        for (bool normalized : {false, true})
            cases.push_back({"degree_" + std::to_string(degree) + (normalized ? "_normalized" : ""), 1, 2 * C + 1, 1, 2,
                             Layout::swapped, Gates::resets, degree, normalized});
    for (int wanted : {0, 1, 2, 4, 8, 7, 12})
        cases.push_back({"wanted_" + std::to_string(wanted), 1, C + C / 2, 1, 2, Layout::padded, Gates::weak, 2, true,
                         (wanted & 1) != 0, (wanted & 2) != 0, (wanted & 4) != 0, (wanted & 8) != 0});
    return cases;
}

class ParallelBackwardCall {
public:
    ParallelBackwardCall(const ParallelBackwardCase &c, Size size, const Dtype &dtype = f32)
        : c(c), dtype(dtype), K(size.K), V(size.V), q(array({c.B, c.T, c.H * c.R, K})), k(array({c.B, c.T, c.H, K})),
          v(array({c.B, c.T, c.H, V})), out(array({c.B, c.T, c.H * c.R, V})), dout(array(out.shape)),
          log_decay(log_decays(c.gates, c.B, c.T, c.H, c.layout, random)) {
        // Sums of weights stay away from 0: a quotient there is all rounding errors.
        if (c.normalized)
            for (Array *x : {&q, &k}) each(x->shape, [&](const Index &i) { (*x)(i) = 0.25f + std::abs((*x)(i)); });
        for (Array *x : {&q, &k, &v, &dout}) round_to(dtype, *x);
    }

    /// kernel(q, k, v, log_decay, out, dout, degree, normalized, scale, want_dq, want_dk, want_dv, want_dlog_decay, dq, dk, dv,
    /// dlog_decay) returns 0 and what the reference does.
    template<class Kernel>
    void expect_reference(const Kernel &kernel) {
        SCOPED_TRACE(c.name);
        reference::PowerInputs in{c.B, c.T, c.H, c.R, K, V, c.degree, c.normalized};
        in.q = strided(q), in.k = strided(k), in.v = strided(v), in.log_decay = strided(log_decay);
        static const float zero = 0;
        in.initial_state = {&zero, {}}, in.initial_keys = {&zero, {}}, in.scale = scale, in.states = false;
        const std::vector<double> values = reference::power(in).out;
        int64_t n = 0;
        each(out.shape, [&](const Index &i) { out(i) = (float)dtype.round((float)values[n++]); });
        const reference::PowerGradients want = reference::power_backward(in, strided(dout), {}, {}, strided(out));
        if (!c.normalized) out.forget();  // does not count

        const Array inputs[] = {q, k, v, log_decay, out, dout};
        Array dq(q.shape, c.layout), dk(k.shape, c.layout), dv(v.shape, c.layout);
        Array dlog_decay(log_decay.shape, strides(log_decay.shape, c.layout, false));
        for (Array *x : {&dq, &dk, &dv, &dlog_decay}) x->forget();
        Stored sq(dtype, q), sk(dtype, k), sv(dtype, v), so(dtype, out), sdo(dtype, dout);
        Stored sdq(dtype, dq), sdk(dtype, dk), sdv(dtype, dv);
        Buffer bq = queries(sq, q), bk = keys(sk, k), bv = keys(sv, v), bo = queries(so, out), bdo = queries(sdo, dout);
        Buffer bdq = queries(sdq, dq), bdk = keys(sdk, dk), bdv = keys(sdv, dv);
        Buffer bg = view(log_decay.data(), f32, log_decay, {1, 2, 0}),
               bdg = view(dlog_decay.data(), f32, dlog_decay, {1, 2, 0});
        // A GPU's kernel copies what it reads, and all of an output: what it does not write there stays as it is.
        for (Buffer *buffer : {&bq, &bk, &bv, &bg, &bo, &bdo, &bdq, &bdk, &bdv, &bdg}) buffer->set_host_dirty();
        ASSERT_EQ(kernel(bq, bk, bv, bg, bo, bdo, c.degree, (int)c.normalized, scale, (int)c.dq, (int)c.dk, (int)c.dv,
                         (int)c.dlog_decay, bdq, bdk, bdv, bdg),
                  0);
        for (Buffer *buffer : {&bdq, &bdk, &bdv, &bdg}) ASSERT_EQ(buffer->copy_to_host(), 0);

        const double share = tolerance::of_power_spread(K, K, c.T, 0);
        auto expect = [&](const char *what, bool wanted, Array &got, Stored *stored, const std::vector<double> &value,
                          const std::vector<double> &spread) {
            if (stored && wanted) stored->load();
            if (wanted) return expect_close(what, got, value, spread, share, stored ? dtype : f32);
            Array untouched = got;
            EXPECT_TRUE(same_bits(got, untouched.forget()) && (!stored || stored->unchanged()))
                << what << " is not wanted and was written";
        };
        expect("dq", c.dq, dq, &sdq, want.dq, want.dq_spread);
        expect("dk", c.dk, dk, &sdk, want.dk, want.dk_spread);
        expect("dv", c.dv, dv, &sdv, want.dv, want.dv_spread);
        expect("dlog_decay", c.dlog_decay, dlog_decay, nullptr, want.dlog_decay, want.dlog_decay_spread);
        for (Array *x : {&dq, &dk, &dv, &dlog_decay}) EXPECT_TRUE(x->gaps_intact()) << "memory between the rows was written";
        for (Stored *x : {&sdq, &sdk, &sdv}) EXPECT_TRUE(x->gaps_intact()) << "memory between the rows was written";
        const Array *after[] = {&q, &k, &v, &log_decay, &out, &dout};
        for (int m = 0; m < 6; m++) EXPECT_TRUE(after[m]->same_memory(inputs[m])) << "input " << m << " was written";
        for (Stored *x : {&sq, &sk, &sv, &so, &sdo}) EXPECT_TRUE(x->unchanged()) << "an input was written";
    }

private:
    using Buffer = Halide::Runtime::Buffer<void>;
    const ParallelBackwardCase c;
    const Dtype dtype;
    const int64_t K, V;
    Random random;
    Array q, k, v, out, dout, log_decay;
    const float scale = 0.25f;

    Array array(const Index &shape) { return Array(shape, c.layout).fill(random); }
    Buffer keys(Stored &stored, const Array &a) const { return view(stored.data(), dtype, a, {3, 1, 2, 0}); }
    Buffer queries(Stored &stored, const Array &a) const { return in_groups(keys(stored, a), 2, c.R); }
    static reference::Strided strided(const Array &a) {
        reference::Strided x{a.data(), {}};
        std::copy(a.stride.begin(), a.stride.end(), x.stride.begin());
        return x;
    }
};

}  // namespace test
