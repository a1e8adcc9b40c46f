// A step, and calls token by token: the recurrent kernel on the state where it lies. One call of the kernel does a token of as many
// heads as lie within 32 bits of one another, or some blocks of tokens of one head. A step of the usual size takes a microsecond or
// two: nothing here allocates, once there is a workspace, and threads are for large states only.
#include "recurrent.h"

#include "buffers.h"
#include "failure.h"
#include "strips.h"

#include <HalideRuntime.h>

#include <algorithm>
#include <functional>
#include <optional>

namespace holdfast {
namespace {

// Heads of queries that share a state go over it one after the other: states that stay in the first caches meanwhile.
constexpr int64_t states_in_cache = 256 * 1024;

// Heads whose blocks of tokens take turns: states that stay in L2 meanwhile.
constexpr int64_t turns_in_cache = 512 * 1024;

// Tokens of a call: bytes that their sums may take, of L1 or little more. It has ten microseconds of work then.
constexpr int64_t sums_in_cache = 32 * 1024, most_tokens = 256;

/// Where the states of neighbouring heads lie.
struct States {
    float *first;
    int64_t head_stride, row_stride;
};

/// A call of the kernel: `tokens` of `heads` neighbouring heads of keys of sequence s, from the first ones on.
struct Call {
    int64_t s, first_token, tokens, first_head, heads;
};

/// Tokens of all of a call's heads: in blocks of so many.
void run_kernel(const Problem &p, const Variant &variant, Workspace &workspace, const Call &call, int64_t in_block,
                const States &states, float *sums) {
    static const float no_decay = 0;
    const int32_t I = (int32_t)in_block, N = (int32_t)(call.tokens / in_block), H = (int32_t)call.heads, G = (int32_t)p.group();
    const int32_t D = (int32_t)p.D, V = (int32_t)p.V;
    const int64_t b = p.entry(call.s), t = p.start(call.s) + call.first_token, h = call.first_head;
    const halide_dimension_t entry = axis(1, 0);
    auto rows = [&](const Tensor &x) {
        return Buffer(
            x.at<uint8_t>(b, t, h), halide_type(x.dtype),
            {{0, (int32_t)x.shape[3], 1}, axis(I, x.stride[1]), axis(N, I * x.stride[1]), axis(H, x.stride[2]), entry});
    };
    auto groups = [&](const Tensor &x) {
        return Buffer(x.at<uint8_t>(b, t, h * G), halide_type(x.dtype),
                      {{0, (int32_t)x.shape[3], 1},
                       axis(I, x.stride[1]),
                       axis(N, I * x.stride[1]),
                       axis(G, x.stride[2]),
                       axis(H, G * x.stride[2]),
                       entry});
    };
    const Tensor &g = p.log_decay;
    const int64_t along = g.rank == 3 ? g.stride[1] : 0, across = g.rank ? g.stride[g.rank - 1] : 0;
    Buffer q = groups(p.q), k = rows(p.k), v = rows(p.v), out = groups(p.out);
    Buffer log_decay(g.rank == 3   ? g.at(b, t, h)
                     : g.rank == 1 ? g.at(h)
                                   : &no_decay,
                     float32, {axis(I, along), axis(N, I * along), axis(H, across), entry});
    // The same state for all tokens, the same sum for all rows: generators/recurrent.h.
    Buffer state(states.first, float32,
                 {{0, V, 1}, {0, I, 0}, {0, D, (int32_t)states.row_stride}, {0, N, 0}, axis(H, states.head_stride), entry});
    Buffer sum(sums, float32, {{0, V, 1}, {0, I, V}, {0, D, 0}, axis(N, I * V), axis(H, N * I * V), entry});
    RecurrentKernel *run = std::get<RecurrentKernel *>(variant.run);
    check_returned(run(&workspace, &q, &k, &v, &log_decay, p.scale, &state, &sum, &out), variant, workspace);
}

/// All tokens of all sequences and heads, which are cut into so many pieces.
class Work {
public:
    /// `step` is for one token at a time, `blocks` for some of them, or the same again where there is none.
    Work(const Problem &p, const Variant &step, const Variant &blocks, int64_t pieces)
        : p(p), step(step), blocks(blocks), pieces(pieces) {
        in_place = p.final_state.rank && (p.V == 1 || p.final_state.stride[3] == 1);
        // Queries that share a state read what a token leaves of it.
        tokens_at_once = p.group() > 1 ? 1 : std::clamp<int64_t>(sums_in_cache / 4 / p.V, 1, most_tokens);
        tokens_at_once = std::min(tokens_at_once, std::max<int64_t>(p.T, 1));
        if (!tokens_fit()) tokens_at_once = 1;
        if (blocks.chunk > 1) tokens_at_once = std::max<int64_t>(tokens_at_once / blocks.chunk * blocks.chunk, 1);
        if (p.T == 1) {
            heads_at_once = heads_of_call = in_place && heads_fit() ? p.Hk : 1;
            if (p.group() > 1) heads_at_once = heads_of_call = std::min(heads_at_once, 1 + states_in_cache / p.state_bytes());
        } else {  // rows of neighbouring heads share pages and lines that are on their way
            heads_at_once = tokens_at_once > 1 ? std::max<int64_t>(turns_in_cache / p.state_bytes(), 1) : 1;
            heads_of_call = 1;
        }
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
    const Variant &step, &blocks;
    int64_t pieces, tokens_at_once, heads_at_once, heads_of_call;
    bool in_place;  // states are advanced where the final ones will be

    void run(Workspace &workspace, int64_t s, int64_t h, int64_t heads) const {
        const Tensor &initial = p.initial_state, &final = p.final_state;
        const Scratch sums(workspace, heads_of_call * tokens_at_once * p.V);
        std::optional<Scratch> scratch;
        if (!in_place) scratch.emplace(workspace, heads * p.D * p.V);
        const States states =
            in_place ? States{final.at(s, h), final.stride[1], final.stride[2]} : States{scratch->floats(), p.D * p.V, p.V};
        for (int64_t n = 0; n < heads; n++) {
            float *first = states.first + n * states.head_stride;
            const State state(first, p.D, p.V, states.row_stride);
            if (!initial.rank)
                for (int64_t d = 0; d < p.D; d++) std::fill_n(first + d * states.row_stride, p.V, 0.0f);
            else if (initial.at(s, h + n) != first)
                copy_state(State(initial, s, h + n), state);
        }
        const int64_t T = p.length(s);
        for (int64_t t = 0, tokens; t < T; t += tokens) {
            tokens = std::min(tokens_at_once, T - t);
            const bool whole = blocks.chunk > 1 && tokens >= blocks.chunk;
            const int64_t in_block = whole ? blocks.chunk : 1;
            tokens -= tokens % in_block;
            for (int64_t n = 0; n < heads; n += heads_of_call) {
                const States of_call = {states.first + n * states.head_stride, states.head_stride, states.row_stride};
                run_kernel(p, whole ? blocks : step, workspace, {s, t, tokens, h + n, std::min(heads_of_call, heads - n)},
                           in_block, of_call, sums.floats());
            }
        }
        if (in_place || !final.rank) return;
        for (int64_t n = 0; n < heads; n++)
            copy_state(State(states.first + n * states.head_stride, p.D, p.V, p.V), State(final, s, h + n));
    }

    /// Whether all tokens of a call are.
    bool tokens_fit() const {
        auto near = [&](const Tensor &x) { return x.rank < 3 || fits(tokens_at_once, x.stride[1]); };
        return near(p.q) && near(p.k) && near(p.v) && near(p.out) && near(p.log_decay);
    }
    /// Whether all heads of a batch entry are within 32 bits of one another.
    bool heads_fit() const {
        const Tensor &g = p.log_decay, &s = p.final_state;
        return p.Hk > 0 && fits(p.H, p.q.stride[2]) && fits(p.Hk, p.k.stride[2]) && fits(p.Hk, p.v.stride[2]) &&
               fits(p.H, p.out.stride[2]) && (!g.rank || fits(p.Hk, g.stride[g.rank - 1])) && fits(p.Hk, s.stride[1]) &&
               fits(p.D, s.stride[2]);
    }
};

}  // namespace

void run_recurrent(holdfast_context &c, const char *call, const Problem &p, const Choice &choice) {
    auto select = [&](int64_t tokens) -> const Variant & {
        return select_variant("recurrent", p.q.dtype.name, p.K, p.V, tokens, choice.backend, choice.forced);
    };
    const Variant &step = select(0), &blocks = p.T > 1 ? select(most_tokens) : step;
    check_kernel_strides(p, 1);
    const StepPieces pieces(p, c, {&step, &blocks});
    const Variant &most = blocks.chunk > 1 && p.group() <= 1 && p.longest() >= blocks.chunk ? blocks : step;  // of the tokens
    announce(c, call, most, choice.why, p, c.verbose ? pieces.how() : "", pieces.count());
    const auto work = [&](Workspace &workspace, int64_t n) {
        if (pieces.strips == 1) return Work(p, step, blocks, pieces.of_heads)(workspace, n);
        const int64_t strip = n % pieces.strips, first = pieces.begin(strip), columns = pieces.begin(strip + 1) - first;
        Work(columns_of(p, first, columns), *narrower(step, columns), *narrower(blocks, columns),
             pieces.of_heads)(workspace, n / pieces.strips);
    };
    if (pieces.count() > 0) c.for_each(pieces.count(), std::cref(work));
}

}  // namespace holdfast
