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
    Workspace &workspace = run.workspace;

    // What the call adds: the chunk table, and zeros for what is not given. Without tokens there is one of zeros, so that the
    // state goes from one place to the other.
    const bool nothing = p.T == 0;
    const int64_t T = nothing ? 1 : p.T, sequences = p.packed() ? p.N : 1;  // of a batch entry
    std::optional<ChunkTable> packed;
    if (p.packed()) packed.emplace(p.starts, chunk);
    const int64_t count = packed ? packed->count : (T + chunk - 1) / chunk, slots = count + sequences;
    constexpr int64_t alignment = Arena::alignment;
    auto aligned = [&](int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; };
    const int64_t zeros = aligned(slots * ChunkTable::fields * (int64_t)sizeof(int32_t));
    const int64_t width = std::max(p.K, p.V), added_bytes = zeros + aligned(width * (int64_t)sizeof(float));
    Memory added(run, added_bytes);
    if (packed) {
        packed->columns.resize(added_bytes / sizeof(int32_t));
        added.copy_in(packed->columns.data(), added_bytes);
    } else {
        fill_chunk_table(run, added, added_bytes, T, chunk, count);
    }
    View chunks(added, 0, int32, {{0, ChunkTable::fields, 1}, {0, (int32_t)slots, ChunkTable::fields}});

    Operands x(run, p);
    const OnDevice &g = x.log_decay;
    const Part part = largest_part(p, x, slots * p.state_bytes());
    if (!part.batch)
        fail(HOLDFAST_UNSUPPORTED, "T = ", p.T, " tokens of one head, with ", slots, " states of K V = ", p.K * p.V,
             ", need a buffer beyond 2^31 bytes; expected less: cut the sequence and carry the state");
    // A final state that is not wanted, and the row of out that is not there, have to go somewhere.
    std::optional<Memory> unwanted_state, unwanted_row;
    if (!p.final_state.rank) unwanted_state.emplace(run, part.batch * sequences * part.of_each * p.state_bytes());
    if (nothing) unwanted_row.emplace(run, p.V * (int64_t)sizeof(float));

    for (int64_t b = 0; b < p.B; b += part.batch)
        for (int64_t h = 0; h < p.Hk; h += part.of_each) {
            const int32_t B = (int32_t)std::min(part.batch, p.B - b), H = (int32_t)std::min(part.of_each, p.Hk - h);
            const int32_t K = (int32_t)p.K, V = (int32_t)p.V, tokens = (int32_t)T, G = (int32_t)p.group();
            const int32_t S = (int32_t)sequences;
            auto rows = [&](const OnDevice &r, Memory *instead, int64_t instead_at) {
                const int32_t size = (int32_t)r.t.shape[3];
                const halide_type_t type = halide_type(r.t.dtype);
                if (nothing) return View(*instead, instead_at, type, {{0, size, 1}, {0, 1, 0}, {0, H, 0}, {0, B, 0}});
                return View(
                    *r.memory, r.at(b, 0, h), type,
                    {{0, size, 1}, {0, tokens, narrow(r.t, 1, T)}, {0, H, narrow(r.t, 2, H)}, {0, B, narrow(r.t, 0, B)}});
            };
            auto groups = [&](const OnDevice &r, Memory *instead, int64_t instead_at) {
                const int32_t size = (int32_t)r.t.shape[3];
                const halide_type_t type = halide_type(r.t.dtype);
                if (nothing)
                    return View(*instead, instead_at, type, {{0, size, 1}, {0, 1, 0}, {0, G, 0}, {0, H, 0}, {0, B, 0}});
                return View(*r.memory, r.at(b, 0, h * G), type,
                            {{0, size, 1},
                             {0, tokens, narrow(r.t, 1, T)},
                             {0, G, narrow(r.t, 2, G)},
                             {0, H, narrow(r.t, 2, H) * G},
                             {0, B, narrow(r.t, 0, B)}});
            };
            View q_rows = groups(x.q, &added, zeros), k_rows = rows(x.k, &added, zeros), v_rows = rows(x.v, &added, zeros);
            View out_rows = groups(x.out, unwanted_row ? &*unwanted_row : nullptr, 0);
            const bool per_token = g.t.rank == 3, decays = g.t.rank && !nothing;
            View log_decay(decays ? *g.memory : added,
                           !decays     ? zeros
                           : per_token ? g.at(b, 0, h)
                                       : g.at(h),
                           float32,
                           {{0, tokens, decays && per_token ? narrow(g.t, 1, T) : 0},
                            {0, H, decays ? narrow(g.t, g.t.rank - 1, H) : 0},
                            {0, B, decays && per_token ? narrow(g.t, 0, B) : 0}});
            auto states = [&](const OnDevice &s) {
                return View(*s.memory, s.at(b, h), float32,
                            {{0, V, 1},
                             {0, K, narrow(s.t, 2, K)},
                             {0, S, narrow(s.t, 0, S)},
                             {0, H, narrow(s.t, 1, H)},
                             {0, B, narrow(s.t, 0, B)}});
            };
            View state_in = p.initial_state.rank
                                ? states(x.initial)
                                : View(added, zeros, float32, {{0, V, 1}, {0, K, 0}, {0, S, 0}, {0, H, 0}, {0, B, 0}});
            View state_out = p.final_state.rank
                                 ? states(x.final)
                                 : View(*unwanted_state, 0, float32,
                                        {{0, V, 1}, {0, K, V}, {0, S, K * V}, {0, H, S * K * V}, {0, B, H * S * K * V}});
            run.check(run.variant.name,
                      std::get<ChunkwiseKernel *>(run.variant.run)(&workspace, &q_rows, &k_rows, &v_rows, &log_decay, &state_in,
                                                                   &chunks, (int32_t)count, p.scale, &out_rows, &state_out));
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

/// Packed sequences that are all empty are as many batch entries without tokens.
Problem entries_of_empty(Problem p) {
    if (p.packed() && p.T == 0) p.B = p.N, p.starts.clear();
    return p;
}

}  // namespace

size_t workspace_on_gpu(holdfast_context &c, const Problem &given, const Variant &variant) {
    const Problem p = nearest(entries_of_empty(given));
    return p.B && p.Hk ? call_of(p, variant).workspace(c) : 0;
}

void forward_on_gpu(holdfast_context &c, const Problem &given, const Variant &variant, const char *why) {
    const Problem p = entries_of_empty(given);
    announce(c, "forward", variant, why, p, "chunks of " + std::to_string(chunk_of(p, variant)));
    if (p.B && p.Hk) call_of(p, variant).run(c);
}

}  // namespace holdfast
