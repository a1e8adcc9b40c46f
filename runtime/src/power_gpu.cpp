// The kernels power and power_step on a GPU: a chunk, or a token, of all batch entries and heads, or of as few as 32-bit buffers
// allow, in a call. The state goes from chunk to chunk where the caller wants the last one: kernels of GPUs read all of a state
// before they write any of it. Packed sequences are calls of their own, one after the other.
#include "power_gpu.h"

#include "gpu.h"
#include "power.h"

#include <algorithm>
#include <optional>
#include <string>

namespace holdfast {
namespace {

constexpr int64_t block_of_features = 80;  // of a kernel for any degree, generators/power_generator.cpp: it has sums of each

int64_t chunk_of(const Problem &p, const Variant &variant) {
    return p.chunk_size ? std::min<int64_t>(p.chunk_size, variant.chunk) : variant.chunk;
}

/// Launch everything for sequences of one length.
void issue_chunks(const Run &run, const Problem &p, int64_t chunk) {
    // Without tokens there is one of zeros, which the state goes by.
    const bool nothing = p.T == 0;
    if (nothing && !p.final_state.rank && !p.final_sum.rank) return;
    const int64_t D = p.D, K = p.K, V = p.V, G = p.group(), T = nothing ? 1 : p.T;
    const int64_t zeros_bytes = std::max({K, V, D}) * (int64_t)sizeof(float),
                  blocks = (D + block_of_features - 1) / block_of_features;
    Memory zeros(run, zeros_bytes);
    fill_chunk_table(run, zeros, zeros_bytes / 4 * 4, 0, 1, 0);  // of no chunks: zeros

    Operands x(run, p);
    const OnDevice &g = x.log_decay;
    const int64_t scratch = std::max(D * V, blocks * V * run.variant.chunk * G) * (int64_t)sizeof(float);
    const Part part = largest_part(p, x, scratch);
    if (!part.batch)
        fail(HOLDFAST_UNSUPPORTED, "T = ", p.T, " tokens of one head, its state of D V = ", D * V,
             " and the sums of its chunks need a buffer beyond 2^31 bytes; expected less");
    // What is not wanted has to go somewhere.
    std::optional<Memory> own_state, own_sum, unwanted_row;
    if (!p.final_state.rank) own_state.emplace(run, part.batch * part.of_each * D * V * (int64_t)sizeof(float));
    if (!p.final_sum.rank) own_sum.emplace(run, part.batch * part.of_each * D * (int64_t)sizeof(float));
    if (nothing || !p.out.rank) unwanted_row.emplace(run, V * (int64_t)sizeof(float));

    for (int64_t b = 0; b < p.B; b += part.batch)
        for (int64_t h = 0; h < p.Hk; h += part.of_each) {
            const int32_t B = (int32_t)std::min(part.batch, p.B - b), H = (int32_t)std::min(part.of_each, p.Hk - h);
            // A rehearsal is for memory, and the first chunk needs as much as any.
            for (int64_t t = 0; t < (run.call.rehearsal ? 1 : T); t += chunk) {
                const int32_t tokens = (int32_t)std::min(chunk, T - t);
                auto rows = [&](const OnDevice &r) {
                    const halide_type_t type = halide_type(r.t.dtype);
                    const int32_t size = (int32_t)r.t.shape[3];
                    if (nothing) return View(zeros, 0, type, {{0, size, 1}, {0, 1, 0}, {0, H, 0}, {0, B, 0}});
                    return View(*r.memory, r.at(b, t, h), type,
                                {{0, size, 1},
                                 {0, tokens, narrow(r.t, 1, tokens)},
                                 {0, H, narrow(r.t, 2, H)},
                                 {0, B, narrow(r.t, 0, B)}});
                };
                auto groups = [&](const OnDevice &r, const Memory *instead) {
                    const halide_type_t type = halide_type(p.q.dtype);
                    const int32_t size = (int32_t)(&r == &x.out ? V : K);
                    if (nothing || !r.t.rank)
                        return View(*instead, 0, type,
                                    {{0, size, 1}, {0, tokens, 0}, {0, (int32_t)G, 0}, {0, H, 0}, {0, B, 0}});
                    const int32_t head = narrow(r.t, 2, H * G);
                    return View(*r.memory, r.at(b, t, h * G), type,
                                {{0, size, 1},
                                 {0, tokens, narrow(r.t, 1, tokens)},
                                 {0, (int32_t)G, head},
                                 {0, H, H > 1 ? head * (int32_t)G : 0},
                                 {0, B, narrow(r.t, 0, B)}});
                };
                View q = groups(x.q, &zeros), out = groups(x.out, unwanted_row ? &*unwanted_row : nullptr);
                View k = rows(x.k), v = rows(x.v);
                const bool decays = g.t.rank && !nothing, per_token = g.t.rank == 3;
                View log_decay(decays ? *g.memory : zeros,
                               !decays     ? 0
                               : per_token ? g.at(b, t, h)
                                           : g.at(h),
                               float32,
                               {{0, tokens, decays && per_token ? narrow(g.t, 1, tokens) : 0},
                                {0, H, decays ? narrow(g.t, g.t.rank - 1, H) : 0},
                                {0, B, decays && per_token ? narrow(g.t, 0, B) : 0}});
                auto states = [&](const OnDevice &s) {
                    return View(*s.memory, s.at(b, h), float32,
                                {{0, (int32_t)V, 1},
                                 {0, (int32_t)D, narrow(s.t, 2, D)},
                                 {0, H, narrow(s.t, 1, H)},
                                 {0, B, narrow(s.t, 0, B)}});
                };
                auto sums = [&](const OnDevice &s) {
                    return View(*s.memory, s.at(b, h), float32,
                                {{0, (int32_t)D, 1}, {0, H, narrow(s.t, 1, H)}, {0, B, narrow(s.t, 0, B)}});
                };
                auto state_at_end = [&] {
                    if (!own_state) return states(x.final);
                    const int32_t size = (int32_t)(D * V);
                    return View(*own_state, 0, float32,
                                {{0, (int32_t)V, 1}, {0, (int32_t)D, (int32_t)V}, {0, H, size}, {0, B, H * size}});
                };
                auto sum_at_end = [&] {
                    if (!own_sum) return sums(x.final_sum);
                    return View(*own_sum, 0, float32, {{0, (int32_t)D, 1}, {0, H, (int32_t)D}, {0, B, H * (int32_t)D}});
                };
                auto state_at_start = [&] {
                    if (t > 0) return state_at_end();
                    if (p.initial_state.rank) return states(x.initial);
                    return View(zeros, 0, float32, {{0, (int32_t)V, 1}, {0, (int32_t)D, 0}, {0, H, 0}, {0, B, 0}});
                };
                auto sum_at_start = [&] {
                    if (t > 0) return sum_at_end();
                    if (p.initial_sum.rank) return sums(x.initial_sum);
                    return View(zeros, 0, float32, {{0, (int32_t)D, 1}, {0, H, 0}, {0, B, 0}});
                };
                View state_in = state_at_start(), state_out = state_at_end();
                View sum_in = sum_at_start(), sum_out = sum_at_end();
                run.check(run.variant.name, std::get<PowerKernel *>(run.variant.run)(&run.workspace, &q, &k, &v, &log_decay,
                                                                                     &state_in, &sum_in, p.degree, p.normalized,
                                                                                     p.scale, &out, &state_out, &sum_out));
            }
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

/// Launch a step.
void issue_step(const Run &run, Problem p) {
    if (Tensor &g = p.log_decay; g.rank == 1 && g.on_host()) {  // copied, for each batch entry
        g.shape[2] = g.shape[0], g.stride[2] = g.stride[0];
        g.shape[0] = p.B, g.shape[1] = 1, g.stride[0] = g.stride[1] = 0, g.rank = 3;
    }
    Operands x(run, p);
    const OnDevice &g = x.log_decay;
    Problem there = p;  // as it lies on the device
    there.q = x.q.t, there.k = x.k.t, there.v = x.v.t, there.out = x.out.t, there.log_decay = g.t;
    there.final_state = x.final.t, there.final_sum = x.final_sum.t;
    const int64_t D = p.D, V = p.V, G = p.group(), block = feature_block(D), blocks = D / block;
    // Beside the tensors: a row of sums for each block of features; a sum of keys where it does not count; a decay where none is given.
    const int64_t bytes_of_sums = blocks * V * (int64_t)sizeof(float), bytes_of_keys = D * (int64_t)sizeof(float);
    Part part = largest_part(p, x, std::max(bytes_of_sums, bytes_of_keys));
    if (!part.batch)
        fail(HOLDFAST_UNSUPPORTED, "the state of one head, with a stride of ", x.final.t.stride[2],
             " along D, reaches beyond 2^31 bytes; expected less");
    if (part.of_each < p.Hk || !heads_in_a_row(there)) part.batch = 1;
    const int64_t most = part.batch * part.of_each;
    Memory sums(run, most * bytes_of_sums);
    std::optional<Memory> keys_not_wanted, no_decay;
    if (!p.normalized) keys_not_wanted.emplace(run, most * bytes_of_keys);
    if (!g.t.rank) {
        no_decay.emplace(run, Arena::alignment);
        fill_chunk_table(run, *no_decay, Arena::alignment, 0, 1, 0);
    }

    for (int64_t b = 0; b < p.B; b += part.batch)
        for (int64_t h = 0; h < p.Hk; h += part.of_each) {
            const int32_t H = (int32_t)(std::min(part.batch, p.B - b) * std::min(part.of_each, p.Hk - h));
            auto rows = [&](const OnDevice &r) {
                return View(*r.memory, r.at(b, 0, h), halide_type(r.t.dtype),
                            {{0, (int32_t)r.t.shape[3], 1}, {0, H, narrow(r.t, 2, H)}});
            };
            auto groups = [&](const OnDevice &r) {
                const int32_t head = narrow(r.t, 2, H * G);
                return View(*r.memory, r.at(b, 0, h * G), halide_type(r.t.dtype),
                            {{0, (int32_t)r.t.shape[3], 1}, {0, (int32_t)G, head}, {0, H, H > 1 ? head * (int32_t)G : 0}});
            };
            View q = groups(x.q), k = rows(x.k), v = rows(x.v), out = groups(x.out);
            View log_decay(g.t.rank ? *g.memory : *no_decay,
                           g.t.rank == 3 ? g.at(b, 0, h)
                           : g.t.rank    ? g.at(h)
                                         : 0,
                           float32, {{0, H, g.t.rank ? narrow(g.t, g.t.rank - 1, H) : 0}});
            const Tensor &s = x.final.t;
            const int32_t row = narrow(s, 2, D);
            View state(*x.final.memory, x.final.at(b, h), float32,
                       {{0, (int32_t)V, 1},
                        {0, (int32_t)block, row},
                        {0, (int32_t)blocks, row * (int32_t)block},
                        {0, H, narrow(s, 1, H)}});
            View partial(
                sums, 0, float32,
                {{0, (int32_t)V, 1}, {0, (int32_t)block, 0}, {0, (int32_t)blocks, (int32_t)V}, {0, H, (int32_t)(blocks * V)}});
            View keys(p.normalized ? *x.final_sum.memory : *keys_not_wanted, p.normalized ? x.final_sum.at(b, h) : 0, float32,
                      {{0, (int32_t)D, 1}, {0, H, p.normalized ? narrow(x.final_sum.t, 1, H) : (int32_t)D}});
            run.check(run.variant.name, std::get<PowerStepKernel *>(run.variant.run)(
                                            &run.workspace, &q, &k, &v, &log_decay, (int32_t)block, (int32_t)blocks, p.degree,
                                            p.normalized, p.scale, &state, &partial, &keys, &out));
        }
    x.fetch();
}

void check_expansion(const Problem &p, const Choice &choice) {
    if (p.expansion == HOLDFAST_EXPANSION_TILED)
        fail(HOLDFAST_UNSUPPORTED, "expansion is HOLDFAST_EXPANSION_TILED and the backend ", name_of(choice.backend),
             "; expected HOLDFAST_EXPANSION_TIGHT, or the CPU");
}

const Variant &checked_variant(const Problem &p, const Choice &choice) {
    check_expansion(p, choice);
    if (p.form == HOLDFAST_FORM_RECURRENT)
        fail(HOLDFAST_UNSUPPORTED, "form is HOLDFAST_FORM_RECURRENT and the backend ", name_of(choice.backend),
             "; expected another form, or the CPU");
    return power_variant("power", p, choice, p.V);
}

const Variant &checked_step_variant(const Problem &p, const Choice &choice) {
    check_expansion(p, choice);
    return power_variant("power_step", p, choice, p.V);
}

GpuCall call_of(const Problem &p, const Variant &variant) {
    return {variant, p.tensors(), [&](const Run &run) { issue_power(run, p); }, p.workspace, "holdfast_workspace_size"};
}

GpuCall step_call_of(const Problem &p, const Variant &variant) {
    return {variant, p.tensors(), [&](const Run &run) { issue_step(run, p); }, p.workspace, "holdfast_step_workspace_size"};
}

}  // namespace

void issue_power(const Run &run, const Problem &p) {
    const int64_t chunk = chunk_of(p, run.variant);
    if (!p.packed()) return issue_chunks(run, p, chunk);
    for (int64_t s = 0; s < p.N; s++) issue_chunks(run, sequence_of(p, s), chunk);
}

void power_on_gpu(holdfast_context &c, const Problem &p, const Choice &choice) {
    const Variant &variant = checked_variant(p, choice);
    announce(c, "forward", variant, choice.why, p, "chunks of " + std::to_string(chunk_of(p, variant)));
    if (p.B && p.Hk) call_of(p, variant).run(c);
}

size_t power_workspace_on_gpu(holdfast_context &c, const Problem &given, const Choice &choice) {
    const Problem p = nearest(given);
    return p.B && p.Hk ? call_of(p, checked_variant(p, choice)).workspace(c) : 0;
}

void power_step_on_gpu(holdfast_context &c, const Problem &p, const Choice &choice) {
    const Variant &variant = checked_step_variant(p, choice);
    announce(c, "step", variant, choice.why, p, "token by token");
    if (p.B && p.Hk) step_call_of(p, variant).run(c);
}

size_t power_step_workspace_on_gpu(holdfast_context &c, const Problem &given, const Choice &choice) {
    const Problem p = nearest(given);
    return p.B && p.Hk ? step_call_of(p, checked_step_variant(p, choice)).workspace(c) : 0;
}

}  // namespace holdfast
