// Every GPU API that Halide has, under the limits of chunkwise.cpp. A block of threads has a strip of rows: it goes over the
// features of the initial state, and over the blocks of keys before them, with phi or the weights of the strip on one of those, and
// what they have added so far, in shared memory. Sums of weights are a kernel of their own, a thread for each row, which has the
// scores once more. Loops over what may be absent, and over the queries that share a key, are on the host: what is not there is not
// launched. A block of rows is one strip. Splits round up, and never move the last piece inwards: it would begin before the block.
#include "../../generators/parallel.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int strip = 32;  // rows
constexpr TailStrategy guard = TailStrategy::GuardWithIf, round = TailStrategy::RoundUp;

/// A block's tile of a product, and the piece of it that a thread keeps in registers.
struct Tile {
    int columns;     // of a block
    int wide, high;  // of a thread; columns in one vector
};
// As in chunkwise.cpp. 128 columns of what has been added are 16 KiB of shared memory, the weights on 32 keys 4 KiB.
Tile out_tile(int value) { return value == 0 ? Tile{64, 1, 8} : Tile{std::min(value, 128), 4, 4}; }

void apply(ParallelFuncs &f, const ParallelSizes &sizes, const Target &) {
    Var b("b"), h("h"), g("g"), c("c"), n("n"), i("i"), j("j"), d("d"), e("e"), s("s"), t("t");
    Var eo("eo"), ei("ei"), et("et"), doo("do"), di("di"), jo("jo"), ji("ji"), io("io"), ii("ii"), to("to"), ti("ti"),
        block("block");
    Var co("co"), ci("ci"), fo("fo"), fi("fi"), feature = f.phi.weight.args()[0];
    const int C = sizes.block;

    /// A tile of weights that all threads of a block make together.
    auto weights = [&](Func w, Func scores, const RDom &over, const LoopLevel &at) {
        w.compute_at(at)
            .store_in(MemoryType::GPUShared)
            .bound_extent(j, C)
            .bound_extent(i, strip)
            .tile(j, i, jo, io, ji, ii, 4, 4, round)
            .gpu_threads(jo, io)
            .unroll(ji)
            .unroll(ii);
        scores.compute_at(w, jo).store_in(MemoryType::Register).unroll(j).unroll(i);
        scores.update().reorder(j, i, over.x).unroll(j).unroll(i);
    };

    // The table of phi, as in power.cpp.
    for (Func list : f.phi.table()) list.compute_root().gpu_tile(feature, fo, fi, 64, guard);
    for (Func factor : f.phi.searched)
        factor.update().split(feature, fo, fi, 64, guard).reorder(f.phi.over_bit, fi, fo).gpu_blocks(fo).gpu_threads(fi);

    // Gates: a thread per row; then one per block of rows, which goes back over the blocks before.
    for (Func decay : {f.decay_steps, f.decay_rest}) {
        Func rows = decay.in();
        rows.compute_root().bound(i, 0, C).gpu_blocks(n, h, b).gpu_threads(i);
        decay.compute_at(rows, i).store_in(MemoryType::Register);
    }
    auto of_rows = [&](ParallelWeights &w) {
        w.decay_before.compute_root().split(c, co, ci, 32, guard).reorder(ci, s, co, h, b).gpu_blocks(co, h, b).gpu_threads(ci);
        w.decay_before.update()
            .split(c, co, ci, 32, guard)
            .reorder(w.over_distance, ci, co, h, b)
            .gpu_blocks(co, h, b)
            .gpu_threads(ci);
        w.unit.compute_root().bound(i, 0, C).reorder(i, c, h, b, g).gpu_blocks(c, h, b).gpu_threads(i);
        // The sums of a row, of all of its weights, by its thread, which has four of them at a time.
        w.factor.compute_root()
            .bound(i, 0, C)
            .split(i, io, ii, strip)
            .fuse(io, c, block)
            .reorder(ii, block, h, b, g)
            .gpu_blocks(block, h, b)
            .gpu_threads(ii);
        w.past_sum.compute_at(w.factor, ii).store_in(MemoryType::Register);
        w.initial_block_sum.compute_at(w.past_sum, w.over_initial_block.x).store_in(MemoryType::Register);
        auto sum_of_keys = [&](Func sum, const LoopLevel &at, const RDom &over, Func scores, const RDom &over_feature) {
            RVar four("four"), key("key");
            sum.compute_at(at).store_in(MemoryType::Register).update().split(over.x, four, key, 4).unroll(key);
            scores.compute_at(sum, four).store_in(MemoryType::Register).unroll(j);
            scores.update().reorder(j, over_feature.x).unroll(j);
        };
        sum_of_keys(w.past_block_sum, {w.past_sum, w.over_past_block}, w.over_summed_key, w.past_scores,
                    w.over_past_key_feature);
        sum_of_keys(w.own_sum, {w.factor, ii}, w.over_summed_own_key, w.own_scores, w.over_own_key_feature);
    };

    // Out. Its own copies of the weights: those of the sums are in another kernel.
    Func phi = f.weights.phi;
    phi.clone_in(f.weights.initial_block_sum);  // is not stored there
    Func past_weights = f.weights.past.clone_in(f.past_block), past_scores = f.weights.past_scores.clone_in(past_weights);
    Func own_weights = f.weights.own.clone_in(f.own), own_scores = f.weights.own_scores.clone_in(own_weights);
    Func key_decay = f.weights.key_decay.clone_in(past_weights);
    for (ParallelWeights *w : {&f.weights, &f.shown}) of_rows(*w);
    const Tile tile = out_tile(sizes.value);
    RVar row = f.over_result.x, in = f.over_result.y, ro("ro"), ri("ri"), rt("rt"), rows("rows");
    f.result.gpu_single_thread();  // undefined at first, so that nothing is run; but Halide would want it in host memory too
    Stage result = f.result.update(0)
                       .allow_race_conditions()  // each row is written once
                       .split(row, ro, ri, strip)
                       .split(ri, rt, ri, tile.high)
                       .fuse(ro, in, rows)
                       .split(e, eo, et, tile.columns, guard)
                       .fuse(eo, rows, rows)
                       .reorder(ri, et, rt, rows, h, b, g)
                       .unroll(ri);
    if (tile.wide > 1) result.split(et, et, ei, tile.wide).reorder(ei, ri, et).vectorize(ei);
    result.gpu_blocks(rows, h, b).gpu_threads(et, rt);
    auto registers = [&](Func p, const LoopLevel &at, const std::vector<VarOrRVar> &over) {
        p.compute_at(at)
            .store_in(MemoryType::Register)
            .bound_extent(e, tile.wide)
            .bound_extent(i, tile.high)
            .bound_extent(c, 1);
        std::vector<VarOrRVar> order = {e, i};
        order.insert(order.end(), over.begin(), over.end());
        p.update().reorder(order);
        if (tile.wide > 1) p.vectorize(e), p.update().vectorize(e);
        p.unroll(i), p.update().unroll(i);
    };
    registers(f.own, {f.result, et}, {f.over_own_key.x});
    weights(own_weights, own_scores, f.weights.over_own_key_feature, {f.result, rows});
    f.past.compute_at(f.result, rows)
        .store_in(MemoryType::GPUShared)
        .bound_extent(i, strip)
        .bound_storage(e, tile.columns);  // so that each has one place in shared memory (barriers.cpp)
    auto threads = [&](Stage x) {
        x.split(i, io, ii, tile.high, round).unroll(ii);
        if (tile.wide > 1)
            x.split(e, et, ei, tile.wide, round).reorder(ei, ii, et, io).vectorize(ei);
        else
            x.split(e, et, ei, 1, round).reorder(ei, ii, et, io);
        x.gpu_threads(et, io);
    };
    threads(f.past);
    threads(f.past.update(0).reorder(e, i, f.weights.over_initial_block.x, f.weights.over_initial_block.y));
    threads(f.past.update(1).reorder(e, i, f.weights.over_past_block));
    phi.compute_at(f.past, f.weights.over_initial_block.x)
        .store_in(MemoryType::GPUShared)
        .bound_storage(j, C)
        .bound_extent(i, strip)
        .split(j, jo, ji, 4, round)
        .reorder(ji, i, jo)
        .gpu_threads(i, jo);
    registers(f.initial_block, {f.past, et}, {f.over_feature.x});
    registers(f.past_block, {f.past, et}, {f.over_past_key.x});
    const LoopLevel keys(f.past, f.weights.over_past_block);
    past_weights.bound_storage(n, 1);
    weights(past_weights, past_scores, f.weights.over_past_key_feature, keys);
    key_decay.compute_at(keys)
        .store_in(MemoryType::GPUShared)
        .bound_storage(n, 1)
        .bound_storage(j, C)
        .split(j, jo, ji, 8, round)
        .gpu_threads(jo, ji);

    // Weights that are written: a block of rows against a block of keys.
    Var column = f.weights_out.args()[0];
    f.weights_out.split(column, jo, ji, 32, guard)
        .split(t, to, ti, 8, guard)
        .reorder(ji, ti, jo, to, h, s, g, b)
        .gpu_blocks(jo, to, h)
        .gpu_threads(ji, ti);
    RVar key_block = f.over_weights.z, eight("eight"), row_in("row_in"), pieces("pieces");
    f.weights_out.update()
        .allow_race_conditions()  // each element is written once
        .split(f.over_weights.y, eight, row_in, 8)
        .fuse(eight, key_block, pieces)
        .reorder(f.over_weights.x, row_in, pieces, f.over_weights.w, h, s, g, b)
        .gpu_blocks(pieces, f.over_weights.w, h)
        .gpu_threads(f.over_weights.x, row_in);
    f.shown_scores.compute_at(f.weights_out, f.over_weights.x).store_in(MemoryType::Register);

    // The final state: a thread per element.
    Func before = f.end_decay_before;
    before.compute_root().split(h, co, ci, 32, guard).reorder(s, ci, co, b).gpu_blocks(co, b).gpu_threads(ci);
    before.update().split(h, co, ci, 32, guard).reorder(f.over_end_distance, ci, co, b).gpu_blocks(co, b).gpu_threads(ci);
    f.end_decay.compute_root().split(h, co, ci, 32, guard).gpu_blocks(co, b).gpu_threads(ci);
    f.end_key_decay.compute_root().bound(j, 0, C).gpu_blocks(n, h, b).gpu_threads(j);
    auto state = [&](Stage x) {
        x.split(e, eo, ei, 32, guard)
            .split(d, doo, di, 8, guard)
            .fuse(eo, doo, block)
            .reorder(ei, di, block, h, b)
            .gpu_blocks(block, h, b)
            .gpu_threads(ei, di);
    };
    state(f.state_in.compute_root());
    state(f.state_in.update().reorder(f.over_initial, e));
    state(f.state_out.reorder(e, d, h, b, s));
    f.contribution.compute_at(f.state_out, ei).store_in(MemoryType::Register);
    f.contribution_block.compute_at(f.contribution, f.over_block).store_in(MemoryType::Register);
    auto sums = [&](Stage x) { x.split(d, doo, di, 32, guard).gpu_blocks(doo, h, b).gpu_threads(di); };
    sums(f.keys_in.compute_root());
    sums(f.keys_in.update().reorder(f.over_initial, d));
    sums(f.keys_out.reorder(d, h, b, s));
    f.keys_contribution.compute_at(f.keys_out, di).store_in(MemoryType::Register);
    f.keys_block.compute_at(f.keys_contribution, f.over_keys_block).store_in(MemoryType::Register);
}

// Powers of two are divided by shifts; for other constants Halide multiplies with 64 bits.
bool fits(int size) { return size == 0 || (size >= 4 && (size & (size - 1)) == 0); }

bool matches(const Target &t, const ParallelSizes &s) {
    return t.has_gpu_feature() && s.block == strip && fits(s.key) && fits(s.value);
}

const bool added = Schedule<ParallelFuncs, ParallelSizes>::add({"gpu", 5, matches, apply});
}  // namespace
