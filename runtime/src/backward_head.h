// What the kernels of the gradient are called with for one sequence and head of keys.
#pragma once
#include "buffers.h"
#include "problem.h"

#include <algorithm>
#include <vector>

namespace holdfast {

/// Views of its rows and decays and of their gradients, of which some tokens at a time are looked at.
class BackwardHead {
public:
    HeadRows q, k, v, out, dout, dq, dk, dv;
    Buffer log_decay, dlog_decay;  // (t, 1, 1)
    int32_t want_dq, want_dk, want_dv, want_dlog_decay;

    /// At most `tokens` are looked at at a time.
    BackwardHead(const BackwardProblem &p, Workspace &workspace, int64_t s, int64_t h, int64_t tokens)
        : q(p.q, p.entry(s), p.start(s), h, p.group()), k(p.k, p.entry(s), p.start(s), h), v(p.v, p.entry(s), p.start(s), h),
          out(rows(p.out, p.dout, p, s, h, p.group())), dout(p.dout, p.entry(s), p.start(s), h, p.group()),
          dq(rows(p.dq, p.q, p, s, h, p.group())), dk(rows(p.dk, p.k, p, s, h)), dv(rows(p.dv, p.v, p, s, h)),
          log_decay(nullptr, float32, {{0, 0, 0}, {0, 1, 0}, {0, 1, 0}}),
          dlog_decay(nullptr, float32, {{0, 0, 0}, {0, 1, 0}, {0, 1, 0}}), want_dq(p.dq.rank > 0), want_dk(p.dk.rank > 0),
          want_dv(p.dv.rank > 0), want_dlog_decay(p.dlog_decay.rank > 0), p(p), s(s), h(h), row(workspace, std::max(p.K, p.V)),
          decays(workspace, per_head() ? tokens : 1) {
        if (!want_dq) dq.all_at(row.floats());
        if (!want_dk) dk.all_at(row.floats());
        if (!want_dv) dv.all_at(row.floats());
        if (p.log_decay.rank == 3) log_decay.axes[0].stride = (int32_t)p.log_decay.stride[1];
        if (p.dlog_decay.rank == 3) dlog_decay.axes[0].stride = (int32_t)p.dlog_decay.stride[1];
        if (per_head()) dlog_decay.axes[0].stride = 1;
    }

    /// Tokens t .. t + tokens - 1 of the sequence.
    void look_at(int64_t t, int64_t tokens) {
        for (HeadRows *rows : {&q, &k, &v, &out, &dout, &dq, &dk, &dv}) rows->look_at(t, tokens);
        static const float no_decay = 0;
        const Tensor &g = p.log_decay, &dg = p.dlog_decay;
        const int64_t b = p.entry(s), at = p.start(s) + t;
        log_decay.host = (uint8_t *)(g.rank == 3 ? g.at(b, at, h) : g.rank == 1 ? g.at(h) : &no_decay);
        dlog_decay.host = (uint8_t *)(dg.rank == 3 ? dg.at(b, at, h) : decays.floats());
        for (Buffer *x : {&log_decay, &dlog_decay}) x->axes[0].extent = (int32_t)tokens;
    }
    /// What is looked at has been computed.
    void done() {
        if (!per_head()) return;
        for (int64_t t = dlog_decay.axes[0].extent; t-- > 0;) sum += decays.floats()[t];
    }
    /// Gradient of a decay per head, of this sequence alone.
    double sum = 0;

private:
    const BackwardProblem &p;
    const int64_t s, h;
    const Scratch row, decays;

    bool per_head() const { return p.dlog_decay.rank == 1; }

    /// Of `x`, or of one like it where that is not there.
    static HeadRows rows(const Tensor &x, const Tensor &like, const BackwardProblem &p, int64_t s, int64_t h) {
        return HeadRows(x.rank ? x : like, p.entry(s), p.start(s), h);
    }
    static HeadRows rows(const Tensor &x, const Tensor &like, const BackwardProblem &p, int64_t s, int64_t h, int64_t group) {
        return HeadRows(x.rank ? x : like, p.entry(s), p.start(s), h, group);
    }
};

/// Gradients of decays per head, if they are wanted: of each sequence and head, added up in an order that threads do not change.
class DecaySums {
public:
    explicit DecaySums(const BackwardProblem &p) : p(p), sums(p.dlog_decay.rank == 1 ? p.N * p.Hk : 0) {}
    void put(int64_t s, int64_t h, double sum) {
        if (!sums.empty()) sums[s * p.Hk + h] = sum;
    }
    void finish() const {
        for (int64_t h = 0; p.dlog_decay.rank == 1 && h < p.Hk; h++) {
            double sum = 0;
            for (int64_t s = 0; s < p.N; s++) sum += sums[s * p.Hk + h];
            *p.dlog_decay.at(h) = (float)sum;
        }
    }

private:
    const BackwardProblem &p;
    std::vector<double> sums;
};

}  // namespace holdfast
