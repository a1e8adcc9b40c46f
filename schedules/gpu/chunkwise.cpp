// Every GPU API, any sizes, correct and slow: a thread per element, weights in shared memory.
#include "../../generators/chunkwise.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

void apply(ChunkwiseFuncs &f, const ChunkwiseSizes &sizes, const Target &) {
    Var b("b"), h("h"), c("c"), i("i"), j("j"), d("d"), e("e"), s("s"), z("z");
    Var xo("xo"), yo("yo"), xt("xt"), yt("yt"), eo("eo"), ei("ei");
    RVar row = f.over_result.x, in = f.over_result.y, ro("ro"), ri("ri"), rc("rc");
    const TailStrategy tail = TailStrategy::GuardWithIf;
    const int strip = 8;

    for (Func decay : {f.decay_steps, f.decay_rest}) {
        decay.in().compute_root().bound(i, 0, sizes.chunk).gpu_blocks(c, h, b).gpu_threads(i);
        decay.compute_at(decay.in(), i);
    }
    f.state.compute_root();
    for (int u : {0, 1}) {
        f.state.update(u).tile(e, d, xo, yo, xt, yt, 32, 4, tail).fuse(xo, yo, z)
            .reorder(u ? RVar(f.over_chunk.x) : RVar(f.over_sequence.x), xt, yt, z, h, b)
            .gpu_blocks(z, h, b).gpu_threads(xt, yt);
    }
    f.contribution.compute_at(f.state, f.over_chunk.x);
    f.state_out.tile(e, d, xo, yo, xt, yt, 32, 4, tail).fuse(xo, yo, z).fuse(z, s, z)
        .reorder(xt, yt, z, h, b).gpu_blocks(z, h, b).gpu_threads(xt, yt);

    f.result.update(0).allow_race_conditions()  // each row belongs to one chunk: chunks.h
        .split(row, ro, ri, strip).split(e, eo, ei, 32, tail).fuse(ro, in, rc).reorder(eo, ei, ri, rc, h, b)
        .gpu_blocks(rc, h, b).gpu_threads(ei, ri);
    f.inter.compute_at(f.result, eo);
    f.intra.compute_at(f.result, eo);
    f.weights.compute_at(f.result, rc).store_in(MemoryType::GPUShared).bound_storage(j, sizes.chunk).gpu_threads(j, i);
    f.scores.compute_at(f.weights, j);
}

bool matches(const Target &t, const ChunkwiseSizes &s) { return t.has_gpu_feature() && s.chunk % 8 == 0; }

const bool added = Schedule<ChunkwiseFuncs, ChunkwiseSizes>::add({"gpu", 0, matches, apply});
}  // namespace
