// Every GPU API that Halide has (Metal, OpenCL, Vulkan, and CUDA where nothing better matches), any sizes: the subset that all
// of them take. Blocks of at most 256 threads with constant extents, vectors of at most 4, at most 32 KiB of shared memory;
// no atomics, no lanes, no numbers of 64 bits, no negative index that is shifted or divided (Halide 21 shifts it as an
// unsigned one on Vulkan).
//
// One call is the whole problem: blocks go over chunks, heads and batch entries. Kernels: decay_steps, decay_rest,
// contribution, state (initial, then the scan), state_out, out; the first three and state are scratch in device memory.
#include "../../generators/chunkwise.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int strip = 32;  // rows of a chunk that a block computes

/// A block's tile of a product, and the piece of it that a thread keeps in registers.
struct Tile {
    int columns, rows;  // of a block
    int wide, high;     // of a thread; columns in one vector
};
// Four columns are one load of 16 bytes; 4 x 4 sums take two such loads for every 16 products. Blocks have up to 256 threads.
// Where sizes are known at run time only, a thread is in or out as a whole: one column; and one feature of the state.
Tile out_tile(int value) { return value == 0 ? Tile{64, strip, 1, 8} : Tile{std::min(value, 128), strip, 4, 4}; }
Tile state_tile(int key, int value) {
    return value == 0 || key == 0 ? Tile{32, 8, 1, 1} : Tile{std::min(value, 64), std::min(key, 32), 4, 4};
}

void apply(ChunkwiseFuncs &f, const ChunkwiseSizes &sizes, const Target &) {
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
    const Tile states_tile = state_tile(sizes.key, sizes.value);
    Func contribution = f.contribution.in();
    contribution.compute_root()
        .split(e, eo, et, states_tile.columns, guard)
        .split(d, dd, dt, states_tile.rows, guard)
        .fuse(eo, dd, block)
        .fuse(block, c, block);
    if (states_tile.wide * states_tile.high > 1) {
        contribution.split(et, et, ei, states_tile.wide)
            .split(dt, dt, di, states_tile.high)
            .reorder(ei, di, et, dt, block, h, b)
            .vectorize(ei)
            .unroll(di);
    }
    contribution.reorder(et, dt, block, h, b).gpu_blocks(block, h, b).gpu_threads(et, dt);
    registers(f.contribution, {contribution, et}, f.over_token, e, d, states_tile);
    f.key_decay.compute_at(contribution, block).store_in(MemoryType::GPUShared).split(j, jo, ji, 8).gpu_threads(jo, ji);

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
    const Tile rows_tile = out_tile(sizes.value);
    f.result.gpu_single_thread();  // undefined at first, so that nothing is run; but Halide would want it in host memory too
    Stage result = f.result.update(0)
                       .allow_race_conditions()  // each row belongs to one chunk: chunks.h
                       .split(row, ro, ri, strip)
                       .split(ri, rt, ri, rows_tile.high)
                       .fuse(ro, in, strips)
                       .split(e, eo, et, rows_tile.columns, guard)
                       .fuse(eo, strips, strips)
                       .fuse(g, h, heads)
                       .reorder(ri, et, rt, strips, heads, b)
                       .unroll(ri);
    if (rows_tile.wide > 1) result.split(et, et, ei, rows_tile.wide).reorder(ei, ri, et).vectorize(ei);
    result.gpu_blocks(strips, heads, b).gpu_threads(et, rt);
    registers(f.inter, {f.result, et}, f.over_state, e, i, rows_tile);
    registers(f.intra, {f.result, et}, f.over_key, e, i, rows_tile);
    for (Func p : {f.inter, f.intra, f.weights, f.scores})
        p.bound_extent(g, 1).bound_extent(h, 1);  // not seen in the two as one
    f.weights.compute_at(f.result, strips)
        .store_in(MemoryType::GPUShared)
        .bound_storage(j, sizes.chunk)
        .tile(j, i, jo, io, ji, ii, 4, 4)
        .gpu_threads(jo, io)
        .unroll(ji)
        .unroll(ii);
    f.scores.compute_at(f.weights, jo).store_in(MemoryType::Register).unroll(j).unroll(i);
    f.scores.update().reorder(j, i, f.over_key_feature.x).unroll(j).unroll(i);
}

// Powers of two are divided by shifts; for other constants Halide multiplies with 64 bits.
bool fits(int size) { return size == 0 || (size >= 4 && (size & (size - 1)) == 0); }

bool matches(const Target &t, const ChunkwiseSizes &s) {
    return t.has_gpu_feature() && s.chunk % strip == 0 && fits(s.key) && fits(s.value);
}

const bool added = Schedule<ChunkwiseFuncs, ChunkwiseSizes>::add({"gpu", 5, matches, apply});
}  // namespace
