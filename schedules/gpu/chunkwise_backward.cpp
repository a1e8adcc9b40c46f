// Every GPU API that Halide has, any sizes: the subset that all of them take (chunkwise.cpp). One call is the whole problem, a
// kernel per stage, blocks over chunks, heads and batch entries: products a tile of a chunk each, of which a thread has 4 x 4 sums in
// registers; what passes from one stage to the next is scratch in device memory. Operands are read from device memory, through its
// caches: shared memory is left out, and speed has not been measured.
#include "../../generators/chunkwise_backward.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

void apply(ChunkwiseBackwardFuncs &r, const ChunkwiseSizes &sizes, const Target &) {
    Var xo("xo"), xt("xt"), xi("xi"), yo("yo"), yt("yt"), yi("yi"), block("block"), heads("heads");
    const TailStrategy guard = TailStrategy::GuardWithIf;
    const int C = sizes.chunk, D = sizes.key, E = sizes.value;

    // A product of all chunks, (x, y, c, (g,) h, b), in memory. Where an extent is known at run time only, a thread has one of it.
    auto product = [&](Func p, Func stage, int x_extent, int y_extent) {
        const std::vector<Var> args = stage.args();
        const int wide = x_extent ? 4 : 1, columns = x_extent ? std::min(x_extent, 64) : 32;
        const int high = y_extent ? 4 : 1, rows = y_extent ? std::min(y_extent, 32) : 8;
        const TailStrategy x_tail = x_extent ? TailStrategy::RoundUp : guard, y_tail = y_extent ? TailStrategy::RoundUp : guard;
        stage.compute_root()
            .split(args[0], xo, xt, columns, x_tail)
            .split(xt, xt, xi, wide)
            .split(args[1], yo, yt, rows, y_tail)
            .split(yt, yt, yi, high)
            .fuse(xo, yo, block)
            .fuse(block, args[2], block);
        Var h = args[3];
        if (args.size() == 6) stage.fuse(args[3], args[4], heads), h = heads;
        stage.reorder(xi, yi, xt, yt, block, h, args.back())
            .unroll(xi)
            .unroll(yi)
            .gpu_blocks(block, h, args.back())
            .gpu_threads(xt, yt);
        Var x = p.args()[0], y = p.args()[1];
        p.compute_at(stage, xt).store_in(MemoryType::Register).bound_extent(x, wide).bound_extent(y, high).unroll(x).unroll(y);
        if (args.size() == 6) p.bound_extent(args[3], 1).bound_extent(args[4], 1);  // not seen in the two as one
        for (int u = 0; u < p.num_update_definitions(); u++) {
            std::vector<VarOrRVar> order = {x, y};
            for (const RVar &over : p.rvars(u)) order.push_back(over);
            p.update(u).reorder(order).unroll(x).unroll(y);
        }
    };
    auto stored = [&](Func p, int x_extent, int y_extent) { product(p, p.in(), x_extent, y_extent); };
    // A value of each row or feature: a thread each.
    auto rows = [&](Func f) {
        Func all = f.in();
        const std::vector<Var> args = all.args();  // x, c, h, b
        all.compute_root().split(args[0], xo, xt, 32, guard).fuse(xo, args[1], block).reorder(xt, block, args[2], args[3]);
        all.gpu_blocks(block, args[2], args[3]).gpu_threads(xt);
        f.compute_at(all, xt).store_in(MemoryType::Register);
    };
    auto each_element = [&](Stage stage, const std::vector<Var> &args, const RVar &inner) {
        stage.split(args[0], xo, xt, 32, guard)
            .split(args[1], yo, yt, 8, guard)
            .fuse(xo, yo, block)
            .reorder(inner, xt, yt, block, args[3], args[4])
            .gpu_blocks(block, args[3], args[4])
            .gpu_threads(xt, yt);
    };

    for (Func decay : {r.f.decay_steps, r.f.decay_rest, r.f.row_decay, r.f.key_decay}) rows(decay);

    // Scan, and scan back: a thread per element, over the chunks on the device.
    stored(r.f.contribution, E, D), stored(r.dstate_from_inter, E, D);
    r.f.state.compute_root(), r.dstate.compute_root();
    each_element(r.f.state.update(0), r.f.state.args(), r.f.over_sequence.x);
    each_element(r.f.state.update(1), r.f.state.args(), r.f.over_chunk.x);
    each_element(r.dstate.update(0), r.dstate.args(), r.over_sequence.x);
    each_element(r.dstate.update(1), r.dstate.args(), r.over_chunk.x);
    const std::vector<Var> of_states = r.dstate_in.args();
    RVar states("states");
    r.dstate_in.gpu_single_thread();  // as results of rows below
    r.dstate_in.update(0)
        .allow_race_conditions()
        .split(of_states[0], xo, xt, 32, guard)
        .split(of_states[1], yo, yt, 8, guard)
        .fuse(xo, yo, block)
        .fuse(block, r.over_states, states)
        .reorder(xt, yt, states, of_states[3], of_states[4])
        .gpu_blocks(states, of_states[3], of_states[4])
        .gpu_threads(xt, yt);

    // Inside chunks.
    product(r.f.scores, r.f.weights, C, C), product(r.dweights, r.dscores, C, C);
    stored(r.dkeys_decayed, D, C), stored(r.dq, D, C), stored(r.dk, D, C), stored(r.dv, E, C);
    RDom over[] = {r.over_dq, r.over_dk, r.over_dv};
    int n = 0;
    for (Func result : {r.result_dq, r.result_dk, r.result_dv}) {
        const std::vector<Var> args = result.args();  // x, t, (g,) h, b
        const RVar row = over[n].x, chunk = over[n].y;
        n++;
        RVar ro("ro"), rt("rt"), strips("strips");
        result.gpu_single_thread();  // undefined at first, so that nothing is run; but Halide would want it in host memory too
        Stage stage = result.update(0)
                          .allow_race_conditions()  // each row belongs to one chunk: chunks.h
                          .split(row, ro, rt, 8)
                          .fuse(ro, chunk, strips)
                          .split(args[0], xo, xt, 32, guard)
                          .fuse(xo, strips, strips);
        Var h = args[2];
        if (args.size() == 5) stage.fuse(args[2], args[3], heads), h = heads;
        stage.reorder(xt, rt, strips, h, args.back()).gpu_blocks(strips, h, args.back()).gpu_threads(xt, rt);
    }

    // Gates.
    for (Func sum : {r.row_product, r.key_product, r.state_product, r.added_product, r.dlog_decay}) rows(sum);
    Func ends = r.end_product.in();
    const std::vector<Var> args = ends.args();  // c, h, b
    ends.compute_root().split(args[0], xo, xt, 32, guard).reorder(xt, xo, args[1], args[2]);
    ends.gpu_blocks(xo, args[1], args[2]).gpu_threads(xt);
    r.end_product.compute_at(ends, xt).store_in(MemoryType::Register);
    r.result_dlog_decay.gpu_single_thread();
    r.result_dlog_decay.update(0)
        .allow_race_conditions()
        .reorder(r.over_gate.x, r.over_gate.y, r.result_dlog_decay.args()[1], r.result_dlog_decay.args()[2])
        .gpu_blocks(r.over_gate.y, r.result_dlog_decay.args()[1], r.result_dlog_decay.args()[2])
        .gpu_threads(r.over_gate.x);
}

// Powers of two are divided by shifts; for other constants Halide multiplies with 64 bits.
bool fits(int size) { return size == 0 || (size >= 32 && (size & (size - 1)) == 0); }

bool matches(const Target &t, const ChunkwiseSizes &s) {
    return t.has_gpu_feature() && s.chunk % 32 == 0 && fits(s.key) && fits(s.value);
}

const bool added = Schedule<ChunkwiseBackwardFuncs, ChunkwiseSizes>::add({"gpu", 5, matches, apply});
}  // namespace
