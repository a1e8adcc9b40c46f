// x86 with AVX-512 or AVX2: two register-tiled products per chunk, rows of the state by phi of the queries and values by phi of
// the keys. Rows, time, stand innermost on the left of every product; its right side is read as it lies. phi is formed a tile
// at a time, in L1. Not parallel: the runtime spreads heads and columns of values over threads.
//
// One core of an Intel Xeon (Emerald Rapids), AVX-512, degree 2, normalized, 4096 tokens of 4 heads, the kernel alone, best of many
// in turn with PyTorch's sgemm of 2048^3 at 160 GFLOP/s: K = V = 64, chunks of 128, in 68 ms: 133 GFLOP/s counting D V and the causal half
// of chunks, 83% of sgemm; without normalization 86%. K = V = 32, chunks of 64: 13.8 ms, 88 GFLOP/s. By count of instructions phi takes
// the most of the rest: two loads, two products and a store for 64 fused multiply-adds, for queries and for keys. Tried: chunks of
// 256, 113 GFLOP/s; a causal tile of 16, 125; phi of 16 rows at a time, the same or less.
#include "../../generators/power.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

struct Tile {
    int rows, columns;  // accumulators: rows * columns registers of a vector each
};
constexpr Tile avx512_tile = {8, 2};  // of 32 registers
constexpr Tile avx2_tile = {4, 2};    // of 16
constexpr int phi_rows = 32;      // of phi of the queries that are in L1, with a block of features; so many rows of the state
constexpr int phi_features = 16;  // of phi of the keys, with all rows: two tiles or more, or it takes twice the time
constexpr int strip = 32;         // rows whose weights are at hand
constexpr int score_keys = 8;     // of a tile of scores; two vectors of rows

Tile tile_of(const Target &t) { return t.has_feature(Target::AVX512_Skylake) ? avx512_tile : avx2_tile; }

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

    // phi where it is read once, for the sum of weights and of keys, is formed in registers: 1/V of the work.
    p.phi_q.clone_in(p.den_block);
    Func keys_lanes;
    p.keys_contribution.update().split(p.over_token_weight.x, group, in_group, vec);
    keys_lanes = p.keys_contribution.update().rfactor(in_group, lane);
    p.phi_k.clone_in(keys_lanes);

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
        .split(i, io, ii, 4 * vec, TailStrategy::GuardWithIf)
        .reorder(ii, io, g, p.over_block_weight.x)
        .vectorize(ii, vec)
        .unroll(ii);
    tile(p.den_block, {p.den_inter, io}, p.over_feature_weight, i, u);

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

    // State.
    p.state_out.split(f, fo, fi, phi_features)
        .split(fi, ft, fi, rows)
        .split(e, eo, ei, wide)
        .reorder(ei, fi, eo, ft, fo, h, b)
        .vectorize(ei, vec)
        .unroll(ei)
        .unroll(fi);
    tile(p.contribution, {p.state_out, eo}, p.over_token, e, f);
    p.phi_k.compute_at(p.state_out, fo).reorder_storage(j, f).reorder(j, f).vectorize(j, vec);
    p.keys_contribution.compute_at(p.keys_out, f);
    p.keys_contribution.update().atomic().vectorize(in_group);
    keys_lanes.compute_at(p.keys_out, f).vectorize(lane);
    keys_lanes.update().reorder(lane, group).vectorize(lane);

    // Operands, and the table.
    for (Func list : p.phi.table()) list.compute_root().vectorize(f, vec);
    for (Func factor : p.phi.factors) factor.update().reorder(f, p.phi.over_bit).vectorize(f, vec);
    for (Func decay : {p.decay_steps, p.decay_rest}) {
        decay.compute_root().vectorize(i, vec);
        decay.update().reorder(i, p.over_row, h, b).vectorize(i, vec);
    }
    p.chunk_decay.compute_root();
    p.unit.compute_at(p.result, h);
    p.largest.compute_at(p.unit, i).update().atomic().vectorize(p.over_element, vec, TailStrategy::GuardWithIf);
    auto transposed = [&](Func rows, Var row) {
        rows.reorder_storage(row, d).split(row, io, ii, vec).reorder(ii, d, io).vectorize(ii);
    };
    transposed(p.queries.compute_at(p.result, h), i);
    p.queries_decayed.compute_at(p.result, h).reorder_storage(i, d).reorder(i, d).vectorize(i, vec);
    p.row_decay.compute_at(p.result, h).vectorize(i, vec);
    Func key_rows = p.keys.in(p.scores);  // rows as they lie
    key_rows.compute_at(p.result, h).vectorize(d, vec);
    transposed(p.keys.compute_root(), j);
    p.keys_decayed.compute_root().reorder_storage(j, d).reorder(j, d).vectorize(j, vec);
    p.key_decay.compute_root().vectorize(j, vec);
    Func values = p.v.in({p.num_intra, p.contribution});
    values.compute_root().vectorize(values.args()[0], vec);
}

bool matches(const Target &t, const PowerSizes &s) {
    if (t.arch != Target::X86 || t.has_gpu_feature() || !t.has_feature(Target::AVX2)) return false;
    const int vec = t.natural_vector_size<float>();
    return s.chunk % (4 * vec) == 0 && s.key > 0 && s.key % vec == 0 && s.value > 0 && s.value % (2 * vec) == 0;
}

const bool added = Schedule<PowerFuncs, PowerSizes>::add({"x86", 10, matches, apply});
}  // namespace
