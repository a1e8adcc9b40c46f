// The kernels power, of a chunk, and power_step, of a token: a sequence is a chain of calls for each head, with its state, D V
// numbers, going from one call to the next. Nothing is kept between chunks, so workspace does not grow with T. Where there are fewer
// heads than threads, some columns of the values are a piece of work of their own, for which phi is formed once more, a small part, or
// in chunks some of the tokens.
#include "power.h"

#include "buffers.h"
#include "expansion.h"
#include "failure.h"
#include "spans.h"
#include "strips.h"

#include <HalideRuntime.h>

#include <algorithm>
#include <limits>
#include <optional>

namespace holdfast {
namespace {

/// Part of a problem: a sequence, a head of keys, some columns of its values, and the tokens whose outputs are wanted.
struct Part {
    int64_t sequence, head, column, columns, from, to;
};

/// The state and sum of keys of a part, in the kernels' order.
class Carried {
public:
    Carried(const Problem &p, const Part &part, Workspace &workspace) : p(p), part(part), V(part.columns) {
        tight = expanded_size(p.K, p.degree, HOLDFAST_EXPANSION_TIGHT, std::numeric_limits<int32_t>::max());
        memory.emplace(workspace, tight * (V + 1));
        state = memory->floats(), sum = state + tight * V;
        std::fill_n(state, tight * (V + 1), 0.0f);
        constexpr auto order = HOLDFAST_EXPANSION_TIGHT;
        if (p.initial_state.rank) convert(of_caller(p.initial_state), p.expansion, {state, V, 1}, order, p.D, p.K, V);
        if (p.initial_sum.rank) convert(of_caller(p.initial_sum), p.expansion, {sum, 1, 1}, order, p.D, p.K, 1);
    }
    void finish() const {
        constexpr auto order = HOLDFAST_EXPANSION_TIGHT;
        if (p.final_state.rank) convert({state, V, 1}, order, of_caller(p.final_state), p.expansion, p.D, p.K, V);
        if (p.final_sum.rank && part.column == 0) convert({sum, 1, 1}, order, of_caller(p.final_sum), p.expansion, p.D, p.K, 1);
    }

    float *state, *sum;  // advanced in place
    int64_t tight;       // D

private:
    const Problem &p;
    const Part part;
    const int64_t V;
    std::optional<Scratch> memory;

    Features of_caller(const Tensor &t) const {
        const bool state = t.rank == 4;
        float *first = t.at(part.sequence, part.head);
        return {first + (state ? part.column * t.stride[3] : 0), t.stride[2], state ? t.stride[3] : 1};
    }
};

/// Rows of q, k, v or out: (d or e, t[, g], 1[, 1]).
struct Rows : Buffer {
    Rows(const Tensor &x, const Problem &p, const Part &part, bool of_queries)
        : Buffer(nullptr, halide_type(x.dtype), {{0, (int32_t)x.shape[3], 1}, {0, 0, 0}, {0, 1, 0}, {0, 1, 0}, {0, 1, 0}}),
          stride(x.stride[1]) {
        dimensions = of_queries ? 5 : 4;
        const bool of_values = &x == &p.v || &x == &p.out;
        if (of_queries) axes[2] = axis(p.group(), x.stride[2]);
        if (of_values) axes[0].extent = (int32_t)part.columns;
        first = x.at<uint8_t>(p.entry(part.sequence), p.start(part.sequence), of_queries ? part.head * p.group() : part.head);
        if (first && of_values) first += part.column * type.bytes();
        static float nothing = 0;  // of no queries, as in buffers.h
        if (!first) first = (uint8_t *)&nothing, stride = 0;
    }
    void look_at(int64_t t, int64_t tokens) {
        host = first + t * stride * type.bytes();
        axes[1] = axis(tokens, stride);
    }
    void fetch(int64_t t, int64_t tokens) const { holdfast::fetch(*this, first + t * stride * type.bytes(), tokens); }

private:
    uint8_t *first;
    int64_t stride;
};

const float *log_decay_of(const Problem &p, const Part &part, int64_t t) {
    static const float none = 0;
    const Tensor &g = p.log_decay;
    return g.rank == 3   ? g.at(p.entry(part.sequence), p.start(part.sequence) + t, part.head)
           : g.rank == 1 ? g.at(part.head)
                         : &none;
}

/// A part, chunk by chunk, with the state from the first token on.
void run_chunks(const Problem &p, const Variant &variant, int64_t chunk, const Part &part, Workspace &workspace) {
    Carried carried(p, part, workspace);
    Rows q(p.q, p, part, true), k(p.k, p, part, false), v(p.v, p, part, false), out(p.out.rank ? p.out : p.v, p, part, true);
    const int64_t stride = p.log_decay.rank == 3 ? p.log_decay.stride[1] : 0;
    const int32_t V = (int32_t)part.columns, D = (int32_t)carried.tight;
    Buffer log_decay(nullptr, float32, {{0, 0, 0}, {0, 1, 0}, {0, 1, 0}});
    Buffer state(carried.state, float32, {{0, V, 1}, {0, D, V}, {0, 1, 0}, {0, 1, 0}});
    Buffer sum(carried.sum, float32, {{0, D, 1}, {0, 1, 0}, {0, 1, 0}});
    for (int64_t t = 0; t < part.to; t += chunk) {
        const int64_t tokens = std::min(chunk, part.to - t);
        for (Rows *rows : {&q, &k, &v, &out}) rows->look_at(t, tokens);
        for (Rows *rows : {&q, &out}) rows->axes[2].extent = t < part.from ? 0 : (int32_t)p.group();
        for (const Rows *rows : {&q, &k, &v}) rows->fetch(t + tokens, std::min(chunk, part.to - t - tokens));
        log_decay.host = (uint8_t *)log_decay_of(p, part, t), log_decay.axes[0] = axis(tokens, stride);
        check_returned(std::get<PowerKernel *>(variant.run)(&workspace, &q, &k, &v, &log_decay, &state, &sum, p.degree,
                                                            p.normalized, p.scale, &out, &state, &sum),
                       variant, workspace);
    }
    if (part.to == p.length(part.sequence)) carried.finish();
}

/// Tokens one after the other: of `heads` neighbouring heads of keys where their states are the caller's, else of one.
class Steps {
public:
    /// Strips of columns share a sum of keys: the initial one is where nothing writes.
    Steps(const Problem &p, const Variant &whole, const StepPieces &cut) : p(p), whole(whole), cut(cut) {
        const Tensor &s = p.final_state, &g = p.log_decay;
        in_place = s.rank && s.stride[3] == 1 && p.expansion == HOLDFAST_EXPANSION_TIGHT &&
                   (!p.normalized || p.final_sum.rank) && fits(p.D, s.stride[2]);
        const bool near = fits(p.H, p.q.stride[2]) && fits(p.Hk, p.k.stride[2]) && fits(p.Hk, p.v.stride[2]) &&
                          fits(p.H, p.out.stride[2]) && (!g.rank || fits(p.Hk, g.stride[g.rank - 1])) && in_place &&
                          fits(p.Hk, s.stride[1]) && fits(p.H, p.D * p.V) &&
                          (!p.normalized || fits(p.Hk, p.final_sum.stride[1]));
        at_once = near ? p.Hk : 1;
    }

    void operator()(Workspace &workspace, int64_t n) const {
        const int64_t strip = n % cut.strips, piece = n / cut.strips, all = p.N * p.Hk, end = (piece + 1) * all / cut.of_heads;
        for (int64_t first = piece * all / cut.of_heads, heads; first < end; first += heads) {
            heads = std::min({at_once, p.Hk - first % p.Hk, end - first});
            const int64_t s = first / p.Hk, column = cut.begin(strip);
            run(workspace, {s, first % p.Hk, column, cut.begin(strip + 1) - column, 0, p.length(s)}, heads);
        }
    }

private:
    const Problem &p;
    const Variant &whole;
    const StepPieces &cut;
    bool in_place;
    int64_t at_once;

    void run(Workspace &workspace, const Part &part, int64_t heads) const {
        const Variant &variant = *narrower(whole, part.columns);
        const int64_t s = part.sequence, h = part.head;
        const int32_t V = (int32_t)part.columns, n = (int32_t)heads, G = (int32_t)p.group();
        std::optional<Carried> carried;
        float *state = nullptr, *sum = nullptr;
        int64_t row = V, head = 0, head_of_sum = 0;
        if (in_place) {
            const Tensor &to = p.final_state, &sums = p.final_sum;
            state = to.at(s, h) + part.column, row = to.stride[2], head = to.stride[1];
            if (p.normalized && part.column == 0) sum = sums.at(s, h), head_of_sum = sums.stride[1];
            for (int64_t m = 0; m < heads; m++) start(part, h + m);
        } else {
            carried.emplace(p, part, workspace);
            state = carried->state, sum = carried->sum;
        }
        const int64_t D = in_place ? p.D : carried->tight, block = feature_block(D), blocks = D / block;
        const int64_t of_blocks = G * blocks * V * heads, of_keys = D * heads;
        const Scratch scratch(workspace, of_blocks + of_keys + (sum ? 0 : of_keys));
        float *const keys_before = scratch.floats() + of_blocks;
        if (!sum) {  // another strip's, or it does not count, but has to hold numbers
            sum = keys_before + of_keys, head_of_sum = D;
            std::fill_n(sum, of_keys, 0.0f);
            for (int64_t m = 0; p.initial_sum.rank && m < heads; m++) std::copy_n(p.initial_sum.at(s, h + m), D, sum + m * D);
        }
        auto axis = [&](int64_t stride) { return halide_dimension_t{0, n, n > 1 ? (int32_t)stride : 0}; };
        auto rows = [&](const Tensor &x) {
            return Buffer(nullptr, halide_type(x.dtype), {{0, (int32_t)x.shape[3], 1}, axis(x.stride[2])});
        };
        auto group = [&](const Tensor &x) {
            return Buffer(nullptr, halide_type(x.dtype),
                          {{0, (int32_t)x.shape[3], 1}, {0, G, G > 1 ? (int32_t)x.stride[2] : 0}, axis(x.stride[2] * G)});
        };
        Buffer q = group(p.q), out = group(p.out), k = rows(p.k), v = rows(p.v);
        out.axes[0].extent = v.axes[0].extent = V;
        Buffer log_decay(nullptr, float32, {axis(p.log_decay.rank ? p.log_decay.stride[p.log_decay.rank - 1] : 0)});
        const int32_t U = (int32_t)blocks, W = (int32_t)block;
        Buffer states(state, float32, {{0, V, 1}, {0, W, (int32_t)row}, {0, G, 0}, {0, U, (int32_t)(row * block)}, axis(head)});
        Buffer partial(scratch.floats(), float32, {{0, V, 1}, {0, W, 0}, {0, G, V}, {0, U, G * V}, axis(U * G * V)});
        Buffer keys(sum, float32, {{0, (int32_t)D, 1}, axis(head_of_sum)});
        Buffer before(keys_before, float32, {{0, (int32_t)D, 1}, axis(D)});
        const int64_t b = p.entry(s), from = p.start(s), column_bytes = part.column * p.v.dtype.bytes();
        for (int64_t t = from; t < from + p.length(s); t++) {
            q.host = p.q.at<uint8_t>(b, t, h * G), out.host = p.out.at<uint8_t>(b, t, h * G) + column_bytes;
            k.host = p.k.at<uint8_t>(b, t, h), v.host = p.v.at<uint8_t>(b, t, h) + column_bytes;
            log_decay.host = (uint8_t *)log_decay_of(p, part, t - from);
            check_returned(std::get<PowerStepKernel *>(variant.run)(&workspace, &q, &k, &v, &log_decay, W, U, p.degree,
                                                                    p.normalized, p.scale, &states, &partial, &keys, &before,
                                                                    &out),
                           variant, workspace);
        }
        if (carried) carried->finish();
    }

    /// Put the initial state of a part's columns and, with the first of them, the sum of a head where they will be.
    void start(const Part &part, int64_t h) const {
        const int64_t s = part.sequence;
        auto put = [&](const Tensor &initial, const Tensor &to, int64_t column, int64_t columns) {
            auto features = [&](const Tensor &t) {
                const int64_t across = t.rank == 4 ? t.stride[3] : 1;
                return Features{t.at(s, h) + column * across, t.stride[2], across};
            };
            if (!to.rank) return;
            if (initial.rank && initial.at(s, h) == to.at(s, h)) return;
            if (initial.rank) return convert(features(initial), p.expansion, features(to), p.expansion, p.D, p.K, columns);
            for (int64_t f = 0; f < p.D; f++) std::fill_n(to.at(s, h, f) + column, columns, 0.0f);
        };
        put(p.initial_state, p.final_state, part.column, part.columns);
        if (part.column == 0) put(p.initial_sum, p.final_sum, 0, 1);
    }
};

}  // namespace

const Variant &power_variant(const char *kernel, const Problem &p, const Choice &choice, int64_t value_size) {
    return select_variant(kernel, p.q.dtype.name, p.K, value_size, p.chunk_size, choice.backend, choice.forced, {}, p.degree);
}

bool can_step(const Problem &p) { return fits(p.group(), p.D * p.V); }

int64_t feature_block(int64_t D) {
    constexpr int64_t good = 64;  // loses no digits; the divisor that is nearest
    for (int64_t n = 0; n < D; n++) {
        if (n < good && D % (good - n) == 0) return good - n;
        if (D % (good + n) == 0) return good + n;
    }
    return D;
}

void run_power(holdfast_context &c, const char *call, const Problem &p, const Choice &choice) {
    for (const Tensor *t : {&p.q, &p.out})
        if (p.group() > 1 && !fits(p.group(), t->stride[2]))
            fail(HOLDFAST_UNSUPPORTED, t->name, " has stride ", t->stride[2], " between heads that share keys; expected ",
                 std::numeric_limits<int32_t>::max() / 2 / p.group(), " at most");
    const Variant *variant = &power_variant("power", p, choice, p.V);
    if (p.form == HOLDFAST_FORM_RECURRENT) {
        check_kernel_strides(p, 1);
        if (!can_step(p))
            fail(HOLDFAST_UNSUPPORTED, "H / Hk is ", p.group(), " and D V ", p.D * p.V,
                 ", of a state that so many heads of queries read token by token; expected a product of less than ",
                 std::numeric_limits<int32_t>::max() / 2);
        const Variant &step = power_variant("power_step", p, choice, p.V);
        const StepPieces pieces(p, c, {&step});
        announce(c, call, step, choice.why, p, c.verbose ? pieces.how() : "", pieces.count());
        if (pieces.count() == 0) return;
        with_initial_apart(c, p, false, pieces.strips > 1, [&](const Problem &apart) {
            const Steps steps(apart, step, pieces);
            c.for_each(pieces.count(), std::cref(steps));
        });
        return;
    }
    // Where threads are idle: halves of the values, as long as there is a variant for them, and spans of the tokens.
    int64_t parts = 1;
    const int64_t heads = p.N * p.Hk, threads = threads_of_head(p, c);
    while (variant->value_size && p.V % (2 * parts) == 0 && 2 * parts <= threads) {
        const Variant *half = narrower(*variant, p.V / (2 * parts));
        if (!half) break;
        variant = half, parts *= 2;
    }
    const int64_t chunk = p.chunk_size ? std::min<int64_t>(p.chunk_size, variant->chunk) : variant->chunk;
    check_kernel_strides(p, chunk);
    const Spans spans(p, chunk, threads / parts);
    const int64_t pieces = heads * parts * spans.count;
    std::string how = "chunks of " + std::to_string(chunk);
    if (spans.count > 1) how += ", tokens in " + std::to_string(spans.count) + " spans";
    announce(c, call, *variant, choice.why, p, how, pieces);
    if (heads == 0) return;
    with_initial_apart(c, p, spans.count > 1, parts * spans.count > 1, [&](const Problem &apart) {
        c.for_each(pieces, [&](Workspace &workspace, int64_t n) {
            const int64_t head = n / parts / spans.count, span = n / parts % spans.count, columns = p.V / parts;
            const int64_t s = head / p.Hk, T = p.length(s);
            if (!spans.has_work(T, span)) return;
            const Part part = {s, head % p.Hk, n % parts * columns, columns, spans.begin(T, span), spans.begin(T, span + 1)};
            run_chunks(apart, *variant, chunk, part, workspace);
        });
    });
}

void run_power_states(holdfast_context &c, const char *call, const Problem &p, const Choice &choice) {
    Problem states = p;  // keys in the place of queries, of whose heads there are none
    states.form = HOLDFAST_FORM_CHUNKWISE, states.q = p.k, states.H = 0, states.out = {};
    run_power(c, call, states, choice);
}

}  // namespace holdfast
