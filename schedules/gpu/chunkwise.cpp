// Every GPU API that Halide has (Metal, OpenCL, Vulkan, and CUDA where nothing better matches), any sizes: the subset that all
// of them take. Blocks of at most 256 threads with constant extents, vectors of at most 4, at most 32 KiB of shared memory;
// no atomics, no lanes, no numbers of 64 bits, no negative index that is shifted or divided (Halide 21 shifts it as an
// unsigned one on Vulkan).
//
// One call is the whole problem: blocks go over chunks, heads and batch entries. Kernels: decay_steps, decay_rest,
// contribution, state (initial, then the scan), state_out, out; the first three and state are scratch in device memory.
#include "chunkwise.h"
#include "../schedule.h"

namespace holdfast::gpu {
using namespace Halide;

void schedule(ChunkwiseFuncs &f, const ChunkwiseSizes &sizes, const Tile &out, const Tile &state) {
    Var b("b"), h("h"), g("g"), c("c"), i("i"), j("j"), d("d"), e("e"), s("s"), heads("heads");
    Var eo("eo"), ei("ei"), et("et"), dd("do"), di("di"), dt("dt"), jo("jo"), ji("ji"), io("io"), ii("ii"), block("block");
    RVar row = f.over_result.x, in = f.over_result.y, ro("ro"), ri("ri"), rt("rt"), strips("strips");
    const TailStrategy guard = TailStrategy::GuardWithIf;

    // The piece of a product that a thread works on, in registers over the whole sum.
    auto registers = [&](Func p, const LoopLevel &at, const RDom &over, Var x, Var y, const Tile &tile) {
        p.compute_at(at).store_in(MemoryType::Register);
        p.update().reorder(x, y, over.x);
        if (tile.wide > 1) p.vectorize(x), p.update().vectorize(x);
        if (tile.high > 1) p.unroll(y), p.update().unroll(y);
    };

    // Decays: a thread per row.
    for (Func decay : {f.decay_steps, f.decay_rest}) {
        Func rows = decay.in();
        rows.compute_root().bound(i, 0, sizes.chunk).gpu_blocks(c, h, b).gpu_threads(i);
        decay.compute_at(rows, i).store_in(MemoryType::Register);
    }

    // Contributions: a block per tile of the state and chunk, the decays of its keys in shared memory.
    Func contribution = f.contribution.in();
    contribution.compute_root()
        .split(e, eo, et, state.columns, guard)
        .split(d, dd, dt, state.rows, guard)
        .fuse(eo, dd, block)
        .fuse(block, c, block);
    if (state.wide * state.high > 1) {
        contribution.split(et, et, ei, state.wide)
            .split(dt, dt, di, state.high)
            .reorder(ei, di, et, dt, block, h, b)
            .vectorize(ei)
            .unroll(di);
    }
    contribution.reorder(et, dt, block, h, b).gpu_blocks(block, h, b).gpu_threads(et, dt);
    registers(f.contribution, {contribution, et}, f.over_token, e, d, state);
    f.key_decay.compute_at(contribution, block).store_in(MemoryType::GPUShared).split(j, jo, ji, 16).gpu_threads(ji, jo);

    // States: a thread per element, the scan over chunks on the device.
    auto each_element = [&](auto stage, RVar inner) {
        stage.split(e, eo, ei, 32, guard)
            .split(d, dd, di, 8, guard)
            .fuse(eo, dd, block)
            .reorder(inner, ei, di, block, h, b)
            .gpu_blocks(block, h, b)
            .gpu_threads(ei, di);
    };
    f.state.compute_root();
    each_element(f.state.update(0), f.over_sequence.x);
    each_element(f.state.update(1), f.over_chunk.x);
    f.state_out.split(e, eo, ei, 32, guard)
        .split(d, dd, di, 8, guard)
        .fuse(eo, dd, block)
        .fuse(block, s, block)
        .reorder(ei, di, block, h, b)
        .gpu_blocks(block, h, b)
        .gpu_threads(ei, di);

    // Output: a block per strip of a chunk's rows, its weights in shared memory.
    f.result.gpu_single_thread();  // undefined at first, so that nothing is run; but Halide would want it in host memory too
    Stage result = f.result.update(0)
                       .allow_race_conditions()  // each row belongs to one chunk: chunks.h
                       .split(row, ro, ri, strip)
                       .split(ri, rt, ri, out.high)
                       .fuse(ro, in, strips)
                       .split(e, eo, et, out.columns, guard)
                       .fuse(eo, strips, strips)
                       .fuse(g, h, heads)
                       .reorder(ri, et, rt, strips, heads, b)
                       .unroll(ri);
    if (out.wide > 1) result.split(et, et, ei, out.wide).reorder(ei, ri, et).vectorize(ei);
    result.gpu_blocks(strips, heads, b).gpu_threads(et, rt);
    registers(f.inter, {f.result, et}, f.over_state, e, i, out);
    registers(f.intra, {f.result, et}, f.over_key, e, i, out);
    for (Func p : {f.inter, f.intra, f.weights, f.scores})
        p.bound_extent(g, 1).bound_extent(h, 1);  // not seen in the two as one
    f.weights.compute_at(f.result, strips)
        .store_in(MemoryType::GPUShared)
        .bound_storage(j, sizes.chunk)
        .tile(j, i, jo, io, ji, ii, 4, out.high)
        .gpu_threads(jo, io)
        .unroll(ji)
        .unroll(ii);
    f.scores.compute_at(f.weights, jo).store_in(MemoryType::Register).unroll(j).unroll(i);
    f.scores.update().reorder(j, i, f.over_key_feature.x).unroll(j).unroll(i);
}

// Powers of two are divided by shifts; for other constants Halide multiplies with 64 bits.
bool fits(const ChunkwiseSizes &sizes) {
    auto power_of_two = [](int size) { return size == 0 || (size >= 4 && (size & (size - 1)) == 0); };
    return sizes.chunk % strip == 0 && power_of_two(sizes.key) && power_of_two(sizes.value);
}

}  // namespace holdfast::gpu

namespace {
using namespace holdfast;
using gpu::Tile;

// Four columns are one load of 16 bytes; 4 x 4 sums take two such loads for every 16 products. Blocks have up to 256 threads.
// Where sizes are known at run time only, a thread is in or out as a whole: one column; and one feature of the state.
void apply(ChunkwiseFuncs &f, const ChunkwiseSizes &sizes, const Halide::Target &) {
    const int key = sizes.key, value = sizes.value;
    gpu::schedule(f, sizes, value == 0 ? Tile{64, gpu::strip, 1, 8} : Tile{std::min(value, 128), gpu::strip, 4, 4},
                  value == 0 || key == 0 ? Tile{32, 8, 1, 1} : Tile{std::min(value, 64), std::min(key, 32), 4, 4});
}

bool matches(const Halide::Target &t, const ChunkwiseSizes &s) { return t.has_gpu_feature() && gpu::fits(s); }

const bool added = Schedule<ChunkwiseFuncs, ChunkwiseSizes>::add({"gpu", 5, matches, apply});
}  // namespace
