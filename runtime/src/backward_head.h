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
    const int32_t group;           // heads of queries
    int32_t want_dq, want_dk, want_dv, want_dlog_decay;

    /// At most `tokens` are looked at at a time.
    BackwardHead(const BackwardProblem &p, Workspace &workspace, int64_t s, int64_t h, int64_t tokens)
        : q(queries(p.q, p, s, h)), k(keys(p.k, p, s, h)), v(keys(p.v, p, s, h)),
          out(queries(p.out.rank ? p.out : output(p), p, s, h)), dout(queries(output(p), p, s, h)),
          dq(queries(p.dq.rank ? p.dq : p.q, p, s, h)), dk(keys(p.dk.rank ? p.dk : p.k, p, s, h)),
          dv(keys(p.dv.rank ? p.dv : p.v, p, s, h)), log_decay(nullptr, float32, {{0, 0, 0}, {0, 1, 0}, {0, 1, 0}}),
          dlog_decay(nullptr, float32, {{0, 0, 0}, {0, 1, 0}, {0, 1, 0}}), group((int32_t)p.group()),
          want_dq(p.dq.rank > 0 && p.group() > 0), want_dk(p.dk.rank > 0), want_dv(p.dv.rank > 0),
          want_dlog_decay(p.dlog_decay.rank > 0), p(p), s(s), h(h), row(workspace, std::max(p.K, p.V)),
          decays(workspace, per_head() ? tokens : 1) {
        std::fill_n(row.floats(), std::max(p.K, p.V), 0.0f);
        if (p.group() == 0)
            for (HeadRows *rows : {&q, &out, &dout}) rows->all_at(row.floats());
        if (!want_dq) dq.all_at(row.floats());
        if (!want_dk) dk.all_at(row.floats());
        if (!want_dv) dv.all_at(row.floats());
    }

    /// With heads of queries, or without: for states alone.
    void with_queries(bool are_there) {
        for (HeadRows *rows : {&q, &out}) rows->axes[2].extent = are_there ? group : 0;
    }
    /// Tokens t .. t + tokens - 1 of the sequence.
    void look_at(int64_t t, int64_t tokens) {
        for (HeadRows *rows : {&q, &k, &v, &out, &dout, &dq, &dk, &dv}) rows->look_at(t, tokens);
        static const float no_decay = 0;
        const Tensor &g = p.log_decay, &dg = p.dlog_decay;
        const int64_t b = p.entry(s), at = p.start(s) + t;
        log_decay.host = (uint8_t *)(g.rank == 3 ? g.at(b, at, h) : g.rank == 1 ? g.at(h) : &no_decay);
        dlog_decay.host = (uint8_t *)(dg.rank == 3 ? dg.at(b, at, h) : decays.floats());
        log_decay.axes[0] = axis(tokens, g.rank == 3 ? g.stride[1] : 0);
        dlog_decay.axes[0] = axis(tokens, dg.rank == 3 ? dg.stride[1] : per_head());
    }
    /// What is looked at next are tokens of `next` from t on.
    void followed_by(const BackwardHead &next, int64_t t) {
        q.followed_by(next.q, t), k.followed_by(next.k, t), v.followed_by(next.v, t), dout.followed_by(next.dout, t);
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

    /// Rows of V elements, of which there are none where dout is not given.
    static const Tensor &output(const BackwardProblem &p) { return p.dout.rank ? p.dout : p.v; }
    static HeadRows queries(const Tensor &x, const BackwardProblem &p, int64_t s, int64_t h) {
        return HeadRows(x, p.entry(s), p.start(s), h, p.group());
    }
    static HeadRows keys(const Tensor &x, const BackwardProblem &p, int64_t s, int64_t h) {
        return HeadRows(x, p.entry(s), p.start(s), h);
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
