// The gradient of degree 1 on a GPU: one call of the kernel for all batch entries, heads and chunks, or as few as 32-bit buffers
// allow. The states between all chunks, and their gradients, are memory of the call: nothing is computed twice. A head that is too
// large for one call takes several, each with some of its tokens, from the last to the first; the states that they begin with come
// first, from the kernel chunkwise.
#include "backward_gpu.h"

#include "chunk_table.h"
#include "gpu.h"

#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace holdfast {
namespace {

struct Kernels {
    const Variant &gradient;
    std::function<const Variant &()> forward;  // chosen where it is needed
};

int64_t chunk_of(const BackwardProblem &p, const Variant &variant) {
    return p.chunk_size ? std::min<int64_t>(p.chunk_size, variant.chunk) : variant.chunk;
}

/// Launch everything. A head that takes several calls has memory for the states that `most_calls` begin with, at least.
void issue(const Run &run, const Kernels &kernels, const BackwardProblem &p, int64_t most_calls) {
    BackwardOperands x(run, p);
    DecaysPerHead decays(run, p);
    // Without tokens: the gradient of the initial states is that of the final ones, and decays have none.
    auto pass_gradient = [&](int64_t s, int64_t h, int32_t H) {
        if (!p.dinitial_state.rank) return;
        View to = features_of(x.dinitial, s, h, H, 1);
        if (!p.dfinal_state.rank)
            clear(run, std::move(to));
        else if (p.dfinal_state.on_host() || !same_elements(p.dinitial_state, p.dfinal_state))
            convert(run, features_of(x.dfinal, s, h, H, 1), p.expansion, std::move(to), p.expansion);
    };
    if (p.T == 0 || p.N == 0) {
        for (int64_t s = 0; s < p.N; s++)
            for (int64_t h = 0; h < p.Hk; h += most_blocks) pass_gradient(s, h, (int32_t)std::min(most_blocks, p.Hk - h));
        x.fetch(run, p);
        return decays.finish();
    }
    const int64_t G = p.group();
    constexpr int64_t float_bytes = sizeof(float);
    int64_t chunk = chunk_of(p, kernels.gradient);
    bool packed = p.packed();  // all sequences in a call
    const int64_t packed_chunks = packed ? chunks_of(p.starts, chunk) : 0;
    auto chunks_in = [&](int64_t tokens) { return packed ? packed_chunks : (tokens + chunk - 1) / chunk; };
    // The largest buffers that the kernel has, of a chunk: its state, scores, rows.
    const int64_t rows_of_chunk = std::max({chunk, p.K, p.V}) * chunk * std::max<int64_t>(G, 1);
    const int64_t of_chunk = std::max(p.K * p.V, rows_of_chunk) * float_bytes;
    auto part_of = [&](int64_t tokens) {
        const int64_t chunks = chunks_in(tokens), sequences = packed ? p.N : 1;
        return largest_part(p, x, tokens, (chunks + sequences) * of_chunk, sequences);
    };
    int64_t at_once = p.T;
    Part part = part_of(at_once);
    const bool cut = !part.batch;
    const Variant *forward = nullptr;
    if (cut) {
        packed = false;
        forward = &kernels.forward();
        chunk = std::min<int64_t>(chunk, forward->chunk);
        while (!(part = part_of(at_once)).batch && at_once > chunk) at_once = (at_once / 2 + chunk - 1) / chunk * chunk;
        if (part.batch) part = {1, 1};  // more would take more memory than tensors that are nearer
    }
    if (!part.batch)
        fail(HOLDFAST_UNSUPPORTED, "a chunk of one head, or its states of K V = ", p.K * p.V,
             ", reach beyond 2^31 bytes; expected less");

    // What the call adds: the chunk table, and zeros for what is not given.
    const int32_t S = packed ? (int32_t)p.N : 1;  // sequences of a batch entry in a call
    constexpr int64_t alignment = Arena::alignment;
    auto aligned = [&](int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; };
    const int64_t zeros_at = aligned((chunks_in(at_once) + S) * ChunkTable::fields * (int64_t)sizeof(int32_t));
    const int64_t added_bytes = zeros_at + aligned(std::max(p.K, p.V) * float_bytes);
    Memory added(run, added_bytes);
    const Zeros zeros{added, zeros_at};
    if (packed) fill_chunk_table(run, added, added_bytes, p.starts, chunk);
    int64_t tokens_in_table = 0;
    // What is not wanted is not written, but has to be somewhere. A gradient of states goes from call to call.
    Memory unwanted_row(run, std::max(p.K, p.V) * float_bytes);
    std::optional<Memory> own_gradient;
    if (!p.dinitial_state.rank && cut && p.needs_dstates())
        own_gradient.emplace(run, part.batch * S * part.of_each * p.state_bytes());
    // States that calls begin with, but for the first of a sequence; where a gradient asks for them.
    std::vector<OnDevice> kept;
    const int64_t calls = std::max((p.longest() + at_once - 1) / at_once, most_calls);
    for (int64_t n = 1; cut && n < calls && (p.dq.rank || p.dlog_decay.rank); n++)
        kept.emplace_back(run, floats_of("state", {1, 1, p.K, p.V}), false);

    for (int64_t b = 0; b < p.B; b += part.batch)
        for (int64_t h = 0; h < p.Hk; h += part.of_each) {
            const int32_t B = (int32_t)std::min(part.batch, p.B - b), H = (int32_t)std::min(part.of_each, p.Hk - h);
            const int32_t K = (int32_t)p.K, V = (int32_t)p.V;
            auto states = [&](const OnDevice &state, int64_t b, int64_t h) {
                return View(*state.memory, state.at(b, h), float32,
                            {{0, V, narrow(state.t, 3, V)},
                             {0, K, narrow(state.t, 2, K)},
                             {0, S, narrow(state.t, 0, S)},
                             {0, H, narrow(state.t, 1, H)},
                             {0, B, narrow(state.t, 0, B)}});
            };
            auto own_states = [&] {
                return View(*own_gradient, 0, float32,
                            {{0, V, 1}, {0, K, V}, {0, S, K * V}, {0, H, S * K * V}, {0, B, H * S * K * V}});
            };
            auto unwanted_states = [&] {
                return View(unwanted_row, 0, float32, {{0, V, 1}, {0, K, 0}, {0, S, 0}, {0, H, 0}, {0, B, 0}});
            };
            auto no_states = [&] {
                return View(added, zeros_at, float32, {{0, V, 1}, {0, K, 0}, {0, S, 0}, {0, H, 0}, {0, B, 0}});
            };
            // Tokens t .. t + n - 1 of sequence s, or of all.
            auto table = [&](int64_t n) {
                const int32_t count = (int32_t)chunks_in(n);
                if (!packed && std::exchange(tokens_in_table, n) != n)
                    fill_chunk_table(run, added, added_bytes, n, chunk, count);
                return count;
            };
            auto columns = [&](int32_t count) {
                return View(added, 0, int32, {{0, ChunkTable::fields, 1}, {0, count + S, ChunkTable::fields}});
            };
            auto decays_from = [&](int64_t t, int32_t tokens) {
                return decays_of(x.log_decay, x.log_decay.t.rank ? nullptr : &zeros, b, t, h, tokens, H, B);
            };
            // The state that call n of the sequence begins with.
            auto state_before = [&](int64_t s, int64_t n) {
                if (n) return kept.empty() ? no_states() : states(kept[n - 1], 0, 0);
                return x.initial.t.rank ? states(x.initial, b + s, h) : no_states();
            };
            auto advance = [&](int64_t s, int64_t n, int64_t t) {
                const int32_t tokens = (int32_t)at_once, count = table(at_once);
                View q = row_for_all(unwanted_row, p, K, tokens, 0, H, B), k = rows_of(x.k, b, t, h, tokens, H, B),
                     v = rows_of(x.v, b, t, h, tokens, H, B);
                View out = row_for_all(unwanted_row, p, V, tokens, 0, H, B);
                View log_decay = decays_from(t, tokens), chunks = columns(count);
                View state_in = state_before(s, n), state_out = states(kept[n], 0, 0);
                run.check(forward->name,
                          std::get<ChunkwiseKernel *>(forward->run)(&run.workspace, &q, &k, &v, &log_decay, &state_in, &chunks,
                                                                    count, p.scale, &out, &state_out));
            };
            auto retreat = [&](int64_t s, int64_t n, int64_t t, int64_t length, bool last) {
                const int32_t tokens = (int32_t)length, count = table(length);
                auto groups = [&](const OnDevice &r, int32_t size) {
                    if (r.t.rank && G) return groups_of(r, G, b, t, h, tokens, H, B);
                    const bool read = &r == &x.q || &r == &x.dout;
                    return View(read ? added : unwanted_row, read ? zeros_at : 0, halide_type(p.q.dtype),
                                {{0, size, 1}, {0, tokens, 0}, {0, (int32_t)G, 0}, {0, H, 0}, {0, B, 0}});
                };
                auto rows = [&](const OnDevice &r, int32_t size) {
                    if (r.t.rank) return rows_of(r, b, t, h, tokens, H, B);
                    return View(unwanted_row, 0, halide_type(p.q.dtype), {{0, size, 1}, {0, tokens, 0}, {0, H, 0}, {0, B, 0}});
                };
                // From call to call the gradient of the state stays where the last one is wanted.
                auto gradient = [&] {
                    if (x.dinitial.t.rank) return states(x.dinitial, b + s, h);
                    return own_gradient ? own_states() : unwanted_states();
                };
                auto gradient_after = [&] {
                    if (!last) return gradient();
                    return x.dfinal.t.rank ? states(x.dfinal, b + s, h) : no_states();
                };
                View q = groups(x.q, K), k = rows(x.k, K), v = rows(x.v, V), dout = groups(x.dout, V);
                View log_decay = decays_from(t, tokens), chunks = columns(count);
                View state_in = state_before(s, n), dstate_out = gradient_after();
                View dq = groups(x.dq, K), dk = rows(x.dk, K), dv = rows(x.dv, V);
                View dlog_decay = decays.part(x.dlog_decay, unwanted_row, b, 0, t, h, tokens, H, B), dstate_in = gradient();
                run.check(run.variant.name,
                          std::get<ChunkwiseBackwardKernel *>(run.variant.run)(
                              &run.workspace, &q, &k, &v, &log_decay, &state_in, &dout, &dstate_out, &chunks, count, p.scale,
                              p.dq.rank > 0 && G, p.dk.rank > 0, p.dv.rank > 0, p.dlog_decay.rank > 0, p.needs_dstate(n), &dq,
                              &dk, &dv, &dlog_decay, &dstate_in));
            };
            if (!cut) {
                retreat(0, 0, 0, p.T, true);
                continue;
            }
            for (int64_t s = 0; s < (p.packed() ? p.N : 1); s++) {
                const int64_t start = p.start(s), length = p.length(s), calls = (length + at_once - 1) / at_once;
                if (!calls) pass_gradient(b + s, h, H);
                for (int64_t n = 0; n + 1 < calls && !kept.empty(); n++) advance(s, n, start + n * at_once);
                for (int64_t n = calls; n-- > 0;)
                    retreat(s, n, start + n * at_once, std::min(at_once, length - n * at_once), n + 1 == calls);
            }
        }
    decays.finish();
    x.fetch(run, p);
}

const Variant &variant_of(const BackwardProblem &p, const Choice &choice) {
    return select_variant("chunkwise_backward", p.q.dtype.name, p.K, p.V, p.chunk_size, choice.backend, choice.forced);
}

GpuCall call_of(const BackwardProblem &p, const Kernels &kernels, int64_t most_calls = 0) {
    return gradient_call(kernels.gradient, p, [&, most_calls](const Run &run) { issue(run, kernels, p, most_calls); });
}

}  // namespace

void backward_on_gpu(holdfast_context &c, const BackwardProblem &p, const Choice &choice) {
    const Variant &variant = variant_of(p, choice);
    auto forward = [&]() -> const Variant & {
        Problem keys = p;  // in the place of queries, which are not looked at
        keys.q = p.k, keys.out = {};
        return select_variant("chunkwise", p.q.dtype.name, p.K, p.V, p.chunk_size, choice.backend, variant.target,
                              keys.row_alignment(choice.backend));
    };
    announce(c, "backward", variant, choice.why, p, "chunks of " + std::to_string(chunk_of(p, variant)));
    const Kernels kernels{variant, forward};
    if (!writes_nothing(p)) call_of(p, kernels).run(c);
}

size_t backward_workspace_on_gpu(holdfast_context &c, const BackwardProblem &given, const Choice &choice) {
    const BackwardProblem p = nearest(given);
    if (writes_nothing(p)) return 0;
    const Variant &variant = variant_of(p, choice);
    // Where tokens lie farther apart a head takes more calls: as many as 2^40 bytes can be cut into.
    const int64_t chunk = chunk_of(p, variant), most_calls = std::min<int64_t>((p.longest() + chunk - 1) / chunk, 1 << 10);
    size_t bytes = 0;
    for (const Variant *forward :
         selectable_variants("chunkwise", p.q.dtype.name, p.K, p.V, p.chunk_size, choice.backend, variant.target)) {
        const Kernels kernels{variant, [&]() -> const Variant & { return *forward; }};
        bytes = std::max(bytes, call_of(p, kernels, most_calls).workspace(c));
    }
    return bytes;
}

}  // namespace holdfast
