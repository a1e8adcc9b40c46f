// The kernels power and power_step on a GPU: a chunk, or a token, of all batch entries and heads, or of as few as 32-bit buffers
// allow, in a call. The state goes from call to call where the caller wants the last one: kernels of GPUs read all of a state
// before they write any of it. Packed sequences are calls of their own, one after the other. States in the tiled order are converted to
// the kernels' and back, each once.
#include "power_gpu.h"

#include "expansion.h"
#include "gpu.h"
#include "power.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <utility>

namespace holdfast {
namespace {

int64_t chunk_of(const Problem &p, const Variant &variant) {
    return p.chunk_size ? std::min<int64_t>(p.chunk_size, variant.chunk) : variant.chunk;
}

/// The states and sums of keys of a part of the heads while its tokens go by, in the kernels' order of features: where the caller
/// wants the last ones, if that is his order too, else in memory of the call's own.
class Carried {
public:
    /// D features, of the kernels' order, of so many heads at once.
    Carried(const Run &run, const Problem &p, const Operands &x, int64_t D, const Part &part) : run(run), p(p), x(x) {
        if (converted() || !p.final_state.rank)
            own_state.emplace(run, floats_of("state", {part.batch, part.of_each, D, p.V}), false);
        if (converted() || !p.final_sum.rank)
            own_sum.emplace(run, floats_of("sum of keys", {part.batch, part.of_each, D}), false);
    }
    bool converted() const { return p.expansion != HOLDFAST_EXPANSION_TIGHT; }

    /// Of heads h .. of batch entries b .., `heads` and `entries` of them, from now on.
    void move_to(int64_t b, int64_t h, int32_t heads, int32_t entries) { from_b = b, from_h = h, H = heads, B = entries; }

    /// The initial ones become these.
    void begin() const {
        begin(x.initial, states());
        if (p.normalized) begin(x.initial_sum, sums());
    }
    /// These become the final ones.
    void finish() const {
        if (!converted()) return;
        for (auto [from, to] : {std::pair{&own_state, &x.final}, {&own_sum, &x.final_sum}})
            if (to->t.rank)
                convert(run, features_of(**from, 0, 0, H, B), HOLDFAST_EXPANSION_TIGHT, features_of(*to, from_b, from_h, H, B),
                        p.expansion);
    }

    const OnDevice &states() const { return own_state ? *own_state : x.final; }
    const OnDevice &sums() const { return own_sum ? *own_sum : x.final_sum; }
    /// The heads among those of states() and sums(), from these on.
    int64_t b_of(const OnDevice &these) const { return mine(these) ? 0 : from_b; }
    int64_t h_of(const OnDevice &these) const { return mine(these) ? 0 : from_h; }

private:
    const Run &run;
    const Problem &p;
    const Operands &x;
    std::optional<OnDevice> own_state, own_sum;
    int64_t from_b = 0, from_h = 0;
    int32_t H = 0, B = 0;

    bool mine(const OnDevice &these) const { return &these != &x.final && &these != &x.final_sum; }
    void begin(const OnDevice &initial, const OnDevice &these) const {
        if (&these == &initial) return;
        View to = features_of(these, b_of(these), h_of(these), H, B);
        if (!initial.t.rank) return clear(run, std::move(to));
        convert(run, features_of(initial, from_b, from_h, H, B), p.expansion, std::move(to), HOLDFAST_EXPANSION_TIGHT);
    }
};

/// D in the kernels' order.
int64_t tight_size(const Problem &p) {
    return expanded_size(p.K, p.degree, HOLDFAST_EXPANSION_TIGHT, std::numeric_limits<int32_t>::max());
}

/// Launch everything for sequences of one length, in chunks.
void issue_chunks(const Run &run, const Problem &p) {
    Operands x(run, p);
    if (p.T == 0) return x.pass_states();
    const int64_t chunk = chunk_of(p, run.variant), D = tight_size(p), V = p.V, G = p.group(), T = p.T;
    const int64_t zeros_bytes = std::max(V, D) * (int64_t)sizeof(float),
                  blocks = (D + block_of_features - 1) / block_of_features;
    Memory memory_of_zeros(run, zeros_bytes);
    fill_chunk_table(run, memory_of_zeros, zeros_bytes, 0, 1, 0);  // of no chunks: zeros
    const Zeros zeros{memory_of_zeros};

    const int64_t scratch = std::max(D * V, blocks * V * run.variant.chunk * G) * (int64_t)sizeof(float);
    const Part part = largest_part(p, x, chunk, scratch);
    if (!part.batch)
        fail(HOLDFAST_UNSUPPORTED, "a chunk of one head, its state of D V = ", D * V,
             " or its sums need a buffer beyond 2^31 bytes; expected less");
    Carried carried(run, p, x, D, part);
    std::optional<Memory> unwanted_row;  // of out
    if (!p.out.rank) unwanted_row.emplace(run, V * (int64_t)sizeof(float));

    for (int64_t b = 0; b < p.B; b += part.batch)
        for (int64_t h = 0; h < p.Hk; h += part.of_each) {
            const int32_t B = (int32_t)std::min(part.batch, p.B - b), H = (int32_t)std::min(part.of_each, p.Hk - h);
            carried.move_to(b, h, H, B);
            if (carried.converted() && p.initial_state.rank) carried.begin();
            // A rehearsal is for memory, and the first chunk needs as much as any.
            for (int64_t t = 0; t < (run.call.rehearsal ? 1 : T); t += chunk) {
                const int32_t tokens = (int32_t)std::min(chunk, T - t);
                auto rows = [&](const OnDevice &r) { return rows_of(r, b, t, h, tokens, H, B); };
                auto groups = [&](const OnDevice &r) { return groups_of(r, G, b, t, h, tokens, H, B); };
                View q = groups(x.q), k = rows(x.k), v = rows(x.v);
                View out = unwanted_row ? row_for_all(*unwanted_row, p, V, tokens, G, H, B) : groups(x.out);
                View log_decay = decays_of(x.log_decay, x.log_decay.t.rank ? nullptr : &zeros, b, t, h, tokens, H, B);
                // The first chunk reads what the caller gives where it lies.
                const bool first = t == 0 && !carried.converted();
                auto states = [&](const OnDevice &s, int64_t from_b, int64_t from_h) {
                    return features_of(s, from_b, from_h, H, B);
                };
                auto sums = [&](const OnDevice &s, int64_t from_b, int64_t from_h) {
                    return View(*s.memory, s.at(from_b, from_h), float32,
                                {{0, (int32_t)D, 1}, {0, H, narrow(s.t, 1, H)}, {0, B, narrow(s.t, 0, B)}});
                };
                auto state_at_end = [&] {
                    const OnDevice &s = carried.states();
                    return states(s, carried.b_of(s), carried.h_of(s));
                };
                auto sum_at_end = [&] {
                    const OnDevice &s = carried.sums();
                    return sums(s, carried.b_of(s), carried.h_of(s));
                };
                auto state_at_start = [&] {
                    if (t == 0 && !p.initial_state.rank)
                        return View(zeros.memory, 0, float32, {{0, (int32_t)V, 1}, {0, (int32_t)D, 0}, {0, H, 0}, {0, B, 0}});
                    if (first) return states(x.initial, b, h);
                    return state_at_end();
                };
                auto sum_at_start = [&] {
                    if (t == 0 && !p.initial_sum.rank)
                        return View(zeros.memory, 0, float32, {{0, (int32_t)D, 1}, {0, H, 0}, {0, B, 0}});
                    if (first) return sums(x.initial_sum, b, h);
                    return sum_at_end();
                };
                View state_in = state_at_start(), state_out = state_at_end();
                View sum_in = sum_at_start(), sum_out = sum_at_end();
                run.check(run.variant.name, std::get<PowerKernel *>(run.variant.run)(&run.workspace, &q, &k, &v, &log_decay,
                                                                                     &state_in, &sum_in, p.degree, p.normalized,
                                                                                     p.scale, &out, &state_out, &sum_out));
            }
            carried.finish();
        }
    x.fetch();
}

/// Whether the heads of all batch entries lie one after the other, as if they were of one.
bool heads_in_a_row(const Problem &p) {
    auto in_a_row = [&](const Tensor &t, int head, int64_t heads) { return !t.rank || t.stride[0] == heads * t.stride[head]; };
    return in_a_row(p.q, 2, p.H) && in_a_row(p.out, 2, p.H) && in_a_row(p.k, 2, p.Hk) && in_a_row(p.v, 2, p.Hk) &&
           p.log_decay.rank != 1 && in_a_row(p.log_decay, 2, p.Hk) && in_a_row(p.final_state, 1, p.Hk) &&
           in_a_row(p.final_sum, 1, p.Hk);
}

/// Launch everything for sequences of one length, token by token.
void issue_tokens(const Run &run, Problem p) {
    const bool of_each_token = p.log_decay.rank == 3;
    if (Tensor &g = p.log_decay; g.rank == 1 && g.on_host()) {  // copied, for each batch entry
        g.shape[2] = g.shape[0], g.stride[2] = g.stride[0];
        g.shape[0] = p.B, g.shape[1] = 1, g.stride[0] = g.stride[1] = 0, g.rank = 3;
    }
    Operands x(run, p);
    if (p.T == 0) return x.pass_states();
    const OnDevice &g = x.log_decay;
    const int64_t D = tight_size(p), V = p.V, G = p.group(), block = feature_block(D), blocks = D / block;
    // Beside the tensors: a row of sums for each block of features and query; what a sum of keys was; a decay where none is given; what
    // is carried.
    const int64_t bytes_of_sums = G * blocks * V * (int64_t)sizeof(float), bytes_of_keys = D * (int64_t)sizeof(float);
    const int64_t bytes_of_state =
        std::max({V * bytes_of_keys, G * D * V, bytes_of_sums});  // a kernel's buffer counts its elements for each query
    Part part = largest_part(p, x, 1, bytes_of_state);
    if (!part.batch)
        fail(HOLDFAST_UNSUPPORTED, "the state of one head, with a stride of ", x.final.t.stride[2],
             " along D, reaches beyond 2^31 bytes; expected less");
    const bool converted = p.expansion != HOLDFAST_EXPANSION_TIGHT;
    Problem there = p;  // as it lies on the device
    there.q = x.q.t, there.k = x.k.t, there.v = x.v.t, there.out = x.out.t, there.log_decay = g.t;
    there.final_state = converted ? Tensor{} : x.final.t, there.final_sum = converted ? Tensor{} : x.final_sum.t;
    if (part.of_each < p.Hk || !heads_in_a_row(there)) part.batch = 1;
    if (part.batch * part.of_each > most_blocks) part.batch = std::max<int64_t>(most_blocks / part.of_each, 1);
    const int64_t most = part.batch * part.of_each;
    Memory sums(run, most * bytes_of_sums), keys_before(run, most * bytes_of_keys);
    Carried carried(run, p, x, D, part);
    std::optional<Memory> no_decay, unwanted_row;
    if (!p.out.rank) unwanted_row.emplace(run, V * (int64_t)sizeof(float));
    if (!g.t.rank) {
        no_decay.emplace(run, Arena::alignment);
        fill_chunk_table(run, *no_decay, Arena::alignment, 0, 1, 0);
    }

    for (int64_t b = 0; b < p.B; b += part.batch)
        for (int64_t h = 0; h < p.Hk; h += part.of_each) {
            const int32_t entries = (int32_t)std::min(part.batch, p.B - b), of_each = (int32_t)std::min(part.of_each, p.Hk - h);
            const int32_t H = entries * of_each;
            carried.move_to(b, h, of_each, entries);
            carried.begin();
            // A rehearsal is for memory, and the first token needs as much as any.
            for (int64_t t = 0; t < (run.call.rehearsal ? 1 : p.T); t++) {
                auto rows = [&](const OnDevice &r) {
                    return View(*r.memory, r.at(b, t, h), halide_type(r.t.dtype),
                                {{0, (int32_t)r.t.shape[3], 1}, {0, H, narrow(r.t, 2, H)}});
                };
                auto groups = [&](const OnDevice &r) {
                    const int32_t head = narrow(r.t, 2, H * G);
                    return View(*r.memory, r.at(b, t, h * G), halide_type(r.t.dtype),
                                {{0, (int32_t)r.t.shape[3], 1}, {0, (int32_t)G, head}, {0, H, H > 1 ? head * (int32_t)G : 0}});
                };
                View q = groups(x.q), k = rows(x.k), v = rows(x.v);
                View out = unwanted_row ? row_for_all(*unwanted_row, p, V, G, H) : groups(x.out);
                View log_decay(g.t.rank ? *g.memory : *no_decay,
                               g.t.rank == 3 ? g.at(b, of_each_token ? t : 0, h)
                               : g.t.rank    ? g.at(h)
                                             : 0,
                               float32, {{0, H, g.t.rank ? narrow(g.t, g.t.rank - 1, H) : 0}});
                const OnDevice &s = carried.states(), &z = carried.sums();
                const int32_t row = narrow(s.t, 2, D);
                View state(*s.memory, s.at(carried.b_of(s), carried.h_of(s)), float32,
                           {{0, (int32_t)V, narrow(s.t, 3, V)},
                            {0, (int32_t)block, row},
                            {0, (int32_t)G, 0},
                            {0, (int32_t)blocks, row * (int32_t)block},
                            {0, H, narrow(s.t, 1, H)}});
                View partial(sums, 0, float32,
                             {{0, (int32_t)V, 1},
                              {0, (int32_t)block, 0},
                              {0, (int32_t)G, (int32_t)V},
                              {0, (int32_t)blocks, (int32_t)(G * V)},
                              {0, H, (int32_t)(blocks * G * V)}});
                View keys(*z.memory, z.at(carried.b_of(z), carried.h_of(z)), float32,
                          {{0, (int32_t)D, 1}, {0, H, narrow(z.t, 1, H)}});
                View before(keys_before, 0, float32, {{0, (int32_t)D, 1}, {0, H, (int32_t)D}});
                run.check(run.variant.name, std::get<PowerStepKernel *>(run.variant.run)(
                                                &run.workspace, &q, &k, &v, &log_decay, (int32_t)block, (int32_t)blocks,
                                                p.degree, p.normalized, p.scale, &state, &partial, &keys, &before, &out));
            }
            carried.finish();
        }
    x.fetch();
}

bool by_token(const Problem &p) { return p.form == HOLDFAST_FORM_RECURRENT; }

const Variant &variant_of(const Problem &p, const Choice &choice) {
    return power_variant(by_token(p) ? "power_step" : "power", p, choice, p.V);
}

GpuCall call_of(const Problem &p, const Variant &variant, const char *size_function = "") {
    return {variant, p.tensors(), [&](const Run &run) { issue_power(run, p); }, p.workspace, size_function};
}

}  // namespace

void issue_power(const Run &run, const Problem &p) {
    auto issue = [&](const Problem &sequence) { by_token(p) ? issue_tokens(run, sequence) : issue_chunks(run, sequence); };
    if (!p.packed()) return issue(p);
    for (int64_t s = 0; s < p.N; s++) issue(sequence_of(p, s));
}

void power_on_gpu(holdfast_context &c, const char *call, const Problem &given, const Choice &choice) {
    const Problem p = with_queries(given);
    const Variant &variant = variant_of(p, choice);
    announce(c, call, variant, choice.why, given,
             by_token(p) ? "token by token" : "chunks of " + std::to_string(chunk_of(p, variant)));
    if (p.B && p.Hk) call_of(p, variant, size_function_of(call)).run(c);
}

size_t power_workspace_on_gpu(holdfast_context &c, const Problem &given, const Choice &choice) {
    const Problem p = with_queries(nearest(given));
    return p.B && p.Hk ? call_of(p, variant_of(p, choice)).workspace(c) : 0;
}

}  // namespace holdfast
