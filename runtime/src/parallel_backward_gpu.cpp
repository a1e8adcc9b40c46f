// The kernel parallel_backward on a GPU: one call for all batch entries and heads, or as few as 32-bit buffers allow. Packed sequences
// are calls of their own, one after the other.
#include "parallel_backward_gpu.h"

#include "gpu.h"

#include <algorithm>

namespace holdfast {
namespace {

/// Launch everything for sequences of one length. `decays` are those of the whole call, in which they begin at token `start`.
void issue(const Run &run, const BackwardProblem &p, const DecaysPerHead &decays, int64_t start) {
    if (p.T == 0) return;
    BackwardOperands x(run, p);
    const int64_t G = p.group(), zeros_bytes = std::max(p.K, p.V) * (int64_t)sizeof(float);
    const int32_t tokens = (int32_t)p.T, group = (int32_t)G;
    Memory memory_of_zeros(run, zeros_bytes), unwanted_row(run, zeros_bytes);
    fill_chunk_table(run, memory_of_zeros, zeros_bytes, 0, 1, 0);  // of no chunks: zeros
    const Zeros zeros{memory_of_zeros};

    // The largest buffers that the kernel has: weights, rows in fp32.
    const int64_t C = run.variant.chunk;
    const double rows = (double)((p.T + C - 1) / C * C);
    const double bytes_of_a_head =
        std::max(rows, (double)std::max(p.K, p.V)) * rows * (double)std::max<int64_t>(G, 1) * sizeof(float);
    const Part part = largest_part(p, x, p.T, (int64_t)std::min(bytes_of_a_head, 2.0 * (double)most_bytes));
    if (!part.batch)
        fail(HOLDFAST_UNSUPPORTED, "T = ", p.T,
             " tokens of one head, or their weights, need a buffer beyond 2^31 bytes; expected less");

    for (int64_t b = 0; b < p.B; b += part.batch)
        for (int64_t h = 0; h < p.Hk; h += part.of_each) {
            const int32_t B = (int32_t)std::min(part.batch, p.B - b), H = (int32_t)std::min(part.of_each, p.Hk - h);
            const int32_t K = (int32_t)p.K, V = (int32_t)p.V;
            auto keys = [&](const OnDevice &r, int32_t size) {
                if (r.t.rank) return rows_of(r, b, 0, h, tokens, H, B);
                return row_for_all(unwanted_row, p, size, tokens, H, B);
            };
            auto queries = [&](const OnDevice &r, int32_t size) {
                if (r.t.rank) return groups_of(r, G, b, 0, h, tokens, H, B);
                return row_for_all(unwanted_row, p, size, tokens, group, H, B);
            };
            View q = queries(x.q, K), k = keys(x.k, K), v = keys(x.v, V), dout = queries(x.dout, V);
            View out = queries(p.normalized ? x.out : x.dout, V);  // not looked at where it is not normalized
            View log_decay = decays_of(x.log_decay, x.log_decay.t.rank ? nullptr : &zeros, b, 0, h, tokens, H, B);
            View dq = queries(x.dq, K), dk = keys(x.dk, K), dv = keys(x.dv, V);
            View dlog_decay = decays.part(x.dlog_decay, unwanted_row, b, start, 0, h, tokens, H, B);
            run.check(run.variant.name,
                      std::get<ParallelBackwardKernel *>(run.variant.run)(
                          &run.workspace, &q, &k, &v, &log_decay, &out, &dout, p.degree, p.normalized, p.scale, p.dq.rank > 0,
                          p.dk.rank > 0, p.dv.rank > 0, p.dlog_decay.rank > 0, &dq, &dk, &dv, &dlog_decay));
        }
    x.fetch(run, p);
}

const Variant &variant_of(const BackwardProblem &p, const Choice &choice) {
    return select_variant("parallel_backward", p.q.dtype.name, p.K, p.V, 0, choice.backend, choice.forced);
}

GpuCall call_of(const BackwardProblem &p, const Variant &variant) {
    return gradient_call(variant, p, [&p](const Run &run) {
        DecaysPerHead decays(run, p);
        if (!p.packed() && p.N) issue(run, p, decays, 0);
        for (int64_t s : longest_first(p)) issue(run, sequence_of(p, s), decays, p.start(s));
        decays.finish();
    });
}

}  // namespace

void parallel_backward_on_gpu(holdfast_context &c, const BackwardProblem &p, const Choice &choice) {
    const Variant &variant = variant_of(p, choice);
    announce(c, "backward", variant, choice.why, p, "parallel form");
    if (!writes_nothing(p)) call_of(p, variant).run(c);
}

size_t parallel_backward_workspace_on_gpu(holdfast_context &c, const BackwardProblem &given, const Choice &choice) {
    const BackwardProblem p = nearest(given);
    return writes_nothing(p) ? 0 : call_of(p, variant_of(p, choice)).workspace(c);
}

}  // namespace holdfast
