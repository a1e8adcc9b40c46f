// The kernel power_backward on a GPU, as power_backward.cpp runs it on the CPU: a chunk of all batch entries and heads, or of as few as
// 32-bit buffers allow, in a call, from the last chunk to the first; the states that the chunks begin with from the kernel power, kept
// or made again. Packed sequences are calls of their own, one after the other.
#include "power_backward_gpu.h"

#include "expansion.h"
#include "gpu.h"
#include "power.h"
#include "power_backward.h"
#include "power_gpu.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace holdfast {
namespace {

constexpr auto tight = HOLDFAST_EXPANSION_TIGHT;  // the kernels' order

struct Kernels {
    const Variant &gradient, &forward;

    Kernels(const BackwardProblem &p, const Choice &choice)
        : gradient(power_variant("power_backward", p, choice, p.V)),
          forward(power_variant("power", p, {choice.backend, gradient.target, choice.why}, p.V)) {}
    int64_t chunk(const BackwardProblem &p) const {
        const int64_t most = std::min(gradient.chunk, forward.chunk);
        return p.chunk_size ? std::min(p.chunk_size, most) : most;
    }
};

/// Sequences of one length, of which some heads at a time are looked at.
class Chains {
public:
    /// `decays` are those of the whole call, in which the sequence begins at token `start`.
    Chains(const Run &run, const Kernels &kernels, const BackwardProblem &p, const DecaysPerHead &decays, int64_t start)
        : run(run), kernels(kernels), p(p), x(run, p), decays(decays), start(start), G(p.group()), chunk(kernels.chunk(p)),
          chunks((p.T + chunk - 1) / chunk), D(expanded_size(p.K, p.degree, tight, std::numeric_limits<int32_t>::max())),
          zeros_bytes(std::max({D, p.K, p.V}) * (int64_t)sizeof(float)), memory_of_zeros(run, zeros_bytes),
          unwanted_row(run, zeros_bytes) {
        fill_chunk_table(run, memory_of_zeros, zeros_bytes, 0, 1, 0);  // of no chunks: zeros
    }

    void go() {
        // The largest buffers that the kernels have: the state; features, values and scores of a chunk; sums of blocks of features.
        const int64_t rows = std::max(kernels.gradient.chunk, kernels.forward.chunk),
                      blocks = (D + block_of_features - 1) / block_of_features;
        const int64_t scratch =
            std::max({D * p.V, std::max({D, p.V, rows}) * rows * std::max<int64_t>(G, 1), blocks * p.V * rows}) *
            (int64_t)sizeof(float);
        part = largest_part(p, x, std::min(chunk, p.T), scratch);
        if (!part.batch)
            fail(HOLDFAST_UNSUPPORTED, "a chunk of one head, its state of D V = ", D * p.V,
                 " or its features need a buffer beyond 2^31 bytes; expected less");
        const bool states = p.dq.rank || p.dlog_decay.rank || (p.normalized && p.group());
        // All that are kept, and a gradient, a quarter of the tensors, at most; of as many heads as there can be at a time,
        // whatever the strides, by which memory, that a workspace has been sized for, must not grow.
        const Part most = largest_part({p.B, p.Hk}, [&](int64_t batch, int64_t heads) {
            return (double)scratch * (double)batch * (double)heads <= (double)most_bytes;
        });
        const double bytes_of_states = (double)(D * (p.V + 1)) * sizeof(float) * (double)(most.batch * most.of_each);
        const KeptStates kept(states ? chunks : 1, bytes_of_tensors(p) / 4 / bytes_of_states - 1);
        make(between, kept.places()), make(gradients, 1);
        if (p.expansion != tight && p.initial_state.rank) make(initial, 1);
        for (b = 0; b < p.B; b += part.batch)
            for (h = 0; h < p.Hk; h += part.of_each) {
                B = (int32_t)std::min(part.batch, p.B - b), H = (int32_t)std::min(part.of_each, p.Hk - h);
                walk(states ? &kept : nullptr);
            }
        x.fetch(run, p);
    }

private:
    /// States and sums of keys, or gradients by them.
    struct Slot {
        OnDevice state, sum;
    };
    /// Where some are, from these heads on; null: zeros.
    struct Where {
        const OnDevice *state, *sum;
        int64_t b, h;
    };
    static Where in(const Slot &slot) { return {&slot.state, &slot.sum, 0, 0}; }

    const Run &run;
    const Kernels &kernels;
    const BackwardProblem &p;
    BackwardOperands x;
    const DecaysPerHead &decays;
    const int64_t start, G;  // heads of queries to one of keys
    const int64_t chunk, chunks, D;
    const int64_t zeros_bytes;
    Memory memory_of_zeros, unwanted_row;
    Part part{};
    std::vector<Slot> between;             // states, but the first
    std::vector<Slot> gradients, initial;  // one each, in the kernels' order
    int64_t b = 0, h = 0;                  // the heads that are looked at
    int32_t B = 0, H = 0;
    bool advanced = false, retreated = false;

    void make(std::vector<Slot> &slots, int64_t count) {
        while ((int64_t)slots.size() < count)
            slots.push_back({OnDevice(run, floats_of("state", {part.batch, part.of_each, D, p.V}), false),
                             OnDevice(run, floats_of("sum of keys", {part.batch, part.of_each, D}), false)});
    }
    static const OnDevice *given(const OnDevice &tensor) { return tensor.t.rank ? &tensor : nullptr; }

    View states(const Where &w) const {
        if (w.state) return features_of(*w.state, w.b, w.h, H, B);
        return View(memory_of_zeros, 0, float32, {{0, (int32_t)p.V, 1}, {0, (int32_t)D, 0}, {0, H, 0}, {0, B, 0}});
    }
    View sums(const Where &w) const {
        if (w.sum) return sums_of(*w.sum, w.b, w.h, H, B);
        return View(memory_of_zeros, 0, float32, {{0, (int32_t)D, 1}, {0, H, 0}, {0, B, 0}});
    }

    /// The caller's, in the kernels' order: where they are, if that is his too, else converted.
    Where of_caller(const OnDevice &state, const OnDevice &sum, std::vector<Slot> &converted, Of of) {
        if (p.expansion == tight || !(state.t.rank || sum.t.rank)) return {given(state), given(sum), b, h};
        const Slot &slot = converted[0];
        for (auto [from, to] : {std::pair{&state, &slot.state}, {&sum, &slot.sum}})
            if (from->t.rank)
                convert(run, features_of(*from, b, h, H, B), p.expansion, features_of(*to, 0, 0, H, B), tight, of);
        return {state.t.rank ? &slot.state : nullptr, sum.t.rank ? &slot.sum : nullptr, 0, 0};
    }

    /// All chunks of the heads; null: no state is needed.
    void walk(const KeptStates *kept) {
        const Where before = of_caller(x.initial, x.initial_sum, initial, Of::states);
        auto state = [&](int64_t place) { return place ? in(between[place - 1]) : before; };
        Where gradient = of_caller(x.dfinal, x.dfinal_sum, gradients, Of::gradients);
        auto retreat_from = [&](int64_t n, const Where &state) {
            const Where next = in(gradients[0]);
            retreat(n, state, gradient, next);
            gradient = next;
        };
        if (kept)
            kept->walk_back([&](int64_t n, int64_t from, int64_t to) { advance(n, state(from), state(to)); },
                            [&](int64_t n, int64_t from) { retreat_from(n, state(from)); });
        else
            for (int64_t n = chunks; n-- > 0;) retreat_from(n, {nullptr, nullptr, 0, 0});
        put(gradient);
    }

    /// The gradients by the initial states, to where they are wanted. Without tokens they are the caller's own, which may be there.
    void put(const Where &gradient) const {
        const std::pair<const OnDevice *, const OnDevice *> results[] = {{gradient.state, &x.dinitial},
                                                                         {gradient.sum, &x.dinitial_sum}};
        for (const auto &[from, to] : results) {
            if (!to->t.rank) continue;
            View there = features_of(*to, b, h, H, B);
            const bool own = chunks || p.expansion != tight;  // `from` is a slot's
            if (!from)
                clear(run, std::move(there));
            else if (own || to->t.on_host() || !same_elements(from->t, to->t))
                convert(run, features_of(*from, gradient.b, gradient.h, H, B), tight, std::move(there), p.expansion,
                        Of::gradients);
        }
    }

    /// Rows of a chunk: of keys or values, and of queries or outputs; those that are not given are not wanted.
    View rows(const OnDevice &r, int64_t t, int32_t tokens) const {
        if (r.t.rank) return rows_of(r, b, t, h, tokens, H, B);
        return View(unwanted_row, 0, halide_type(p.q.dtype), {{0, size_of(r), 1}, {0, tokens, 0}, {0, H, 0}, {0, B, 0}});
    }
    View groups(const OnDevice &r, int64_t t, int32_t tokens) const {
        if (r.t.rank && G) return groups_of(r, G, b, t, h, tokens, H, B);
        const bool read = &r == &x.q || &r == &x.dout || &r == &x.out;
        return View(read ? memory_of_zeros : unwanted_row, 0, halide_type(p.q.dtype),
                    {{0, size_of(r), 1}, {0, tokens, 0}, {0, (int32_t)G, 0}, {0, H, 0}, {0, B, 0}});
    }
    int32_t size_of(const OnDevice &r) const {
        return (int32_t)(&r == &x.q || &r == &x.k || &r == &x.dq || &r == &x.dk ? p.K : p.V);
    }
    View log_decays(int64_t t, int32_t tokens) const {
        const Zeros zeros{memory_of_zeros};
        return decays_of(x.log_decay, x.log_decay.t.rank ? nullptr : &zeros, b, t, h, tokens, H, B);
    }
    int32_t tokens_of(int64_t n) const { return (int32_t)std::min(chunk, p.T - n * chunk); }

    /// The state at the end of a chunk, from that at its start.
    void advance(int64_t n, const Where &from, const Where &to) {
        // A rehearsal is for memory, and one chunk needs as much as any.
        if (run.call.rehearsal && std::exchange(advanced, true)) return;
        const int64_t t = n * chunk;
        const int32_t tokens = tokens_of(n);
        View k = rows(x.k, t, tokens), v = rows(x.v, t, tokens);
        View q = row_for_all(unwanted_row, p, p.K, tokens, 0, H, B), out = row_for_all(unwanted_row, p, p.V, tokens, 0, H, B);
        View log_decay = log_decays(t, tokens);
        View state_in = states(from), sum_in = sums(from), state_out = states(to), sum_out = sums(to);
        run.check(kernels.forward.name,
                  std::get<PowerKernel *>(kernels.forward.run)(&run.workspace, &q, &k, &v, &log_decay, &state_in, &sum_in,
                                                               p.degree, p.normalized, p.scale, &out, &state_out, &sum_out));
    }

    /// The gradients of a chunk, from its state and the gradient of that at its end; and that of the state.
    void retreat(int64_t n, const Where &state, const Where &gradient, const Where &next) {
        if (run.call.rehearsal && std::exchange(retreated, true)) return;
        const int64_t t = n * chunk;
        const int32_t tokens = tokens_of(n);
        View q = groups(x.q, t, tokens), k = rows(x.k, t, tokens), v = rows(x.v, t, tokens);
        View out = groups(x.out, t, tokens), dout = groups(x.dout, t, tokens), log_decay = log_decays(t, tokens);
        View dq = groups(x.dq, t, tokens), dk = rows(x.dk, t, tokens), dv = rows(x.dv, t, tokens);
        View dlog_decay = decays.part(x.dlog_decay, unwanted_row, b, start, t, h, tokens, H, B);
        View state_in = states(state), sum_in = sums(state), dstate_out = states(gradient), dsum_out = sums(gradient);
        View dstate_in = states(next), dsum_in = sums(next);
        run.check(kernels.gradient.name,
                  std::get<PowerBackwardKernel *>(kernels.gradient.run)(
                      &run.workspace, &q, &k, &v, &log_decay, &state_in, &sum_in, &out, &dout, &dstate_out, &dsum_out, p.degree,
                      p.normalized, p.scale, p.dq.rank > 0 && G, p.dk.rank > 0, p.dv.rank > 0, p.dlog_decay.rank > 0,
                      p.needs_dstate(n), p.needs_dsum(n), &dq, &dk, &dv, &dlog_decay, &dstate_in, &dsum_in));
    }
};

/// Launch everything.
void issue(const Run &run, const Kernels &kernels, const BackwardProblem &p) {
    DecaysPerHead decays(run, p);
    if (!p.packed() && p.N) Chains(run, kernels, p, decays, 0).go();
    for (int64_t s : longest_first(p)) {
        const BackwardProblem sequence = sequence_of(p, s);
        Chains(run, kernels, sequence, decays, p.start(s)).go();
    }
    decays.finish();
}

GpuCall call_of(const BackwardProblem &p, const Kernels &kernels) {
    return gradient_call(kernels.gradient, p, [&](const Run &run) { issue(run, kernels, p); });
}

}  // namespace

void power_backward_on_gpu(holdfast_context &c, const BackwardProblem &p, const Choice &choice) {
    const Kernels kernels(p, choice);
    announce(c, "backward", kernels.gradient, choice.why, p, "chunks of " + std::to_string(kernels.chunk(p)));
    if (!writes_nothing(p)) call_of(p, kernels).run(c);
}

size_t power_backward_workspace_on_gpu(holdfast_context &c, const BackwardProblem &given, const Choice &choice) {
    const BackwardProblem p = nearest(given);
    const Kernels kernels(p, choice);
    return writes_nothing(p) ? 0 : call_of(p, kernels).workspace(c);
}

}  // namespace holdfast
