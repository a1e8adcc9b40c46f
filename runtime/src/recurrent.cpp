// A step, and calls of few tokens: the recurrent kernel on the state where it lies. One call of the kernel
// does a token of as many heads as lie within 32 bits of one another. A step of the usual size takes a microsecond or two:
// nothing here allocates, once there is a workspace, and threads are for large states only.
#include "recurrent.h"

#include "buffers.h"
#include "failure.h"

#include <HalideRuntime.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <limits>
#include <optional>

namespace holdfast {
namespace {

// To wake a thread takes as long as to go once through so many bytes of states.
constexpr int64_t worth_a_thread = 512 * 1024;

// Heads of queries that share a state go over it one after the other: states that stay in the first caches meanwhile.
constexpr int64_t states_in_cache = 256 * 1024;

/// Where the states of a sequence's heads lie.
struct States {
    float *first;
    int64_t head_stride, row_stride;
};

/// One token of `heads` neighbouring heads of keys of a sequence.
class Token {
public:
    Token(const Problem &p, int64_t s, int64_t h, int64_t heads, const States &states, float *sums)
        : p(p), s(s), h(h), heads(heads), q(group(p.q)), k(row(p.k)), v(row(p.v)), out(group(p.out)),
          log_decay(nullptr, float32, {head(p.log_decay.rank ? p.log_decay.stride[p.log_decay.rank - 1] : 0), {0, 1, 0}}),
          state(states.first, float32,
                {{0, (int32_t)p.V, 1}, {0, (int32_t)p.D, (int32_t)states.row_stride}, head(states.head_stride), {0, 1, 0}}),
          sum(sums, float32, {{0, (int32_t)p.V, 1}, {0, (int32_t)p.D, 0}, head(p.V), {0, 1, 0}}) {}

    /// Token t of the sequence.
    void run(const Variant &variant, Workspace &workspace, int64_t t) {
        static const float no_decay = 0;
        const int64_t b = p.entry(s), first = h * p.group();
        t += p.start(s);
        const Tensor &g = p.log_decay;
        log_decay.host = (uint8_t *)(g.rank == 3 ? g.at(b, t, h) : g.rank == 1 ? g.at(h) : &no_decay);
        q.host = p.q.at<uint8_t>(b, t, first), k.host = p.k.at<uint8_t>(b, t, h), v.host = p.v.at<uint8_t>(b, t, h);
        out.host = p.out.at<uint8_t>(b, t, first);
        RecurrentKernel *run = std::get<RecurrentKernel *>(variant.run);
        check_returned(run(&workspace, &q, &k, &v, &log_decay, p.scale, &state, &sum, &out), variant, workspace);
    }

private:
    const Problem &p;
    const int64_t s, h, heads;
    Buffer q, k, v, out;      // (d or e, h, 1), of q and out (d or e, g, h, 1)
    Buffer log_decay, state;  // (h, 1), (e, d, h, 1)
    Buffer sum;               // (e, d, h, 1), where all rows d of the state add to one: generators/recurrent.h

    halide_dimension_t head(int64_t stride) const { return {0, (int32_t)heads, heads > 1 ? (int32_t)stride : 0}; }
    Buffer row(const Tensor &x) const {
        return {nullptr, halide_type(x.dtype), {{0, (int32_t)x.shape[3], 1}, head(x.stride[2]), {0, 1, 0}}};
    }
    Buffer group(const Tensor &x) const {
        const int64_t size = p.group();
        return {nullptr,
                halide_type(x.dtype),
                {{0, (int32_t)x.shape[3], 1},
                 {0, (int32_t)size, size > 1 ? (int32_t)x.stride[2] : 0},
                 head(size * x.stride[2]),
                 {0, 1, 0}}};
    }
};

/// All tokens of all sequences and heads, in pieces.
class Work {
public:
    int64_t pieces;

    Work(const Problem &p, const Variant &variant) : p(p), variant(variant) {
        const int64_t all = p.N * p.Hk;
        const double tokens = p.packed() ? (double)p.T / p.N : (double)std::max<int64_t>(p.T, 1);  // of a sequence
        pieces = (int64_t)std::min<double>(all, 1 + (double)all * p.state_bytes() * tokens / worth_a_thread);
        in_place = p.final_state.rank && (p.V == 1 || p.final_state.stride[3] == 1);
        heads_at_once = p.T == 1 && in_place && heads_fit() ? p.Hk : 1;
        if (p.group() > 1) heads_at_once = std::min(heads_at_once, 1 + states_in_cache / p.state_bytes());
    }

    /// Piece n.
    void operator()(Workspace &workspace, int64_t n) const {
        const int64_t all = p.N * p.Hk, end = (n + 1) * all / pieces;
        for (int64_t first = n * all / pieces, heads; first < end; first += heads) {
            heads = std::min({heads_at_once, p.Hk - first % p.Hk, end - first});
            run(workspace, first / p.Hk, first % p.Hk, heads);
        }
    }

private:
    const Problem &p;
    const Variant &variant;
    int64_t heads_at_once;
    bool in_place;  // states are advanced where the final ones will be

    void run(Workspace &workspace, int64_t s, int64_t h, int64_t heads) const {
        const Tensor &initial = p.initial_state, &final = p.final_state;
        const Scratch sums(workspace, heads_at_once * p.V);
        std::optional<Scratch> scratch;
        if (!in_place) scratch.emplace(workspace, p.D * p.V);
        const States states =
            in_place ? States{final.at(s, h), final.stride[1], final.stride[2]} : States{scratch->floats(), 0, p.V};
        for (int64_t n = 0; n < heads; n++) {
            float *first = states.first + n * states.head_stride;
            const State state(first, p.D, p.V, states.row_stride);
            if (!initial.rank)
                for (int64_t d = 0; d < p.D; d++) std::fill_n(first + d * states.row_stride, p.V, 0.0f);
            else if (initial.at(s, h + n) != first)
                copy_state(State(initial, s, h + n), state);
        }
        Token token(p, s, h, heads, states, sums.floats());
        for (int64_t t = 0; t < p.length(s); t++) token.run(variant, workspace, t);
        if (!in_place && final.rank) copy_state(State(states.first, p.D, p.V, p.V), State(final, s, h));
    }

    /// Whether all heads of a batch entry are within 32 bits of one another.
    bool heads_fit() const {
        auto fits = [](int64_t extent, int64_t stride) {
            return std::llabs(stride) <= std::numeric_limits<int32_t>::max() / 2 / std::max<int64_t>(extent, 1);
        };
        const Tensor &g = p.log_decay, &s = p.final_state;
        return p.Hk > 0 && fits(p.H, p.q.stride[2]) && fits(p.Hk, p.k.stride[2]) && fits(p.Hk, p.v.stride[2]) &&
               fits(p.H, p.out.stride[2]) && (!g.rank || fits(p.Hk, g.stride[g.rank - 1])) && fits(p.Hk, s.stride[1]) &&
               fits(p.D, s.stride[2]);
    }
};

}  // namespace

void run_recurrent(holdfast_context &c, const char *call, const Problem &p, const Choice &choice) {
    const Variant &variant = select_variant("recurrent", p.q.dtype.name, p.K, p.V, 0, choice.backend, choice.forced);
    check_kernel_strides(p, 1);
    const Work work(p, variant);
    announce(c, call, variant, choice.why, p, "token by token", work.pieces);
    if (work.pieces > 0) c.for_each(work.pieces, std::cref(work));
}

}  // namespace holdfast
