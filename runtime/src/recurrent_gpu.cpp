// The recurrent form on a GPU, of a step or of many tokens one after the other: one call of the recurrent kernel for some tokens of
// all batch entries and heads, or as few as 32-bit buffers allow, on the states where they lie. Packed sequences take turns.
#include "recurrent_gpu.h"

#include "gpu.h"

#include <algorithm>
#include <optional>

namespace holdfast {
namespace {

// Of a call: so many take as long as dozens of launches. The sums of theirs may take so much memory.
constexpr int64_t most_tokens = 64, most_bytes_of_sums = 1 << 26;

/// Launch everything for sequences of one length.
void issue(const Run &run, const Problem &p) {
    Operands x(run, p);
    if (p.T == 0) return x.pass_states();
    const OnDevice &g = x.log_decay;
    // Beside the tensors: a row of sums for each head and token, a decay where none is given, and states where they are not wanted.
    const int64_t sum_bytes = p.V * (int64_t)sizeof(float);
    auto part_of = [&](int64_t tokens) {
        return largest_part(p, x, tokens, std::max(tokens * sum_bytes, p.final_state.rank ? 0 : p.state_bytes()));
    };
    const Part part = part_of(1);
    if (!part.batch)
        fail(HOLDFAST_UNSUPPORTED, "the state of one head, with a stride of ", x.final.t.stride[2],
             " along K, reaches beyond 2^31 bytes; expected less");
    // Queries that share a state read what a token leaves of it. Strides may make it one token, not more: memory does not grow with
    // them. Halide counts the elements of a state once for each token.
    const int64_t of_all = p.B * p.Hk;
    int64_t at_once = std::min({p.T, most_tokens, std::max<int64_t>(most_bytes_of_sums / (of_all * sum_bytes), 1),
                                std::max<int64_t>(most_bytes / (of_all * p.K * p.V), 1)});
    if (const Part fewer = part_of(at_once); p.group() > 1 || fewer.batch < part.batch || fewer.of_each < part.of_each)
        at_once = 1;
    Memory sums(run, part.batch * part.of_each * at_once * sum_bytes);
    std::optional<OnDevice> own;
    if (!p.final_state.rank) own.emplace(run, floats_of("state", {part.batch, part.of_each, p.K, p.V}), false);
    std::optional<Memory> no_decay, unwanted_row;
    if (!p.out.rank) unwanted_row.emplace(run, sum_bytes);
    if (!g.t.rank) {
        no_decay.emplace(run, Arena::alignment);
        fill_chunk_table(run, *no_decay, Arena::alignment, 0, 1, 0);  // of no chunks: zeros
    }

    for (int64_t b = 0; b < p.B; b += part.batch)
        for (int64_t h = 0; h < p.Hk; h += part.of_each) {
            const int32_t B = (int32_t)std::min(part.batch, p.B - b), H = (int32_t)std::min(part.of_each, p.Hk - h);
            const int32_t K = (int32_t)p.K, V = (int32_t)p.V, G = (int32_t)p.group();
            const halide_dimension_t one = {0, 1, 0};  // token in each block
            const OnDevice &state = own ? *own : x.final;
            const int64_t entry = own ? 0 : b, head = own ? 0 : h;  // of the first state
            if (!p.initial_state.rank)
                clear(run, features_of(state, entry, head, H, B));
            else if (&state != &x.initial)
                convert(run, features_of(x.initial, b, h, H, B), p.expansion, features_of(state, entry, head, H, B),
                        p.expansion);
            // A rehearsal is for memory, and the first tokens need as much as any.
            for (int64_t t = 0; t < (run.call.rehearsal ? 1 : p.T); t += at_once) {
                const int32_t N = (int32_t)std::min(at_once, p.T - t);
                auto rows = [&](const OnDevice &r) {
                    return View(*r.memory, r.at(b, t, h), halide_type(r.t.dtype),
                                {{0, (int32_t)r.t.shape[3], 1},
                                 one,
                                 {0, N, narrow(r.t, 1, N)},
                                 {0, H, narrow(r.t, 2, H)},
                                 {0, B, narrow(r.t, 0, B)}});
                };
                auto groups = [&](const OnDevice &r) {
                    return View(*r.memory, r.at(b, t, h * G), halide_type(r.t.dtype),
                                {{0, (int32_t)r.t.shape[3], 1},
                                 one,
                                 {0, N, narrow(r.t, 1, N)},
                                 {0, G, narrow(r.t, 2, G)},
                                 {0, H, narrow(r.t, 2, H) * G},
                                 {0, B, narrow(r.t, 0, B)}});
                };
                View q = groups(x.q), k = rows(x.k), v = rows(x.v);
                View out = unwanted_row ? row_for_all(*unwanted_row, p, V, 1, N, G, H, B) : groups(x.out);
                const bool of_token = g.t.rank == 3;
                View log_decay(g.t.rank ? *g.memory : *no_decay,
                               of_token   ? g.at(b, t, h)
                               : g.t.rank ? g.at(h)
                                          : 0,
                               float32,
                               {one,
                                {0, N, of_token ? narrow(g.t, 1, N) : 0},
                                {0, H, g.t.rank ? narrow(g.t, g.t.rank - 1, H) : 0},
                                {0, B, of_token ? narrow(g.t, 0, B) : 0}});
                View states(*state.memory, state.at(entry, head), float32,
                            {{0, V, narrow(state.t, 3, V)},
                             one,
                             {0, K, narrow(state.t, 2, K)},
                             {0, N, 0},
                             {0, H, narrow(state.t, 1, H)},
                             {0, B, narrow(state.t, 0, B)}});
                View sum(sums, 0, float32,
                         {{0, V, 1}, {0, 1, V}, {0, K, 0}, {0, N, V}, {0, H, N * V}, {0, B, H * N * V}});  // recurrent.h
                run.check(run.variant.name, std::get<RecurrentKernel *>(run.variant.run)(&run.workspace, &q, &k, &v, &log_decay,
                                                                                         p.scale, &states, &sum, &out));
            }
        }
    x.fetch();
}

GpuCall call_of(const Problem &p, const Variant &variant, const char *size_function = "") {
    return {variant, p.tensors(),
            [&](const Run &run) {
                if (!p.packed()) return issue(run, p);
                for (int64_t s = 0; s < p.N; s++) issue(run, sequence_of(p, s));
            },
            p.workspace, size_function};
}

}  // namespace

size_t recurrent_workspace_on_gpu(holdfast_context &c, const Problem &given, const Variant &variant) {
    const Problem p = with_queries(nearest(given));
    return p.B && p.Hk ? call_of(p, variant).workspace(c) : 0;
}

void recurrent_on_gpu(holdfast_context &c, const char *call, const Problem &given, const Variant &variant, const char *why) {
    announce(c, call, variant, why, given, "token by token");
    const Problem p = with_queries(given);
    if (p.B && p.Hk) call_of(p, variant, size_function_of(call)).run(c);
}

}  // namespace holdfast
