// The parallel form on a GPU: one call of the kernel for all batch entries and heads, or as few as 32-bit buffers allow. Packed
// sequences are calls of their own, one after the other. An initial state in the tiled order is converted to the kernel's. The
// final state of degrees above 1 is made by a kernel of power retention.
#include "parallel_gpu.h"

#include "expansion.h"
#include "failure.h"
#include "gpu.h"
#include "parallel.h"
#include "power.h"
#include "power_gpu.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

namespace holdfast {
namespace {

/// Launch everything for sequences of one length. `start` is the first column of their weights.
void issue(const Run &run, const Problem &p, int64_t start) {
    Operands x(run, p);
    if (p.T == 0) return x.pass_states();
    const bool state = p.degree == 1 && p.final_state.rank, sum = p.degree == 1 && p.final_sum.rank;
    const int64_t K = p.K, V = p.V, G = p.group(), T = p.T;
    constexpr auto order = HOLDFAST_EXPANSION_TIGHT;  // of the kernel
    const int32_t given = p.initial_state.rank ? 1 : 0;
    const auto features = (int32_t)(given ? expanded_size(K, p.degree, order, std::numeric_limits<int32_t>::max()) : K);
    constexpr int64_t bytes = sizeof(float);
    const int64_t zeros_bytes = std::max(V, (int64_t)features) * bytes;
    Memory memory_of_zeros(run, zeros_bytes);
    fill_chunk_table(run, memory_of_zeros, zeros_bytes, 0, 1, 0);  // of no chunks: zeros
    const Zeros zeros{memory_of_zeros};
    std::optional<Memory> unwanted_row;  // of out
    if (!p.out.rank) unwanted_row.emplace(run, V * bytes);

    // The largest buffers that the kernel has: decays of a block of rows after each before it, numbers of a row, the state.
    const int64_t C = run.variant.chunk, blocks = (T + C - 1) / C;
    const Part part = largest_part(p, x, T, std::max({blocks * (blocks + 1), blocks * C * G, (features + C) * V}) * bytes);
    if (!part.batch)
        fail(HOLDFAST_UNSUPPORTED, "T = ", p.T, " tokens of one head", p.weights.rank ? ", and their weights," : "",
             " need a buffer beyond 2^31 bytes; expected less");
    std::optional<OnDevice> own_state, own_sum;  // initial ones in the kernel's order, where that is not the caller's
    if (given && p.expansion != order) {
        own_state.emplace(run, floats_of("initial state", {part.batch, part.of_each, features, V}), false);
        if (p.initial_sum.rank) own_sum.emplace(run, floats_of("sum of keys", {part.batch, part.of_each, features}), false);
    }

    for (int64_t b = 0; b < p.B; b += part.batch)
        for (int64_t h = 0; h < p.Hk; h += part.of_each) {
            const int32_t B = (int32_t)std::min(part.batch, p.B - b), H = (int32_t)std::min(part.of_each, p.Hk - h);
            const int32_t tokens = (int32_t)T, group = (int32_t)G;
            auto rows = [&](const OnDevice &r) { return rows_of(r, b, 0, h, tokens, H, B); };
            auto groups = [&](const OnDevice &r) { return groups_of(r, G, b, 0, h, tokens, H, B); };
            View q = groups(x.q), k = rows(x.k), v = rows(x.v);
            View out = unwanted_row ? row_for_all(*unwanted_row, p, V, tokens, G, H, B) : groups(x.out);
            View log_decay = decays_of(x.log_decay, x.log_decay.t.rank ? nullptr : &zeros, b, 0, h, tokens, H, B);
            // What is absent has no elements, but is in memory that is there: Halide's runtime allocates none for it.
            auto states = [&](const OnDevice &s, int64_t at, bool there, int32_t rows) {
                if (!there)
                    return View(zeros.memory, 0, float32, {{0, (int32_t)V, 1}, {0, rows, 0}, {0, 0, 0}, {0, H, 0}, {0, B, 0}});
                return View(*s.memory, at, float32,
                            {{0, (int32_t)V, narrow(s.t, 3, V)},
                             {0, rows, narrow(s.t, 2, rows)},
                             {0, 1, 0},
                             {0, H, narrow(s.t, 1, H)},
                             {0, B, narrow(s.t, 0, B)}});
            };
            auto sums = [&](const OnDevice &s, int64_t at, bool there, int32_t number, int32_t size) {
                if (!there) return View(zeros.memory, 0, float32, {{0, size, 1}, {0, number, 0}, {0, H, 0}, {0, B, 0}});
                return View(*s.memory, at, float32,
                            {{0, size, 1}, {0, 1, 0}, {0, H, narrow(s.t, 1, H)}, {0, B, narrow(s.t, 0, B)}});
            };
            auto weights_of = [&](const OnDevice &w) {
                const halide_type_t type = halide_type(p.q.dtype);
                if (!w.t.rank)
                    return View(zeros.memory, 0, type,
                                {{0, tokens, 1}, {0, 0, 0}, {0, tokens, 0}, {0, group, 0}, {0, H, 0}, {0, B, 0}});
                const int32_t head = narrow(w.t, 1, H * G);
                return View(*w.memory, w.at(b, h * G), type,
                            {{-(int32_t)start, (int32_t)w.t.shape[3], 1},
                             {0, 1, 0},
                             {0, tokens, narrow(w.t, 2, T)},
                             {0, group, head},
                             {0, H, H > 1 ? head * group : 0},
                             {0, B, narrow(w.t, 0, B)}});
            };
            for (auto [from, to] : {std::pair{&x.initial, &own_state}, {&x.initial_sum, &own_sum}})
                if (*to) convert(run, features_of(*from, b, h, H, B), p.expansion, features_of(**to, 0, 0, H, B), order);
            View state_in =
                own_state ? states(*own_state, 0, given, features) : states(x.initial, x.initial.at(b, h), given, features);
            View sum_in = own_sum ? sums(*own_sum, 0, given, given, features)
                                  : sums(x.initial_sum, x.initial_sum.at(b, h), p.initial_sum.rank, given, features);
            View state_out = states(x.final, x.final.at(b, h), state, (int32_t)K),
                 sum_out = sums(x.final_sum, x.final_sum.at(b, h), sum, 0, (int32_t)K);
            View weights = weights_of(x.weights);
            run.check(run.variant.name, std::get<ParallelKernel *>(run.variant.run)(
                                            &run.workspace, &q, &k, &v, &log_decay, &state_in, &sum_in, 0, p.degree,
                                            p.normalized, p.scale, &out, &state_out, &sum_out, &weights));
        }
    x.fetch();
}

/// The kernel of power retention that the final state of degrees above 1 is made by; null where there is none to make.
const Variant *variant_of_rest(const Problem &p, const Choice &choice) {
    return p.degree > 1 && (p.final_state.rank || p.final_sum.rank) ? &power_variant("power", p, choice, p.V) : nullptr;
}

GpuCall call_of(const Problem &p, const Variant &variant, const Variant *of_rest) {
    return {variant, p.tensors(),
            [&p, of_rest](const Run &run) {
                Problem out = p;
                if (p.degree > 1) out.final_state = out.final_sum = {};
                const bool any = out.out.rank || out.final_state.rank || out.final_sum.rank;
                for (int64_t s = 0; any && p.packed() && s < p.N; s++) issue(run, sequence_of(out, s), p.start(s));
                if (any && !p.packed()) issue(run, out, 0);
                if (!of_rest) return;
                Problem rest = p;  // keys in the place of queries, which are more and do not matter
                rest.form = HOLDFAST_FORM_CHUNKWISE, rest.q = p.k, rest.H = p.Hk, rest.out = rest.weights = {};
                issue_power({*of_rest, run.workspace, run.call}, rest);
            },
            p.workspace, "holdfast_workspace_size"};
}

}  // namespace

void parallel_on_gpu(holdfast_context &c, const Problem &given, const Choice &choice) {
    const Variant &variant = parallel_variant(given, choice);
    announce(c, "forward", variant, choice.why, given, "parallel form");
    const Problem p = with_queries(given);
    if (p.B && p.Hk) call_of(p, variant, variant_of_rest(p, choice)).run(c);
}

size_t parallel_workspace_on_gpu(holdfast_context &c, const Problem &given, const Choice &choice) {
    const Problem p = with_queries(nearest(given));
    const Variant &variant = parallel_variant(p, choice);
    return p.B && p.Hk ? call_of(p, variant, variant_of_rest(p, choice)).workspace(c) : 0;
}

}  // namespace holdfast
