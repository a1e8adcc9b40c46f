// Calls of a chunkwise_backward kernel by its own C signature, against the reference: for kernels compiled ahead of time or just
// in time.
#pragma once
#include "kernel_call.h"
#include "reference/backward.h"

namespace test {

/// The gradients that a call asks for. What it does not ask for stays as it was.
struct Wants {
    bool dq = true, dk = true, dv = true, dlog_decay = true, dstate = true;
};
inline std::string name(const Wants &w) {
    std::string list;
    for (const auto &[want, text] :
         {std::make_pair(w.dq, "dq"), {w.dk, "dk"}, {w.dv, "dv"}, {w.dlog_decay, "dlog_decay"}, {w.dstate, "dstate"}})
        if (want) list += (list.empty() ? "" : "_") + std::string(text);
    return list.empty() ? "none" : list;
}

/// One gradient left out, one alone, and none.
inline std::vector<Wants> some_wants() {
    std::vector<Wants> list = {{false, false, false, false, false}};
    for (int n = 0; n < 5; n++)
        for (bool alone : {false, true})
            list.push_back({(n == 0) == alone, (n == 1) == alone, (n == 2) == alone, (n == 3) == alone, (n == 4) == alone});
    return list;
}

class BackwardCall : KernelTensors {
    const Wants wants;
    Array dout, dstate_out, dq, dk, dv, dlog_decay, dstate_in;

public:
    BackwardCall(const KernelCase &c, int C, Size size, const Dtype &dtype = f32, const Wants &wants = {},
                 bool rounds_operands = false)
        : KernelTensors(c, C, size, dtype, {1, rounds_operands}), wants(wants), dout(rows_of(c.group, V)), dstate_out(states()),
          dq(rows_of(c.group, K)), dk(rows_of(1, K)), dv(rows_of(1, V)),
          dlog_decay({c.B, T, c.H}, strides({c.B, T, c.H}, c.layout, false)), dstate_in(states()) {
        for (Array *x : {&dq, &dk, &dv, &dlog_decay, &dstate_in}) x->forget();
        round_to(dtype, dout);
    }

    /// kernel(q, k, v, log_decay, state_in, dout, dstate_out, chunks, count, scale, want_dq, want_dk, want_dv, want_dlog_decay,
    /// want_dstate, dq, dk, dv, dlog_decay, dstate_in) returns 0, the gradients of the reference, and writes nothing else.
    template<class Kernel>
    void expect_reference(const Kernel &kernel) {
        SCOPED_TRACE(c.name + ", wanted: " + name(wants));
        run(kernel);
        const double of_state = tolerance::of_gradient_spread(K, V, c.group * chunk, table.count);
        double share = of_state, absolute = 0;
        if (operands.rounded) {
            absolute = tolerance::between_operands(dtype, K * V + K + V + c.group * chunk);
            share += tolerance::of_rounded_gradients(dtype);
        }
        for (int64_t s = 0; s < N; s++) {
            SCOPED_TRACE("sequence " + std::to_string(s));
            const reference::Inputs in = inputs(s);
            const reference::Strided from_out = rows(dout, starts[s]), from_state = states(dstate_out, s);
            const reference::Gradients want = reference::retention_backward(in, from_out, from_state);
            const reference::Gradients spread = reference::spread_backward(in, from_out, from_state);
            auto of = [&](const Array &rows) { return slice(rows, 1, starts[s], c.lengths[s]); };
            if (wants.dq) expect_close("dq", of(dq), want.q, spread.q, share, dtype, absolute);
            if (wants.dk) expect_close("dk", of(dk), want.k, spread.k, share, dtype, absolute);
            if (wants.dv) expect_close("dv", of(dv), want.v, spread.v, share, dtype, absolute);
            if (wants.dlog_decay)
                expect_close("dlog_decay", of(dlog_decay), want.log_decay, spread.log_decay, share, f32, absolute);
            if (wants.dstate)
                expect_close("dstate_in", slice(dstate_in, 1, s, 1), want.initial_state, spread.initial_state, of_state);
        }
    }

    /// Root mean square errors of gradients, each relative to its values; of one sequence.
    struct Errors {
        double rows, decays, states;  // the largest of those of q, k and v
    };
    template<class Kernel>
    Errors relative_errors(const Kernel &kernel) {
        run(kernel);
        const reference::Gradients want = reference::retention_backward(inputs(0), rows(dout, 0), states(dstate_out, 0));
        return {
            std::max({relative_rms(dq.values(), want.q), relative_rms(dk.values(), want.k), relative_rms(dv.values(), want.v)}),
            relative_rms(dlog_decay.values(), want.log_decay), relative_rms(dstate_in.values(), want.initial_state)};
    }

private:
    template<class Kernel>
    void run(const Kernel &kernel) {
        Stored sq(dtype, q), sk(dtype, k), sv(dtype, v), so(dtype, dout), tq(dtype, dq), tk(dtype, dk), tv(dtype, dv);
        Buffer bq = in_groups(rows(sq, q), 2, c.group), bk = rows(sk, k), bv = rows(sv, v), bg = gates(log_decay),
               bs = states(state_in), bo = in_groups(rows(so, dout), 2, c.group), bz = states(dstate_out);
        Buffer rq = in_groups(rows(tq, dq), 2, c.group), rk = rows(tk, dk), rv = rows(tv, dv), rg = gates(dlog_decay),
               rs = states(dstate_in);
        Halide::Runtime::Buffer<int32_t> chunks = this->chunks();
        const Array *after[] = {&q, &k, &v, &log_decay, &state_in, &dout, &dstate_out};
        const std::vector<Array> before = {q, k, v, log_decay, state_in, dout, dstate_out};
        const std::vector<Array> results_before = {dq, dk, dv, dlog_decay, dstate_in};
        // A GPU's kernel copies what it reads, and all of an output: what it does not write there stays as it is.
        for (Buffer *buffer : {&bq, &bk, &bv, &bg, &bs, &bo, &bz, &rq, &rk, &rv, &rg, &rs}) buffer->set_host_dirty();
        chunks.set_host_dirty();
        ASSERT_EQ(kernel(bq, bk, bv, bg, bs, bo, bz, chunks, (int32_t)table.count, scale, (int32_t)wants.dq, (int32_t)wants.dk,
                         (int32_t)wants.dv, (int32_t)wants.dlog_decay, (int32_t)wants.dstate, rq, rk, rv, rg, rs),
                  0);
        for (Buffer *buffer : {&rq, &rk, &rv, &rg, &rs}) ASSERT_EQ(buffer->copy_to_host(), 0);
        const bool wanted[] = {wants.dq, wants.dk, wants.dv, wants.dlog_decay, wants.dstate};
        Stored *stored[] = {&tq, &tk, &tv};
        for (int n = 0; n < 3; n++) {
            EXPECT_TRUE(stored[n]->gaps_intact()) << "memory between the rows of gradient " << n << " was written";
            EXPECT_TRUE(wanted[n] || stored[n]->unchanged()) << "gradient " << n << " was written";
            if (wanted[n]) stored[n]->load();
        }
        Array *results[] = {&dq, &dk, &dv, &dlog_decay, &dstate_in};
        for (int n = 0; n < 5; n++) {
            EXPECT_TRUE(results[n]->gaps_intact()) << "memory between the rows of gradient " << n << " was written";
            EXPECT_TRUE(wanted[n] || results[n]->same_memory(results_before[n])) << "gradient " << n << " was written";
        }
        for (int n = 0; n < 7; n++) EXPECT_TRUE(after[n]->same_memory(before[n])) << "input " << n << " was written";
        for (const Stored *x : {&sq, &sk, &sv, &so}) EXPECT_TRUE(x->unchanged()) << "an input was written";
    }
};

}  // namespace test
