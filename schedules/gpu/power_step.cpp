// Every GPU API that Halide has, any sizes, under the limits of chunkwise.cpp: a thread per column of a block of the state, down its
// rows, so that neighbours read neighbouring memory; then a thread per output.
#include "../../generators/power_step.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int columns = 32;  // of a block: as wide as a GPU runs threads, and small, for many blocks

void apply(PowerStepFuncs &p, const PowerStepSizes &, const Target &) {
    Var h("h"), g("g"), d("d"), f("f"), e("e"), u("u"), eo("eo"), et("et"), fo("fo"), ft("ft");
    const TailStrategy guard = TailStrategy::GuardWithIf;

    // The table: a thread per feature. A factor is known when its last bit is, so that each is a kernel.
    for (Func list : p.phi.table()) list.compute_root().gpu_tile(f, fo, ft, 64, guard);
    for (Func factor : p.phi.searched)
        factor.update().split(f, fo, ft, 64, guard).reorder(p.phi.over_bit, ft, fo).gpu_blocks(fo).gpu_threads(ft);

    p.unit.compute_root().gpu_single_thread();
    p.largest.compute_at(p.unit, g).store_in(MemoryType::Register);
    p.queries.compute_root().split(d, fo, ft, 64, guard).gpu_blocks(fo, g, h).gpu_threads(ft);
    p.phi_q.compute_root().split(f, fo, ft, 64, guard).gpu_blocks(fo, g, h).gpu_threads(ft);
    p.phi_k.compute_root().split(f, fo, ft, 64, guard).gpu_blocks(fo, h).gpu_threads(ft);

    p.state_and_sum.gpu_single_thread();  // undefined at first, so that nothing is run; but Halide would want it in host memory
    const RVar row = p.over_others.x, other = p.over_others.y, tile("tile");  // none of one query: then it is not launched
    p.state_and_sum.update(0)
        .split(e, eo, et, columns, guard)
        .fuse(other, eo, tile)
        .reorder(row, et, tile, u, h)
        .gpu_blocks(tile, u, h)
        .gpu_threads(et);
    p.state_and_sum.update(1)
        .split(e, eo, et, columns, guard)
        .reorder(p.over_feature, et, eo, u, h)
        .gpu_blocks(eo, u, h)
        .gpu_threads(et);
    p.decay.compute_root().gpu_blocks(h);
    p.keys.gpu_single_thread();
    p.keys.update().split(f, fo, ft, columns, guard).gpu_blocks(fo, h).gpu_threads(ft);
    for (Func of_query : {p.den, p.score}) {
        of_query.compute_root().gpu_blocks(g, h);
        of_query.update().gpu_blocks(g, h);
    }
    p.den_block.compute_at(p.den, p.over_block_weight);
    p.result.split(e, eo, et, columns, guard).gpu_blocks(eo, g, h).gpu_threads(et);
    p.num.compute_at(p.result, et).store_in(MemoryType::Register);
}

bool matches(const Target &t, const PowerStepSizes &) { return t.has_gpu_feature(); }

const bool added = Schedule<PowerStepFuncs, PowerStepSizes>::add({"gpu", 5, matches, apply});
}  // namespace
