// Every GPU API that Halide has, any sizes, under the limits of chunkwise.cpp: a thread per column of the state, down all its
// rows, so that neighbours read neighbouring memory; then a thread per output.
#include "../../generators/recurrent.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int columns = 32;  // of a block: as wide as a GPU runs threads, and small, for many blocks

void apply(RecurrentFuncs &f, const RecurrentSizes &, const Target &) {
    Var b("b"), h("h"), g("g"), n("n"), i("i"), e("e"), eo("eo"), et("et"), heads("heads");

    f.state_and_sum.gpu_single_thread();  // undefined at first, so that nothing is run; but Halide would want it in host memory
    f.state_and_sum.update()
        .split(e, eo, et, columns, TailStrategy::GuardWithIf)
        .reorder(i, f.over_key_feature, n, et, eo, h, b)
        .gpu_blocks(eo, h, b)
        .gpu_threads(et);
    for (Func decay : {f.decay, f.left_out}) decay.compute_at(f.state_and_sum, n).store_in(MemoryType::Register);
    f.result.split(e, eo, et, columns, TailStrategy::GuardWithIf)
        .fuse(g, h, heads)
        .reorder(i, n, et, eo, heads, b)
        .gpu_blocks(eo, heads, b)
        .gpu_threads(et);
    f.others.compute_at(f.result, i).store_in(MemoryType::Register).bound_extent(g, 1).bound_extent(h, 1);
}

bool matches(const Target &t, const RecurrentSizes &) { return t.has_gpu_feature(); }

const bool added = Schedule<RecurrentFuncs, RecurrentSizes>::add({"gpu", 5, matches, apply});
}  // namespace
