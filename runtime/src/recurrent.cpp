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

/// Where the states of a batch entry's heads lie.
struct States {
    float *first;
    int64_t head_stride, row_stride;
};

/// One token of `heads` neighbouring heads of a batch entry.
class Token {
public:
    Token(const Problem &p, int64_t b, int64_t h, int64_t heads, const States &states, float *sums)
        : p(p), b(b), h(h), heads(heads), q(row(p.q)), k(row(p.k)), v(row(p.v)), out(row(p.out)),
          log_decay(nullptr, float32, {head(p.log_decay.rank ? p.log_decay.stride[p.log_decay.rank - 1] : 0), {0, 1, 0}}),
          state(states.first, float32,
                {{0, (int32_t)p.V, 1}, {0, (int32_t)p.K, (int32_t)states.row_stride}, head(states.head_stride), {0, 1, 0}}),
          sum(sums, float32, {{0, (int32_t)p.V, 1}, {0, (int32_t)p.K, 0}, head(p.V), {0, 1, 0}}) {}

    void run(const Variant &variant, Workspace &workspace, int64_t t) {
        static const float no_decay = 0;
        const Tensor &g = p.log_decay;
        log_decay.host = (uint8_t *)(g.rank == 3 ? g.at(b, t, h) : g.rank == 1 ? g.at(h) : &no_decay);
        q.host = p.q.at<uint8_t>(b, t, h), k.host = p.k.at<uint8_t>(b, t, h), v.host = p.v.at<uint8_t>(b, t, h);
        out.host = p.out.at<uint8_t>(b, t, h);
        RecurrentKernel *run = std::get<RecurrentKernel *>(variant.run);
        const int rc = run(&workspace, &q, &k, &v, &log_decay, p.scale, &state, &sum, &out);
        if (rc == halide_error_code_out_of_memory) fail(HOLDFAST_OUT_OF_MEMORY, "workspace: out of memory in ", variant.name);
        if (rc) fail(HOLDFAST_INTERNAL_ERROR, variant.name, " returned ", rc, ": ", workspace.error);
    }

private:
    const Problem &p;
    const int64_t b, h, heads;
    Buffer q, k, v, out;      // (d or e, h, 1)
    Buffer log_decay, state;  // (h, 1), (e, d, h, 1)
    Buffer sum;               // (e, d, h, 1), where all rows d of the state add to one: generators/recurrent.h

    halide_dimension_t head(int64_t stride) const { return {0, (int32_t)heads, heads > 1 ? (int32_t)stride : 0}; }
    Buffer row(const Tensor &x) const {
        return {nullptr, halide_type(x.dtype), {{0, (int32_t)x.shape[3], 1}, head(x.stride[2]), {0, 1, 0}}};
    }
};

/// All tokens of all batch entries and heads, in pieces.
class Work {
public:
    int64_t pieces;

    Work(const Problem &p, const Variant &variant) : p(p), variant(variant) {
        const int64_t all = p.B * p.H, bytes = p.state_bytes() * std::max<int64_t>(p.T, 1);
        pieces = (int64_t)std::min<double>(all, 1 + (double)all * bytes / worth_a_thread);
        heads_at_once = p.T == 1 && p.final_state.rank && heads_fit() ? p.H : 1;
    }

    /// Piece n.
    void operator()(Workspace &workspace, int64_t n) const {
        const int64_t all = p.B * p.H, end = (n + 1) * all / pieces;
        for (int64_t first = n * all / pieces, heads; first < end; first += heads) {
            heads = std::min({heads_at_once, p.H - first % p.H, end - first});
            run(workspace, first / p.H, first % p.H, heads);
        }
    }

private:
    const Problem &p;
    const Variant &variant;
    int64_t heads_at_once;

    void run(Workspace &workspace, int64_t b, int64_t h, int64_t heads) const {
        const Tensor &final = p.final_state;
        const Scratch sums(workspace, heads_at_once * p.V);
        std::optional<Scratch> scratch;
        if (!final.rank) scratch.emplace(workspace, p.K * p.V);
        const States states =
            final.rank ? States{final.at(b, h), final.stride[1], final.stride[2]} : States{scratch->floats(), 0, p.V};
        for (int64_t n = 0; n < heads; n++) start(states.first + n * states.head_stride, states.row_stride, b, h + n);
        Token token(p, b, h, heads, states, sums.floats());
        for (int64_t t = 0; t < p.T; t++) token.run(variant, workspace, t);
    }

    /// Put the initial state of a head where its states will be.
    void start(float *state, int64_t row_stride, int64_t b, int64_t h) const {
        const Tensor &initial = p.initial_state;
        if (initial.rank && initial.at(b, h) == state) return;
        for (int64_t d = 0; d < p.K; d++, state += row_stride)
            if (initial.rank)
                std::copy_n(initial.at(b, h, d), p.V, state);
            else
                std::fill_n(state, p.V, 0.0f);
    }

    /// Whether all heads of a batch entry are within 32 bits of one another.
    bool heads_fit() const {
        auto fits = [](int64_t extent, int64_t stride) {
            return std::llabs(stride) <= std::numeric_limits<int32_t>::max() / 2 / extent;
        };
        const Tensor &g = p.log_decay, &s = p.final_state;
        return p.H > 0 && fits(p.H, p.q.stride[2]) && fits(p.H, p.k.stride[2]) && fits(p.H, p.v.stride[2]) &&
               fits(p.H, p.out.stride[2]) && (!g.rank || fits(p.H, g.stride[g.rank - 1])) && fits(p.H, s.stride[1]) &&
               fits(p.K, s.stride[2]);
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
