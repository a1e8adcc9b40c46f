// Every GPU API that Halide has, any sizes, under the limits of chunkwise.cpp. A call is one chunk of all heads and batch entries;
// blocks go over blocks of features too. Kernels: index, weight (the table), decay_steps, decay_rest, unit, queries,
// queries_decayed, keys, keys_decayed, num_block, den_inter, out, state_out, keys_out; all but the last three are scratch in
// device memory.
#include "../../generators/power.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int strip = 32;  // rows of a chunk that a block computes

// All stages of a kernel share its threads, as many along each axis as the stage that wants the most: 64 x 4, or 32 x 8.

/// A block's tile of a product, and the piece of it that a thread keeps in registers. As in chunkwise.cpp.
struct Tile {
    int columns, rows;  // of a block
    int wide, high;     // of a thread; columns in one vector
};
Tile out_tile(int value) { return value == 0 ? Tile{64, strip, 1, 8} : Tile{std::min(value, 64), strip, 4, 4}; }
Tile state_tile(int value) { return value == 0 ? Tile{32, 8, 1, 1} : Tile{std::min(value, 64), 16, 4, 4}; }

void apply(PowerFuncs &p, const PowerSizes &sizes, const Target &) {
    Var b("b"), h("h"), g("g"), i("i"), j("j"), d("d"), f("f"), e("e"), u("u");
    Var eo("eo"), ei("ei"), et("et"), io("io"), ii("ii"), it("it"), fo("fo"), fi("fi"), ft("ft"), jo("jo"), ji("ji");
    Var block("block"), heads("heads");
    const TailStrategy guard = TailStrategy::GuardWithIf;

    // The piece of a product that a thread works on, in registers over the whole sum.
    auto registers = [&](Func product, const LoopLevel &at, const RDom &over, Var x, Var y, const Tile &tile) {
        product.compute_at(at).store_in(MemoryType::Register).bound_extent(x, tile.wide).bound_extent(y, tile.high);
        product.update().reorder(x, y, over.x);
        if (tile.wide > 1) product.vectorize(x), product.update().vectorize(x);
        if (tile.high > 1) product.unroll(y), product.update().unroll(y);
    };

    // The table: a thread per feature. A factor is known when its last bit is, so that each is a kernel.
    for (Func list : p.phi.table()) list.compute_root().gpu_tile(f, fo, fi, 64, guard);
    for (Func factor : p.phi.searched)
        factor.update().split(f, fo, fi, 64, guard).reorder(p.phi.over_bit, fi, fo).gpu_blocks(fo).gpu_threads(fi);

    // Operands, rows innermost: a thread per row.
    for (Func decay : {p.decay_steps, p.decay_rest}) {
        Func rows = decay.in();
        rows.compute_root().bound(i, 0, sizes.chunk).gpu_blocks(h, b).gpu_threads(i);
        decay.compute_at(rows, i).store_in(MemoryType::Register);
    }
    p.unit.compute_root().bound(i, 0, sizes.chunk).gpu_blocks(g, h, b).gpu_threads(i);
    p.largest.compute_at(p.unit, i).store_in(MemoryType::Register);
    for (Func rows : {p.queries, p.queries_decayed})
        rows.compute_root()
            .reorder_storage(i, d)
            .bound(i, 0, sizes.chunk)
            .fuse(g, h, heads)
            .reorder(i, d, heads, b)
            .gpu_blocks(d, heads, b)
            .gpu_threads(i);
    for (Func rows : {p.keys, p.keys_decayed})
        rows.compute_root()
            .reorder_storage(j, d)
            .bound(j, 0, sizes.chunk)
            .reorder(j, d, h, b)
            .gpu_blocks(d, h, b)
            .gpu_threads(j);

    // Output from the state: a block per block of features, strip of rows and tile of values, with phi in shared memory.
    const Tile tile = out_tile(sizes.value);
    p.phi_q.clone_in(p.den_block);
    Func part = p.num_block.in(p.num_inter);
    part.compute_root().bound(i, 0, sizes.chunk);
    part.split(e, eo, et, tile.columns, guard).split(i, io, it, strip).split(it, it, ii, tile.high);
    if (tile.wide > 1)
        part.split(et, et, ei, tile.wide).reorder(ei, ii, et, it, eo, io, u, g, h, b).vectorize(ei);
    else
        part.reorder(ii, et, it, eo, io, u, g, h, b);
    part.fuse(eo, io, block).fuse(block, u, block).fuse(g, h, heads).unroll(ii).gpu_blocks(block, heads, b).gpu_threads(et, it);
    // Of one head, which bounds inference does not see through the fused loop.
    for (Func product : {p.num_block, p.phi_q, p.num_inter, p.num_intra, p.weights, p.scores, p.row, p.den_intra})
        product.bound_extent(g, 1).bound_extent(h, 1);
    p.num_block.bound_extent(u, 1);
    registers(p.num_block, {part, et}, p.over_feature, e, i, tile);
    p.phi_q.compute_at(part, block)
        .store_in(MemoryType::GPUShared)
        .split(f, fo, fi, 4, guard)
        .reorder(fo, i, fi)
        .gpu_threads(i, fi);
    // The sum of weights: a thread per row.
    p.den_inter.compute_root().bound(i, 0, sizes.chunk).gpu_blocks(g, h, b).gpu_threads(i);
    p.den_inter.update().reorder(p.over_block.x, i, g, h, b).gpu_blocks(g, h, b).gpu_threads(i);
    p.den_block.compute_at(p.den_inter, p.over_block.x).store_in(MemoryType::Register);

    // Output: a block per strip of rows, its weights in shared memory.
    p.result.split(e, eo, et, tile.columns, guard).split(i, io, it, strip, guard).split(it, it, ii, tile.high);
    if (tile.wide > 1)
        p.result.split(et, et, ei, tile.wide).reorder(ei, ii, et, it, eo, io, g, h, b).vectorize(ei);
    else
        p.result.reorder(ii, et, it, eo, io, g, h, b);
    p.result.fuse(eo, io, block).fuse(g, h, heads).gpu_blocks(block, heads, b).gpu_threads(et, it);
    p.num_inter.compute_at(p.result, et).store_in(MemoryType::Register);
    p.num_inter.update().reorder(e, i, p.over_block.x);
    if (tile.wide > 1) p.num_inter.vectorize(e), p.num_inter.update().vectorize(e);
    if (tile.high > 1) p.num_inter.unroll(i), p.num_inter.update().unroll(i);
    p.num_inter.bound_extent(e, tile.wide).bound_extent(i, tile.high);
    registers(p.num_intra, {p.result, et}, p.over_key, e, i, tile);
    p.weights.compute_at(p.result, block)
        .store_in(MemoryType::GPUShared)
        .bound_extent(i, strip)
        .bound_storage(j, sizes.chunk)
        .tile(j, i, jo, io, ji, ii, 2, 8)
        .gpu_threads(jo, io)
        .unroll(ji)
        .unroll(ii);
    p.scores.compute_at(p.weights, jo).store_in(MemoryType::Register).unroll(j).unroll(i);
    p.scores.update().reorder(j, i, p.over_key_element.x).unroll(j).unroll(i);
    p.row.compute_at(p.result, block).store_in(MemoryType::GPUShared).bound_extent(i, strip).gpu_threads(i);
    p.den_intra.compute_at(p.row, i).store_in(MemoryType::Register);

    // State.
    const Tile states = state_tile(sizes.value);
    p.phi_k.clone_in(p.keys_contribution);
    p.state_out.split(e, eo, et, states.columns, guard).split(f, fo, ft, states.rows, guard);
    if (states.wide > 1)
        p.state_out.split(et, et, ei, states.wide)
            .split(ft, ft, fi, states.high)
            .reorder(ei, fi, et, ft, eo, fo, h, b)
            .vectorize(ei);
    else
        p.state_out.reorder(et, ft, eo, fo, h, b);
    p.state_out.fuse(eo, fo, block).gpu_blocks(block, h, b).gpu_threads(et, ft);
    registers(p.contribution, {p.state_out, et}, p.over_token, e, f, states);
    p.phi_k.compute_at(p.state_out, block)
        .store_in(MemoryType::GPUShared)
        .bound_extent(f, states.rows)
        .split(j, jo, ji, 16)
        .reorder(jo, ji, f)
        .gpu_threads(ji, f);
    p.keys_out.gpu_tile(f, fo, fi, 32, guard).gpu_blocks(h, b);
    p.keys_contribution.compute_at(p.keys_out, fi).store_in(MemoryType::Register);
}

// Powers of two are divided by shifts; for other constants Halide multiplies with 64 bits.
bool fits(int size) { return size == 0 || (size >= 4 && (size & (size - 1)) == 0); }

bool matches(const Target &t, const PowerSizes &s) {
    return t.has_gpu_feature() && s.chunk % strip == 0 && s.chunk <= 256 && fits(s.key) && fits(s.value);
}

const bool added = Schedule<PowerFuncs, PowerSizes>::add({"gpu", 5, matches, apply});
}  // namespace
