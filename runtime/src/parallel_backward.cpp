// The kernel parallel_backward on the CPU, a call for each sequence and head of keys.
#include "parallel_backward.h"

#include "backward_head.h"

#include <algorithm>

namespace holdfast {

void run_parallel_backward(holdfast_context &c, const BackwardProblem &p, const Choice &choice) {
    const Variant &variant = select_variant("parallel_backward", p.q.dtype.name, p.K, p.V, 0, choice.backend, choice.forced);
    check_kernel_strides(p, p.T);
    const int64_t heads = p.N * p.Hk;
    announce(c, "backward", variant, choice.why, p, "parallel form", heads);
    DecaySums sums(p);
    if (heads == 0) return sums.finish();
    c.for_each(heads, [&](Workspace &workspace, int64_t n) {
        const int64_t s = n / p.Hk, h = n % p.Hk, T = p.length(s);
        if (T == 0) return;
        BackwardHead head(p, workspace, s, h, T);
        head.look_at(0, T);
        const auto run = std::get<ParallelBackwardKernel *>(variant.run);
        check_returned(run(&workspace, &head.q, &head.k, &head.v, &head.log_decay, &head.out, &head.dout, p.degree,
                           p.normalized, p.scale, head.want_dq, head.want_dk, head.want_dv, head.want_dlog_decay, &head.dq,
                           &head.dk, &head.dv, &head.dlog_decay),
                       variant, workspace);
        head.done();
        sums.put(s, h, head.sum);
    });
    sums.finish();
}

}  // namespace holdfast
