// holdfast_forward on a GPU: one call of the kernel for all batch entries, heads and chunks, or as few as 32-bit buffers allow.
#include "forward_gpu.h"

#include "chunk_table.h"
#include "gpu.h"

#include <algorithm>
#include <optional>
#include <string>

namespace holdfast {
namespace {

/// Launch everything.
void issue(const Run &run, const Problem &p, int64_t chunk) {
    Operands x(run, p);
    if (p.T == 0) return x.pass_states();

    // What the call adds: the chunk table, and zeros for what is not given. A head that is too large for one call of the kernel takes
    // several, each with some of its tokens; packed sequences are then calls of their own.
    bool packed = p.packed();  // all sequences in a call
    const int64_t packed_chunks = packed ? chunks_of(p.starts, chunk) : 0;
    auto chunks_in = [&](int64_t tokens) { return packed ? packed_chunks : (tokens + chunk - 1) / chunk; };
    auto part_of = [&](int64_t tokens) {
        const int64_t chunks = chunks_in(tokens), sequences = packed ? p.N : 1;
        return largest_part(p, x, tokens, (chunks + sequences) * p.state_bytes(), sequences);
    };
    int64_t at_once = p.T;
    Part part = part_of(at_once);
    if (!part.batch) {
        packed = false;
        while (!(part = part_of(at_once)).batch && at_once > chunk) at_once = (at_once / 2 + chunk - 1) / chunk * chunk;
        if (part.batch) part = {1, 1};  // more would take more memory than tensors that are nearer
    }
    if (!part.batch)
        fail(HOLDFAST_UNSUPPORTED, "a chunk of one head, or its states of K V = ", p.K * p.V,
             ", reach beyond 2^31 bytes; expected less");
    const int32_t S = packed ? (int32_t)p.N : 1;  // sequences of a batch entry in a call
    constexpr int64_t alignment = Arena::alignment;
    auto aligned = [&](int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; };
    const int64_t zeros_at = aligned((chunks_in(at_once) + S) * ChunkTable::fields * (int64_t)sizeof(int32_t));
    const int64_t added_bytes = zeros_at + aligned(p.V * (int64_t)sizeof(float));
    Memory added(run, added_bytes);
    const Zeros zeros{added, zeros_at};
    // What is not wanted has to go somewhere.
    std::optional<Memory> unwanted_state, unwanted_row;
    if (!p.out.rank) unwanted_row.emplace(run, p.V * (int64_t)sizeof(float));
    if (!p.final_state.rank) unwanted_state.emplace(run, part.batch * S * part.of_each * p.state_bytes());
    if (packed) fill_chunk_table(run, added, added_bytes, p.starts, chunk);
    int64_t tokens_in_table = 0;

    // Tokens t .. t + n - 1 of B batch entries, or of sequence s or all that are packed, and H heads.
    auto launch = [&](int64_t b, int64_t h, int32_t B, int32_t H, int64_t s, int64_t t, int64_t n, bool first) {
        const int32_t K = (int32_t)p.K, V = (int32_t)p.V, tokens = (int32_t)n;
        const int32_t count = (int32_t)chunks_in(n);
        if (!packed && tokens_in_table != n) {
            fill_chunk_table(run, added, added_bytes, n, chunk, count);
            tokens_in_table = n;
        }
        View chunks(added, 0, int32, {{0, ChunkTable::fields, 1}, {0, count + S, ChunkTable::fields}});
        auto rows = [&](const OnDevice &r) { return rows_of(r, b, t, h, tokens, H, B); };
        auto groups = [&](const OnDevice &r) { return groups_of(r, p.group(), b, t, h, tokens, H, B); };
        View q = groups(x.q), k = rows(x.k), v = rows(x.v);
        View out = unwanted_row ? row_for_all(*unwanted_row, p, p.V, tokens, p.group(), H, B) : groups(x.out);
        View log_decay = decays_of(x.log_decay, x.log_decay.t.rank ? nullptr : &zeros, b, t, h, tokens, H, B);
        auto states = [&](const OnDevice &state) {
            return View(*state.memory, state.at(b + s, h), float32,
                        {{0, V, narrow(state.t, 3, V)},
                         {0, K, narrow(state.t, 2, K)},
                         {0, S, narrow(state.t, 0, S)},
                         {0, H, narrow(state.t, 1, H)},
                         {0, B, narrow(state.t, 0, B)}});
        };
        auto state_at_end = [&] {
            if (!unwanted_state) return states(x.final);
            return View(*unwanted_state, 0, float32,
                        {{0, V, 1}, {0, K, V}, {0, S, K * V}, {0, H, S * K * V}, {0, B, H * S * K * V}});
        };
        auto state_at_start = [&] {
            if (!first) return state_at_end();
            if (p.initial_state.rank) return states(x.initial);
            return View(added, zeros_at, float32, {{0, V, 1}, {0, K, 0}, {0, S, 0}, {0, H, 0}, {0, B, 0}});
        };
        View state_in = state_at_start(), state_out = state_at_end();
        run.check(run.variant.name,
                  std::get<ChunkwiseKernel *>(run.variant.run)(&run.workspace, &q, &k, &v, &log_decay, &state_in, &chunks,
                                                               count, p.scale, &out, &state_out));
    };
    for (int64_t b = 0; b < p.B; b += part.batch)
        for (int64_t h = 0; h < p.Hk; h += part.of_each) {
            const int32_t B = (int32_t)std::min(part.batch, p.B - b), H = (int32_t)std::min(part.of_each, p.Hk - h);
            if (packed) {
                launch(b, h, B, H, 0, 0, p.T, true);
                continue;
            }
            for (int64_t s = 0; s < (p.packed() ? p.N : 1); s++) {
                const int64_t start = p.start(s), end = start + p.length(s);
                if (start == end) x.pass_state(s, h, 1, H);
                for (int64_t t = start; t < end; t += at_once) launch(b, h, B, H, s, t, std::min(at_once, end - t), t == start);
            }
        }
    x.fetch();
}

int64_t chunk_of(const Problem &p, const Variant &variant) {
    return p.chunk_size ? std::min<int64_t>(p.chunk_size, variant.chunk) : variant.chunk;
}

GpuCall call_of(const Problem &p, const Variant &variant) {
    return {variant, p.tensors(), [&](const Run &run) { issue(run, p, chunk_of(p, run.variant)); }, p.workspace,
            "holdfast_workspace_size"};
}

}  // namespace

size_t workspace_on_gpu(holdfast_context &c, const Problem &given, const Variant &variant) {
    const Problem p = with_queries(nearest(given));
    return p.B && p.Hk ? call_of(p, variant).workspace(c) : 0;
}

void forward_on_gpu(holdfast_context &c, const Problem &given, const Variant &variant, const char *why) {
    announce(c, "forward", variant, why, given, "chunks of " + std::to_string(chunk_of(given, variant)));
    const Problem p = with_queries(given);
    if (p.B && p.Hk) call_of(p, variant).run(c);
}

}  // namespace holdfast
