// x86 with AVX-512 or AVX2: two register-tiled products per chunk, rows of the state by phi of the queries and values by phi of
// the keys. Rows, time, stand innermost on the left of every product; its right side is read as it lies. phi is formed a tile
// at a time, in L1. Not parallel: the runtime spreads heads and columns of values over threads.
//
// One core of an Intel Xeon (Emerald Rapids), AVX-512, degree 2, 4096 tokens of 4 heads, chunks of 64, the kernel alone in
// turn with PyTorch's sgemm of 2048^3 at 160 GFLOP/s, counting D (V + 1) and the causal half of chunks. The sum over chunks
// of the least time that each took: K = V = 64 normalized in 62.3 ms, 144 GFLOP/s, 90% of sgemm; without normalization 147,
// 92%. Best whole runs on this machine, which others share: 85%, rows coming from memory late. K = V = 32: 10.4 ms, 116
// GFLOP/s; K = 16, V = 64, degree 3: 26.7 ms, 134. K = V = 128, 2048 tokens: 333 ms, 105, 80% of sgemm in the same run.
// AVX2: 70. The products take 75% of the time, at 98% of the fp32 peak: ten loads for sixteen fused multiply-adds. The
// rest: phi 5%, the state's decay and sum 4%, the chunk's own keys 3%, rows in and out 6%, sums of weights and of keys 3%.
// Tried: chunks of 96 and 128, 4% slower, as L1 then does not hold a block's phi, values and rows of keys; phi of 16 or of
// 64 rows at a time, 2%; blocks of 40, 52, 104, 160 features, two tiles of features before the next columns, transposing in
// registers: the same or less.
#include "../../generators/power.h"
#include "../schedule.h"
#include "tile.h"

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int phi_rows = 32;      // of phi of the queries that are in L1, with a block of features; so many rows of the state
constexpr int phi_features = 16;  // of phi of the keys, with all rows: two tiles or more, or it takes twice the time
constexpr int den_lanes = 4;      // of a block's sum of weights: one would wait for itself
constexpr int strip = 32;         // rows whose weights are at hand
constexpr int score_keys = 8;     // of a tile of scores; two vectors of rows

void apply(PowerFuncs &p, const PowerSizes &sizes, const Target &target) {
    Var b("b"), h("h"), g("g"), i("i"), j("j"), d("d"), f("f"), e("e"), u("u");
    Var eo("eo"), ei("ei"), io("io"), ii("ii"), it("it"), is("is"), jo("jo"), ji("ji"), fo("fo"), fi("fi"), ft("ft"),
        lane("lane");
    RVar block = p.over_block.x, group("group"), in_group("in_group");
    const int vec = target.natural_vector_size<float>();
    const int rows = tile_of(target).rows, wide = std::min(tile_of(target).columns * vec, sizes.value);

    // A product accumulated in registers for the tile that its consumer works on.
    auto tile = [&](Func product, const LoopLevel &at, const RDom &over, Var x, Var y) {
        product.compute_at(at).vectorize(x, vec).unroll(x).unroll(y);
        product.update().reorder(x, y, over.x).vectorize(x, vec).unroll(x).unroll(y);
    };

    // Sums of weights and of keys read the tiles of phi that the products do, in loops that are one: `lane` is one of many sums
    // side by side, of tokens or of the features of a block.
    p.keys_contribution.update().split(p.over_token_weight.x, group, in_group, vec);
    Func keys_lanes = p.keys_contribution.update().rfactor(in_group, lane);
    p.den_block.update().split(p.over_feature_weight.x, group, in_group, den_lanes);
    Func den_block_lanes = p.den_block.update().rfactor(in_group, lane);
    // Where loops are one, Halide does not see that their stages do one head at a time.
    for (Func sums : {keys_lanes, p.den_block, den_block_lanes}) sums.bound_storage(h, 1).bound_storage(b, 1);
    for (Func sums : {p.den_block, den_block_lanes}) sums.bound_storage(g, 1);

    // Output: state by blocks of features, each row of the state read once for all rows of a block.
    p.result.reorder(e, i, g, h, b).vectorize(e, vec);
    p.out.compute_at(p.result, h)
        .bound_extent(i, sizes.chunk)
        .split(i, is, it, strip)
        .split(it, io, ii, rows)
        .split(e, eo, ei, wide)
        .reorder(ei, ii, eo, io, is, g)
        .vectorize(ei, vec)
        .unroll(ei)
        .unroll(ii);
    p.num_inter.compute_at(p.result, h).vectorize(e, vec);
    p.num_inter.update()
        .split(i, is, it, phi_rows)
        .split(it, io, ii, rows)
        .split(e, eo, ei, wide)
        .reorder(ei, ii, eo, io, is, g, block)
        .vectorize(ei, vec)
        .unroll(ei)
        .unroll(ii);
    tile(p.num_block, {p.num_inter, eo}, p.over_feature, e, i);
    p.phi_q.compute_at(p.num_inter, is).reorder_storage(i, f).reorder(i, f).vectorize(i, vec).unroll(i);
    p.den_inter.compute_at(p.result, h).vectorize(i, vec);
    p.den_inter.update()
        .split(i, is, it, phi_rows)
        .reorder(it, is, g, block)
        .vectorize(it, vec)
        .unroll(it)
        .compute_with(p.num_inter.update(), is);
    for (Func sums : {p.den_block, den_block_lanes}) sums.compute_at(p.num_inter, is).vectorize(i, vec).unroll(i);
    p.den_block.update().reorder(i, in_group).vectorize(i, vec).unroll(i).unroll(in_group);
    den_block_lanes.unroll(lane).update().reorder(i, lane, group).vectorize(i, vec).unroll(i).unroll(lane);

    // Output: the chunk's own keys.
    tile(p.num_intra, {p.out, eo}, p.over_key, e, i);
    p.weights.compute_at(p.out, is)
        .bound_storage(j, sizes.chunk)
        .reorder_storage(i, j)
        .split(i, io, ii, 2 * vec)
        .split(j, jo, ji, score_keys)
        .reorder(ii, ji, jo, io)
        .vectorize(ii, vec)
        .unroll(ii)
        .unroll(ji);
    p.scores.reorder_storage(i, j);
    tile(p.scores, {p.weights, jo}, p.over_key_element, i, j);
    p.den_intra.compute_at(p.out, is).vectorize(i, vec);
    p.den_intra.update().reorder(i, p.over_key_weight.x).vectorize(i, vec).unroll(i);
    p.row.compute_at(p.out, is).vectorize(i, vec);

    // State. It may be that which is read: no element of it is made twice.
    const TailStrategy once = TailStrategy::GuardWithIf;
    p.state_out.split(f, fo, fi, phi_features, once)
        .split(fi, ft, fi, rows)
        .split(e, eo, ei, wide)
        .reorder(ei, fi, eo, ft, fo, h, b)
        .vectorize(ei, vec)
        .unroll(ei)
        .unroll(fi);
    tile(p.contribution, {p.state_out, eo}, p.over_token, e, f);
    p.phi_k.compute_at(p.state_out, fo).reorder_storage(j, f).reorder(j, f).vectorize(j, vec).unroll(j);
    p.keys_out.split(f, fo, fi, phi_features, once).reorder(fi, fo, h, b).vectorize(fi, vec).compute_with(p.state_out, fo);
    p.keys_contribution.compute_at(p.state_out, fo).vectorize(f, vec);
    p.keys_contribution.update().reorder(in_group, f).vectorize(f, vec).atomic().vectorize(in_group);
    keys_lanes.compute_at(p.state_out, fo).reorder_storage(lane, f).vectorize(lane);
    keys_lanes.update().reorder(lane, group, f).vectorize(lane).unroll(group);

    // Operands, and the table.
    for (Func list : p.phi.table()) list.compute_root().vectorize(f, vec);
    for (Func factor : p.phi.searched) factor.update().reorder(f, p.phi.over_bit).vectorize(f, vec);
    for (Func decay : {p.decay_steps, p.decay_rest}) {
        decay.compute_root().vectorize(i, vec);
        decay.update().reorder(i, p.over_row, h, b).vectorize(i, vec);
    }
    p.chunk_decay.compute_root();
    p.unit.compute_at(p.result, h);
    p.largest.compute_at(p.unit, i).update().atomic().vectorize(p.over_element, sizes.key);
    const int apart = sizes.chunk + vec;  // elements of some rows, or they meet in a few sets of L1
    auto transposed = [&](Func rows, Var row) {
        rows.reorder_storage(row, d).align_storage(row, apart).split(row, io, ii, vec).reorder(ii, d, io).vectorize(ii);
    };
    transposed(p.queries.compute_at(p.result, h), i);
    p.queries_decayed.compute_at(p.result, h).reorder_storage(i, d).align_storage(i, apart).reorder(i, d).vectorize(i, vec);
    p.row_decay.compute_at(p.result, h).vectorize(i, vec);
    Func key_rows = p.keys.in(p.scores);  // rows as they lie
    key_rows.compute_at(p.result, h).vectorize(d, vec);
    transposed(p.keys.compute_root(), j);
    p.keys_decayed.compute_root().reorder_storage(j, d).align_storage(j, apart).reorder(j, d).vectorize(j, vec);
    p.key_decay.compute_root().vectorize(j, vec);
    Func values = p.v.in({p.num_intra, p.contribution});
    values.compute_root().vectorize(values.args()[0], vec);
}

bool matches(const Target &t, const PowerSizes &s) {
    if (t.arch != Target::X86 || t.has_gpu_feature() || !t.has_feature(Target::AVX2)) return false;
    const int vec = t.natural_vector_size<float>();
    return s.chunk % strip == 0 && s.key > 0 && s.key % vec == 0 && s.value > 0 && s.value % (2 * vec) == 0;
}

const bool added = Schedule<PowerFuncs, PowerSizes>::add({"x86", 10, matches, apply});
}  // namespace
