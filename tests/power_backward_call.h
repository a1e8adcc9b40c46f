// Calls of power_backward by its own C signature, chunk by chunk from the last to the first, against the reference: for kernels compiled
// ahead of time or just in time.
#pragma once
#include "power_call.h"
#include "reference/power_backward.h"

namespace test {

/// T tokens in calls of so many: the states between them are the reference's, the gradients those of the call after.
struct PowerBackwardCase {
    std::string name;
    Index calls;
    int64_t B, H, G;  // heads of keys, query heads to each
    Layout layout;
    Gates gates;
    bool normalize;
    bool want_dq = true, want_dk = true, want_dv = true, want_dlog_decay = true, want_dstate = true, want_dkeys = true;
    PowerCase::Contents contents = PowerCase::Contents::random;
    double size_of_keys = 1;
    bool in_place = false;  // the gradients of states are read and written where they lie
};

/// Everything that a kernel with chunks of C tokens may meet.
inline std::vector<PowerBackwardCase> power_backward_cases(int C, const Dtype &dtype) {
    using Case = PowerBackwardCase;
    std::vector<Case> cases;
    for (Gates gates : all_gates)
        cases.push_back(
            {std::string("gates_") + name(gates), {C, C / 2 + 1}, 1, 2, 1, Layout::padded, gates, gates != Gates::none});
    for (Layout layout : layouts)
        cases.push_back(
            {std::string("layout_") + name(layout), {C - 1, 1}, 2, 1, 2, layout, Gates::weak, layout != Layout::swapped});
    cases.push_back({"plain_resets", {C, C / 2 + 1}, 1, 1, 2, Layout::padded, Gates::resets, false});
    // One of five, all of rows, all but dq; in two of them the sum of keys the other way than the state.
    for (int unwanted = 0; unwanted < 7; unwanted++)
        cases.push_back({"unwanted_" + std::to_string(unwanted),
                         {C / 2},
                         1,
                         1,
                         2,
                         Layout::padded,
                         Gates::weak,
                         unwanted % 2 == 0,
                         unwanted != 0 && unwanted != 5,
                         unwanted != 1 && unwanted < 5,
                         unwanted != 2 && unwanted < 5,
                         unwanted != 3 && unwanted < 5,
                         unwanted != 4 && unwanted != 6,
                         unwanted != 0 && unwanted != 6});
    cases.push_back({"positive", {C, C}, 1, 1, 3, Layout::compact, Gates::weak, true});
    cases.back().contents = PowerCase::Contents::positive;
    cases.push_back({"ones", {C, C, 2}, 1, 1, 1, Layout::compact, Gates::none, true});
    cases.back().contents = PowerCase::Contents::ones;
    cases.push_back({"in_place", {C, 5}, 1, 2, 1, Layout::padded, Gates::weak, true});
    cases.back().in_place = true;
    for (double size : {dtype == f16 ? 1e-2 : 1e-8, dtype == f16 ? 1e2 : 1e6}) {
        cases.push_back({size < 1 ? "tiny" : "huge", {C, C / 2}, 1, 1, 1, Layout::compact, Gates::weak, true});
        cases.back().contents = PowerCase::Contents::positive, cases.back().size_of_keys = size;
    }
    return cases;
}

class PowerBackwardCall : PowerTensors<PowerBackwardCase> {
    Array dout, dstate, dkeys;

public:
    PowerBackwardCall(const PowerBackwardCase &c, Size size, int degree, const Dtype &dtype = f32, bool dense_states = false)
        : PowerTensors(c, size, degree, dtype, dense_states, degree % 2 && c.normalize ? 0.5 : -1), dout(array(out.shape, 1)),
          // of a size that is lost neither behind what the rows give, nor they behind it
          dstate(array(state.shape, std::pow(c.size_of_keys, -degree), dense_states)),
          dkeys(array(keys.shape, std::pow(c.size_of_keys, -degree))) {
        round_to(dtype, dout);
    }

    /// kernel(q, k, v, log_decay, state_in, keys_in, out, dout, dstate_out, dkeys_out, degree, normalize, scale, want_dq, want_dk,
    /// want_dv, want_dlog_decay, want_dstate, want_dkeys, dq, dk, dv, dlog_decay, dstate_in, dkeys_in) returns 0 for every chunk, and
    /// together they do what the reference does.
    template<class Kernel>
    void expect_reference(const Kernel &kernel) {
        SCOPED_TRACE(c.name + ", degree " + std::to_string(degree));
        // What the forward returned, and the states before each call.
        std::vector<Array> states = {state}, sums = {keys};
        for (int64_t t = 0, n = 0; n < (int64_t)c.calls.size(); t += c.calls[n++]) {
            const reference::PowerResult chunk = reference::power(inputs(t, c.calls[n], states.back(), sums.back()));
            int64_t element = 0;
            each({c.B, c.calls[n], c.H * c.G, V},
                 [&](Index i) { i[1] += t, out(i) = (float)dtype.round((float)chunk.out[element++]); });
            Array next = state, next_sum = keys;
            element = 0, each(state.shape, [&](const Index &i) { next(i) = (float)chunk.state[element++]; });
            element = 0, each(keys.shape, [&](const Index &i) { next_sum(i) = (float)chunk.keys[element++]; });
            states.push_back(next), sums.push_back(next_sum);
        }
        const int64_t longest = *std::max_element(c.calls.begin(), c.calls.end());
        const reference::PowerGradients want = reference::power_backward(
            inputs(0, T, state, keys), strided(dout), strided(dstate), strided(dkeys), strided(out), longest);

        // What does not count is NaN.
        if (!c.normalize) keys.forget(), dkeys.forget(), out.forget();
        const Array before[] = {q, k, v, log_decay, out, dout};
        Array dq(q.shape, c.layout), dk(k.shape, c.layout), dv(v.shape, c.layout), dlog_decay(log_decay.shape, c.layout);
        Array next_dstate = dstate, next_dkeys = dkeys;
        for (Array *x : {&dq, &dk, &dv, &dlog_decay, &next_dstate, &next_dkeys}) x->forget();
        Stored sq(dtype, q), sk(dtype, k), sv(dtype, v), so(dtype, out), sdo(dtype, dout);
        Stored sdq(dtype, dq), sdk(dtype, dk), sdv(dtype, dv);
        int64_t t = T;
        for (int64_t n = (int64_t)c.calls.size() - 1; n >= 0; n--) {
            const int64_t tokens = c.calls[n];
            t -= tokens;
            Buffer bq = rows(sq, q, t, tokens, c.G), bk = rows(sk, k, t, tokens), bv = rows(sv, v, t, tokens);
            Buffer bo = rows(so, out, t, tokens, c.G), bdo = rows(sdo, dout, t, tokens, c.G);
            Buffer bdq = rows(sdq, dq, t, tokens, c.G), bdk = rows(sdk, dk, t, tokens), bdv = rows(sdv, dv, t, tokens);
            Buffer bg = gates(log_decay, t, tokens), bdg = gates(dlog_decay, t, tokens);
            if (!c.normalize) sums[n].forget();
            Buffer bs = state_of(states[n]), bc = keys_of(sums[n]), bds = state_of(dstate), bdc = keys_of(dkeys);
            Buffer bnds = state_of(next_dstate), bndc = keys_of(next_dkeys);
            // A GPU's kernel copies what it reads, and all of an output: what it does not write there stays as it is.
            for (Buffer *buffer : {&bq, &bk, &bv, &bg, &bs, &bc, &bo, &bdo, &bds, &bdc, &bdq, &bdk, &bdv, &bdg, &bnds, &bndc})
                buffer->set_host_dirty();
            Buffer &to = c.in_place ? bds : bnds, &keys_to = c.in_place ? bdc : bndc;
            ASSERT_EQ(kernel(bq, bk, bv, bg, bs, bc, bo, bdo, bds, bdc, degree, (int)c.normalize, scale, (int)c.want_dq,
                             (int)c.want_dk, (int)c.want_dv, (int)c.want_dlog_decay, (int)(n || c.want_dstate),
                             (int)(n || c.want_dkeys), bdq, bdk, bdv, bdg, to, keys_to),
                      0);
            for (Buffer *buffer : {&bdq, &bdk, &bdv, &bdg, &to, &keys_to}) ASSERT_EQ(buffer->copy_to_host(), 0);
            if (!c.in_place) std::swap(dstate, next_dstate), std::swap(dkeys, next_dkeys);
        }
        const double share = tolerance::of_power_gradient_spread(K, V, D, c.G * longest, (int64_t)c.calls.size());
        auto expect = [&](const char *what, bool wanted, Array &got, Stored *stored, const std::vector<double> &value,
                          const std::vector<double> &spread) {
            if (wanted) {
                if (stored) stored->load();
                return expect_close(what, got, value, spread, share, stored ? dtype : f32);
            }
            Array untouched = got;
            EXPECT_TRUE(same_bits(got, untouched.forget()) && (!stored || stored->unchanged()))
                << what << " is not wanted and was written";
        };
        expect("dq", c.want_dq, dq, &sdq, want.dq, want.dq_spread);
        expect("dk", c.want_dk, dk, &sdk, want.dk, want.dk_spread);
        expect("dv", c.want_dv, dv, &sdv, want.dv, want.dv_spread);
        expect("dlog_decay", c.want_dlog_decay, dlog_decay, nullptr, want.dlog_decay, want.dlog_decay_spread);
        expect("dstate", c.want_dstate, dstate, nullptr, want.dstate, want.dstate_spread);
        if (c.normalize) expect("dkeys", c.want_dkeys, dkeys, nullptr, want.dkeys, want.dkeys_spread);
        EXPECT_TRUE(dq.gaps_intact() && dk.gaps_intact() && dv.gaps_intact() && sdq.gaps_intact() && sdk.gaps_intact() &&
                    sdv.gaps_intact() && dlog_decay.gaps_intact() && dstate.gaps_intact() && dkeys.gaps_intact())
            << "memory between the rows was written";
        const Array *after[] = {&q, &k, &v, &log_decay, &out, &dout};
        for (int n = 0; n < 6; n++) EXPECT_TRUE(after[n]->same_memory(before[n])) << "input " << n << " was written";
        const Stored *stored[] = {&sq, &sk, &sv, &so, &sdo};
        for (int n = 0; n < 5; n++) EXPECT_TRUE(stored[n]->unchanged()) << "input " << n << " was written";
    }
};

}  // namespace test
