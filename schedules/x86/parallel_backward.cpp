// x86 with AVX-512 or AVX2: a block of rows against one block of keys after the other, with the three gradients in one loop: five
// products of a pair, of which scores serve the sums of weights as well, where there are such, and wait for that in a strip of all
// keys of the block of rows. As in parallel.cpp, rows are what vectors of weights run over. Not parallel: the runtime spreads batch
// entries and heads over threads.
//
// One core of an AMD EPYC (Zen 4), AVX-512, degree 2 divided by the sum of weights, one head, K = V = 64, beside parallel.cpp in
// one run: T 256 in 0.42 ms, 2.4 times as long; T 1024 in 4.1 ms, 2.4 times; T 4096 in 56 ms, 2.35 times, 96 GFLOP/s of useful
// operations. K = V = 128, T 1024: 8.2 ms, 2.3 times. Degree 1, and not divided, take as long. For what is not wanted: of the queries
// alone 1.6 times the forward's time, of the values alone 1.1.
#include "../../generators/parallel_backward.h"
#include "../schedule.h"
#include "tile.h"

namespace {
using namespace Halide;
using namespace holdfast;

void apply(ParallelBackwardFuncs &f, const ParallelSizes &sizes, const Target &target) {
    Var b("b"), h("h"), g("g"), c("c"), n("n"), i("i"), j("j"), d("d"), e("e");
    Var xo("xo"), xi("xi"), yo("yo"), yi("yi");
    const int vec = target.natural_vector_size<float>();
    const int tile = tile_of(target).rows, wide = tile_of(target).columns * vec;
    const TailStrategy guard = TailStrategy::GuardWithIf, round = TailStrategy::RoundUp;
    ParallelWeights &w = f.f.weights;

    // A product accumulated in registers for the tile that its consumer works on.
    auto registers = [&](Func p, const LoopLevel &at) {
        Var x = p.args()[0], y = p.args()[1];
        p.compute_at(at).bound_extent(x, wide).bound_extent(y, tile).vectorize(x, vec).unroll(x).unroll(y);
        p.update().reorder(x, y, p.rvars()[0]).vectorize(x, vec).unroll(x).unroll(y);
    };
    // The consumer, weights of rows i on keys j.
    auto weights = [&](Func of_pair, const LoopLevel &at, Func product) {
        of_pair.compute_at(at).split(j, yo, yi, tile).split(i, xo, xi, wide).reorder(xi, yi, xo, yo);
        of_pair.vectorize(xi, vec).unroll(xi).unroll(yi).never_partition_all();
        registers(product, {of_pair, xo});
    };
    // Transposed: x(d,i,..) for products whose vectors are rows i.
    auto columns = [&](Func x, Func user, const LoopLevel &at) {
        Func by_row = x.in(user);
        Var feature = x.args()[0];
        by_row.compute_at(at).reorder_storage(i, feature).split(feature, xo, xi, 4, round).reorder(xi, i, xo);
        by_row.vectorize(xi).unroll(i, vec).never_partition_all();
    };

    for (Func decay : {f.f.decay_steps, f.f.decay_rest}) {
        decay.compute_root().vectorize(i, vec);
        decay.update().reorder(i, f.f.over_row, n, h, b).vectorize(i, vec);
    }
    // Rows of the caller's tensors are H * D apart, as in parallel.cpp. Copies of all of them in fp32 would be an eighth of what
    // tensors of 16 bits take, of 8 heads and two threads: of these a block is copied for each pair, which takes 5% longer (fp32 4
    // to 9%).
    const bool by_pairs = f.result_dq.type().bits() == 16;
    if (!by_pairs) {
        f.f.k.in().compute_root().vectorize(d, vec, round);
        f.f.v.in().compute_root().vectorize(e, vec, round);
    }

    // The sums over pairs, in one loop over blocks of rows and, inside it, blocks of keys.
    const std::pair<Func, RDom> sums[] = {{f.dq, f.over_dq}, {f.dk, f.over_dk}, {f.dv, f.over_dv}};
    for (const auto &[sum, over] : sums) {
        Func of_pairs = sum;
        Var x = sum.args()[0], y = sum.args()[1];
        of_pairs.compute_root().align_bounds(x, wide).bound_extent(y, sizes.block).vectorize(x, vec);
        of_pairs.update()
            .split(x, xo, xi, wide)
            .split(y, yo, yi, tile)
            .reorder(xi, yi, xo, yo, over.x, over.y, over.z, over.w, h, b)
            .vectorize(xi, vec)
            .unroll(xi)
            .unroll(yi)
            .never_partition_all();
        if (sum.name() != f.dq.name()) of_pairs.update().compute_with(f.dq.update(), over.y);
    }
    const RDom &over = f.over_gates;
    f.ddecay.compute_root().update().reorder(over.x, over.y, over.z, over.w, h, b).compute_with(f.dq.update(), over.y);
    const LoopLevel pair(f.dq, f.over_dq.y), rows(f.dq, f.over_dq.z);
    if (by_pairs) {
        Func keys_of_scores = f.f.k.in(f.pair.scores), keys = f.f.k.in(f.dqueries), values = f.f.v.in(f.dweights);
        keys_of_scores.compute_at(f.pair.scores.in(), n).vectorize(d, vec, round);
        keys.compute_at(pair).vectorize(d, vec, round), values.compute_at(pair).vectorize(e, vec, round);
    }
    registers(f.dqueries, {f.dq, xo}), registers(f.dkeys, {f.dk, xo}), registers(f.dvalues, {f.dv, xo});
    weights(f.dscores, pair, f.dweights);
    f.pair.weights.in(f.dvalues).compute_at(pair).vectorize(i, vec);
    f.ddecay_of_row.compute_at(pair).vectorize(i, vec).update().reorder(i, f.over_key).vectorize(i, vec).unroll(i);
    f.ddecay_of_pair.compute_at(pair).update().atomic().vectorize(f.over_row, vec);

    // Of a block of rows.
    w.unit.compute_root().vectorize(i, vec);
    w.queries.clone_in(f.q_dq);  // inlined there
    w.queries.compute_at(rows).vectorize(d, vec);
    f.dnum.compute_at(rows).vectorize(e, vec);
    columns(w.queries, f.pair.scores, rows), columns(f.dnum, f.dweights, rows);
    w.decay_before.compute_at(rows);
    w.row_decay.compute_at(rows).vectorize(i, vec);
    w.mask.compute_at(rows).vectorize(i, vec);
    w.key_decay.compute_at(rows).vectorize(j, vec);
    weights(f.pair.scores.in(), rows, f.pair.scores);
    const Expr blocks =
        f.over_dq.y.extent();  // memory for the last block of rows from the first on: a workspace keeps each size
    f.pair.scores.in().bound_storage(n, blocks), w.key_decay.bound_storage(n, blocks);
    f.sum.compute_at(rows).vectorize(i, vec).update().reorder(i, f.over_block).vectorize(i, vec);
    f.pair.sum.compute_at(f.sum, f.over_block).vectorize(i, vec);
    f.pair.sum.update().reorder(i, f.pair.over_summed_key.x).vectorize(i, vec).unroll(i);
    f.out_dout.compute_at(rows);
    for (Func row : {f.factor, f.dden}) row.compute_at(rows).vectorize(i, vec);

    // Log decays.
    for (Func sum : {f.q_dq, f.k_dk})
        sum.compute_root().vectorize(i, vec).update().atomic().vectorize(sum.rvars()[0], vec, guard);
    f.ddecay_after.compute_root().vectorize(i, vec).update().reorder(i, f.over_after, c, h, b).vectorize(i, vec);
    f.ddecay_before.compute_root(), f.ddecay_of_later.compute_root();

    const std::pair<Func, RDom> results[] = {
        {f.result_dq, f.over_result_dq}, {f.result_dk, f.over_result_dk}, {f.result_dv, f.over_result_dv}};
    for (const auto &[result, over] : results) {
        Func rows = result;
        rows.update().reorder(result.args()[0], over.x, over.y).vectorize(result.args()[0], vec, guard).never_partition_all();
    }
}

bool matches(const Target &t, const ParallelSizes &s) {
    if (t.arch != Target::X86 || t.has_gpu_feature() || !t.has_feature(Target::AVX2)) return false;
    return s.block % (tile_of(t).columns * t.natural_vector_size<float>()) == 0;
}

const bool added = Schedule<ParallelBackwardFuncs, ParallelSizes>::add({"x86", 10, matches, apply});
}  // namespace
