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
void issue(const Run &run, int64_t chunk) {
    const Problem &p = run.p;
    Workspace &workspace = run.workspace;

    // What the call adds: the chunk table, and zeros for what is not given. Without tokens there is one of zeros, so that the
    // state goes from one place to the other.
    const bool nothing = p.T == 0;
    const int64_t T = nothing ? 1 : p.T, count = (T + chunk - 1) / chunk, slots = count + 1;
    constexpr int64_t alignment = Arena::alignment;
    auto aligned = [&](int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; };
    const int64_t zeros = aligned(slots * ChunkTable::fields * (int64_t)sizeof(int32_t));
    const int64_t width = std::max(p.K, p.V), added_bytes = zeros + aligned(width * (int64_t)sizeof(float));
    Memory added(run, added_bytes);
    fill_chunk_table(run, added, added_bytes, T, chunk, count);
    View chunks(added, 0, int32, {{0, ChunkTable::fields, 1}, {0, (int32_t)slots, ChunkTable::fields}});

    Operands x(run);
    const OnDevice &g = x.log_decay;
    const Part part = largest_part(p, x, slots * p.state_bytes());
    if (!part.batch)
        fail(HOLDFAST_UNSUPPORTED, "T = ", p.T, " tokens of one head, with ", slots, " states of K V = ", p.K * p.V,
             ", need a buffer beyond 2^31 bytes; expected less: cut the sequence and carry the state");
    // A final state that is not wanted, and the row of out that is not there, have to go somewhere.
    std::optional<Memory> unwanted_state, unwanted_row;
    if (!p.final_state.rank) unwanted_state.emplace(run, part.batch * part.heads * p.state_bytes());
    if (nothing) unwanted_row.emplace(run, p.V * (int64_t)sizeof(float));

    for (int64_t b = 0; b < p.B; b += part.batch)
        for (int64_t h = 0; h < p.H; h += part.heads) {
            const int32_t B = (int32_t)std::min(part.batch, p.B - b), H = (int32_t)std::min(part.heads, p.H - h);
            const int32_t K = (int32_t)p.K, V = (int32_t)p.V, tokens = (int32_t)T;
            auto rows = [&](const OnDevice &r, Memory *instead, int64_t instead_at) {
                const int32_t size = (int32_t)r.t.shape[3];
                const halide_type_t type = halide_type(r.t.dtype);
                if (nothing) return View(*instead, instead_at, type, {{0, size, 1}, {0, 1, 0}, {0, H, 0}, {0, B, 0}});
                return View(
                    *r.memory, r.at(b, 0, h), type,
                    {{0, size, 1}, {0, tokens, narrow(r.t, 1, T)}, {0, H, narrow(r.t, 2, H)}, {0, B, narrow(r.t, 0, B)}});
            };
            View q_rows = rows(x.q, &added, zeros), k_rows = rows(x.k, &added, zeros), v_rows = rows(x.v, &added, zeros);
            View out_rows = rows(x.out, unwanted_row ? &*unwanted_row : nullptr, 0);
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
                return View(
                    *s.memory, s.at(b, h), float32,
                    {{0, V, 1}, {0, K, narrow(s.t, 2, K)}, {0, 1, 0}, {0, H, narrow(s.t, 1, H)}, {0, B, narrow(s.t, 0, B)}});
            };
            View state_in = p.initial_state.rank
                                ? states(x.initial)
                                : View(added, zeros, float32, {{0, V, 1}, {0, K, 0}, {0, 1, 0}, {0, H, 0}, {0, B, 0}});
            View state_out = p.final_state.rank ? states(x.final)
                                                : View(*unwanted_state, 0, float32,
                                                       {{0, V, 1}, {0, K, V}, {0, 1, 0}, {0, H, K * V}, {0, B, H * K * V}});
            run.check(run.variant.name,
                      std::get<ChunkwiseKernel *>(run.variant.run)(&workspace, &q_rows, &k_rows, &v_rows, &log_decay, &state_in,
                                                                   &chunks, (int32_t)count, p.scale, &out_rows, &state_out));
        }
    x.fetch(run);
}

GpuCall call_of(const Problem &p, const Variant &variant) {
    const int64_t chunk = p.chunk_size ? std::min<int64_t>(p.chunk_size, variant.chunk) : variant.chunk;
    return {"forward", "chunks of " + std::to_string(chunk), "holdfast_workspace_size",
            [chunk](const Run &run) { issue(run, chunk); }};
}

}  // namespace

size_t workspace_on_gpu(holdfast_context &c, const Problem &p, const Variant &variant) {
    return call_of(p, variant).workspace(c, p, variant);
}

void forward_on_gpu(holdfast_context &c, const Problem &p, const Variant &variant, const char *why) {
    call_of(p, variant).run(c, p, variant, why);
}

}  // namespace holdfast
