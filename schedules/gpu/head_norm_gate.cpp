// Every GPU API that Halide has, any sizes, under the limits of chunkwise.cpp: a block of threads per row. Each thread sums
// every 32nd element of it, and all of them then add up these sums.
#include "../../generators/head_norm_gate.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int threads = 32;

void apply(HeadNormGateFuncs &f, const HeadNormGateSizes &, const Target &) {
    Var e("e"), h("h"), t("t"), b("b"), eo("eo"), ei("ei"), lane("lane");
    RVar ro("ro"), ri("ri");
    const TailStrategy tail = TailStrategy::GuardWithIf;

    f.result.split(e, eo, ei, threads, tail).reorder(eo, ei, h, t, b).gpu_blocks(h, t, b).gpu_threads(ei);
    f.first.compute_at(f.result, h), f.sum.compute_at(f.result, h);  // of the block, in shared memory
    for (Func sum : {f.sum, f.squares}) {
        sum.update().split(f.over_value, ro, ri, threads, tail);
        Func lanes = sum.update().rfactor(ri, lane);
        lanes.compute_at(f.result, h).gpu_threads(lane).update().reorder(ro, lane).gpu_threads(lane);
    }
    f.weight_or_one.compute_at(f.result, eo).store_in(MemoryType::Register);
    f.squares.compute_at(f.result, ei).store_in(MemoryType::Register);
    f.factor.compute_at(f.result, ei).store_in(MemoryType::Register);
}

bool matches(const Target &t, const HeadNormGateSizes &) { return t.has_gpu_feature(); }

const bool added = Schedule<HeadNormGateFuncs, HeadNormGateSizes>::add({"gpu", 5, matches, apply});
}  // namespace
