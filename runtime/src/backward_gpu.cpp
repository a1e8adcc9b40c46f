// The gradient of degree 1 on a GPU: one call of the kernel for all batch entries, heads and chunks, or as few as 32-bit buffers
// allow. The states between all chunks, and their gradients, are memory of the call: nothing is computed twice.
#include "backward_gpu.h"

#include "chunk_table.h"
#include "gpu.h"

#include <algorithm>
#include <optional>
#include <string>

namespace holdfast {
namespace {

/// Without tokens: the gradient of the initial states is that of the final ones, and decays have none.
void pass_gradients(const Run &run, const BackwardProblem &p, BackwardOperands &x) {
    const int32_t H = (int32_t)p.Hk;
    for (int64_t s = 0; s < p.N && p.dinitial_state.rank; s++) {
        if (!p.dfinal_state.rank)
            clear(run, features_of(x.dinitial, s, 0, H, 1));
        else if (p.dfinal_state.on_host() || !same_elements(p.dinitial_state, p.dfinal_state))
            convert(run, features_of(x.dfinal, s, 0, H, 1), p.expansion, features_of(x.dinitial, s, 0, H, 1), p.expansion);
    }
    x.fetch(run, p);
}

/// Launch everything.
void issue(const Run &run, const BackwardProblem &p, int64_t chunk) {
    BackwardOperands x(run, p);
    DecaysPerHead decays(run, p);
    if (p.T == 0 || p.N == 0) {
        pass_gradients(run, p, x);
        return decays.finish();
    }
    const int64_t G = std::max<int64_t>(p.group(), 1);  // where there are none, one of zeros, which kernels need
    constexpr int64_t float_bytes = sizeof(float);
    std::optional<ChunkTable> packed;
    if (p.packed()) packed.emplace(p.starts, chunk);
    const int32_t count = packed ? packed->count : (int32_t)((p.T + chunk - 1) / chunk);
    const int32_t S = packed ? (int32_t)p.N : 1;  // sequences of a batch entry
    // The largest buffers that the kernel has, of a chunk: its state, scores, rows.
    const int64_t of_chunk = std::max({p.K * p.V, chunk * chunk * G, chunk * std::max(p.K, p.V) * G}) * float_bytes;
    const Part part = largest_part(p, x, p.T, (count + S) * of_chunk);
    if (!part.batch)
        fail(HOLDFAST_UNSUPPORTED, "T = ", p.T, " tokens of one head, or its states of K V = ", p.K * p.V, " after each ",
             chunk, " of them, reach beyond 2^31 bytes; expected less");

    // What the call adds: the chunk table, and zeros for what is not given.
    constexpr int64_t alignment = Arena::alignment;
    auto aligned = [&](int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; };
    const int64_t zeros_at = aligned((count + S) * ChunkTable::fields * (int64_t)sizeof(int32_t));
    const int64_t added_bytes = zeros_at + aligned(std::max(p.K, p.V) * float_bytes);
    Memory added(run, added_bytes);
    const Zeros zeros{added, zeros_at};
    if (packed) {
        packed->columns.resize(added_bytes / sizeof(int32_t));
        added.copy_in(packed->columns.data(), added_bytes);
    } else {
        fill_chunk_table(run, added, added_bytes, p.T, chunk, count);
    }
    // Rows that are not wanted are not written, but have to be somewhere; a gradient of states is written.
    Memory unwanted_row(run, std::max(p.K, p.V) * float_bytes);
    std::optional<Memory> unwanted_state;
    if (!p.dinitial_state.rank) unwanted_state.emplace(run, part.batch * S * part.of_each * p.state_bytes());

    for (int64_t b = 0; b < p.B; b += part.batch)
        for (int64_t h = 0; h < p.Hk; h += part.of_each) {
            const int32_t B = (int32_t)std::min(part.batch, p.B - b), H = (int32_t)std::min(part.of_each, p.Hk - h);
            const int32_t K = (int32_t)p.K, V = (int32_t)p.V, T = (int32_t)p.T;
            auto groups = [&](const OnDevice &r, int32_t size) {
                if (r.t.rank && p.group()) return groups_of(r, G, b, 0, h, T, H, B);
                const bool read = &r == &x.q || &r == &x.dout;
                return View(read ? added : unwanted_row, read ? zeros_at : 0, halide_type(p.q.dtype),
                            {{0, size, 1}, {0, T, 0}, {0, (int32_t)G, 0}, {0, H, 0}, {0, B, 0}});
            };
            auto rows = [&](const OnDevice &r, int32_t size) {
                if (r.t.rank) return rows_of(r, b, 0, h, T, H, B);
                return View(unwanted_row, 0, halide_type(p.q.dtype), {{0, size, 1}, {0, T, 0}, {0, H, 0}, {0, B, 0}});
            };
            auto states = [&](const OnDevice &state) {
                if (!state.t.rank)
                    return View(added, zeros_at, float32, {{0, V, 1}, {0, K, 0}, {0, S, 0}, {0, H, 0}, {0, B, 0}});
                return View(*state.memory, state.at(b, h), float32,
                            {{0, V, narrow(state.t, 3, V)},
                             {0, K, narrow(state.t, 2, K)},
                             {0, S, narrow(state.t, 0, S)},
                             {0, H, narrow(state.t, 1, H)},
                             {0, B, narrow(state.t, 0, B)}});
            };
            auto gradient_of_states = [&] {
                if (!unwanted_state) return states(x.dinitial);
                return View(*unwanted_state, 0, float32,
                            {{0, V, 1}, {0, K, V}, {0, S, K * V}, {0, H, S * K * V}, {0, B, H * S * K * V}});
            };
            View q = groups(x.q, K), k = rows(x.k, K), v = rows(x.v, V), dout = groups(x.dout, V);
            View log_decay = decays_of(x.log_decay, x.log_decay.t.rank ? nullptr : &zeros, b, 0, h, T, H, B);
            View state_in = states(x.initial), dstate_out = states(x.dfinal);
            View chunks(added, 0, int32, {{0, ChunkTable::fields, 1}, {0, count + S, ChunkTable::fields}});
            View dq = groups(x.dq, K), dk = rows(x.dk, K), dv = rows(x.dv, V);
            View dlog_decay = decays.part(x.dlog_decay, unwanted_row, b, 0, 0, h, T, H, B), dstate_in = gradient_of_states();
            run.check(run.variant.name, std::get<ChunkwiseBackwardKernel *>(run.variant.run)(
                                            &run.workspace, &q, &k, &v, &log_decay, &state_in, &dout, &dstate_out, &chunks,
                                            count, p.scale, p.dq.rank > 0 && p.group(), p.dk.rank > 0, p.dv.rank > 0,
                                            p.dlog_decay.rank > 0, &dq, &dk, &dv, &dlog_decay, &dstate_in));
        }
    decays.finish();
    x.fetch(run, p);
}

const Variant &variant_of(const BackwardProblem &p, const Choice &choice) {
    return select_variant("chunkwise_backward", p.q.dtype.name, p.K, p.V, p.chunk_size, choice.backend, choice.forced);
}

int64_t chunk_of(const BackwardProblem &p, const Variant &variant) {
    return p.chunk_size ? std::min<int64_t>(p.chunk_size, variant.chunk) : variant.chunk;
}

GpuCall call_of(const BackwardProblem &p, const Variant &variant) {
    return {variant, p.all_tensors(), [&](const Run &run) { issue(run, p, chunk_of(p, run.variant)); }, p.workspace,
            "holdfast_backward_workspace_size"};
}

}  // namespace

void backward_on_gpu(holdfast_context &c, const BackwardProblem &p, const Choice &choice) {
    const Variant &variant = variant_of(p, choice);
    announce(c, "backward", variant, choice.why, p, "chunks of " + std::to_string(chunk_of(p, variant)));
    if (!writes_nothing(p)) call_of(p, variant).run(c);
}

size_t backward_workspace_on_gpu(holdfast_context &c, const BackwardProblem &given, const Choice &choice) {
    const BackwardProblem p = nearest(given);
    return writes_nothing(p) ? 0 : call_of(p, variant_of(p, choice)).workspace(c);
}

}  // namespace holdfast
