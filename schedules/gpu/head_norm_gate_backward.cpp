// Every GPU API that Halide has, any sizes, under the limits of chunkwise.cpp. First a sum of each row, or two, by a block of threads
// for it, into memory that every gradient reads; then a launch for each gradient of rows, a block of threads per row again.
// The sums over tokens are made in steps, of a launch each: of some tokens, of all of an entry, of all entries, and of heads that
// share weights.
#include "../../generators/head_norm_gate_backward.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int threads = 32, tokens = 64;  // of a block; of the first sums

void apply(HeadNormGateBackwardFuncs &f, const HeadNormGateBackwardSizes &, const Target &) {
    Var e("e"), h("h"), t("t"), b("b"), w("w"), eo("eo"), ei("ei"), eh("eh"), lane("lane"), n("n"), m("m");
    RVar ro("ro"), ri("ri"), to("to"), ti("ti");
    const TailStrategy tail = TailStrategy::GuardWithIf;
    HeadNormGateFuncs &y = f.forward;

    auto sum_over_row = [&](Func sum, Func block) {  // each thread every 32nd element, and then these sums
        sum.compute_at(block, h).update().split(sum.rvars(0)[0], ro, ri, threads, tail);
        Func lanes = sum.update().rfactor(ri, lane);
        lanes.compute_at(block, h).gpu_threads(lane).update().reorder(ro, lane).gpu_threads(lane);
    };
    for (Func sum : {y.sum, y.squares}) {
        Func rows = sum.in();
        rows.compute_root().gpu_blocks(h, t, b);
        sum_over_row(sum, rows);
    }
    Func weights = y.weight_or_one.in();
    weights.compute_root().split(e, eo, ei, threads, tail).reorder(ei, eo, h).gpu_blocks(eo, h).gpu_threads(ei);
    y.weight_or_one.compute_at(weights, ei).store_in(MemoryType::Register);

    for (Func result : {f.result_dx, f.result_dgate, f.result_dweight})
        result.gpu_single_thread();  // undefined at first, so that nothing is run; but Halide would want it in host memory too
    auto rows_in_blocks = [&](Stage gradient, const RDom &wanted) {
        gradient.split(e, eo, ei, threads, tail).reorder(eo, ei, h, t, b, wanted).gpu_blocks(h, t, b).gpu_threads(ei);
    };
    rows_in_blocks(f.result_dx.update(), f.want_dx), rows_in_blocks(f.result_dgate.update(), f.want_dgate);
    f.dsquares.compute_at(f.result_dx, h);
    for (Func sum : {f.dfactor, f.dsum}) sum_over_row(sum, f.result_dx);

    auto sum_by_threads = [&](Func sum) {  // each its own, in a register
        Func sums = sum.in();
        sums.compute_root().split(e, eo, ei, threads, tail).reorder(ei, eo, h).fuse(eo, h, eh).gpu_threads(ei);
        sum.compute_at(sums, ei).store_in(MemoryType::Register);
        return sums;
    };
    const RVar over_t = f.dweight.rvars(0)[0], over_b = f.dweight.rvars(0)[1];
    f.dweight.update().split(over_t, to, ti, tokens, tail);
    Func some = f.dweight.update().rfactor({{to, n}, {over_b, m}}), entries = f.dweight.update().rfactor(over_b, m);
    sum_by_threads(some).gpu_blocks(eh, n, m);
    sum_by_threads(entries).gpu_blocks(eh, m);
    sum_by_threads(f.dweight).gpu_blocks(eh);
    auto weights_in_blocks = [&](Stage stage) {
        return stage.split(e, eo, ei, threads, tail).gpu_blocks(eo, w).gpu_threads(ei);
    };
    weights_in_blocks(f.result_dweight.update(0)).reorder(ei, eo, w, f.want_dweight);
    weights_in_blocks(f.result_dweight.update(1)).reorder(f.over_heads, ei, eo, w);
}

bool matches(const Target &t, const HeadNormGateBackwardSizes &) { return t.has_gpu_feature(); }

const bool added = Schedule<HeadNormGateBackwardFuncs, HeadNormGateBackwardSizes>::add({"gpu", 5, matches, apply});
}  // namespace
