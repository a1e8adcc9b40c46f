// Every GPU API that Halide has, any sizes, under the limits of chunkwise.cpp: a kernel per stage, as in power_backward.cpp, without
// shared memory. Scores, weights and the gradients of scores, of all pairs of blocks, are T x T floats each in device memory, also
// those of keys after the rows, which nobody reads. A thread has a row, or a row and some features, and goes over the pairs; some axes
// are on the host: queries that share a key, and what may not be wanted, which is then not launched.
#include "../../generators/parallel_backward.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int block = 32;               // rows, a thread each
constexpr int features = 32, high = 4;  // of a block of threads, and of one thread, in registers
constexpr TailStrategy guard = TailStrategy::GuardWithIf;

void apply(ParallelBackwardFuncs &f, const ParallelSizes &, const Target &) {
    Var b("b"), h("h"), g("g"), c("c"), n("n"), i("i"), j("j"), s("s");
    Var xo("xo"), xt("xt"), xi("xi"), co("co"), ci("ci");
    ParallelWeights &w = f.f.weights;

    // A thread for each row of all blocks, (i, c or n, (g,) h, b), and what it adds up in registers.
    auto rows = [&](Func kernel) {
        const std::vector<Var> args = kernel.args();
        kernel.compute_root().bound(args[0], 0, block);
        if (args.size() == 5) kernel.reorder(args[0], args[1], h, b, g);
        kernel.gpu_blocks(args[1], h, b).gpu_threads(args[0]);
    };
    auto sums_of_rows = [&](Func sum) {
        Func kernel = sum.in();
        rows(kernel);
        sum.compute_at(kernel, kernel.args()[0]).store_in(MemoryType::Register);
    };
    // All pairs of blocks, a block of threads each.
    auto pairs = [&](Func kernel) {
        kernel.compute_root()
            .bound(i, 0, block)
            .bound(j, 0, block)
            .split(j, xt, xi, high)
            .reorder(xi, i, xt, n, c, h, b, g)
            .unroll(xi)
            .gpu_blocks(n, c, h)
            .gpu_threads(i, xt);
    };
    auto product_of_pairs = [&](Func product, Func kernel) {
        pairs(kernel);
        product.compute_at(kernel, i).store_in(MemoryType::Register).bound_extent(j, high).unroll(j);
        for (int u = 0; u < product.num_update_definitions(); u++) {
            std::vector<VarOrRVar> order = {j};
            for (const RVar &over : product.rvars(u)) order.push_back(over);
            product.update(u).reorder(order).unroll(j);
        }
    };

    // Gates and units, as in parallel.cpp; also of the first block, which has none before, but threads read what they do not use.
    sums_of_rows(f.f.decay_steps), sums_of_rows(f.f.decay_rest);
    w.decay_before.compute_root()
        .bound(c, 0, f.over_block.x.extent())
        .split(c, co, ci, 32, guard)
        .reorder(ci, s, co, h, b)
        .gpu_blocks(co, h, b)
        .gpu_threads(ci);
    w.decay_before.update()
        .split(c, co, ci, 32, guard)
        .reorder(w.over_distance, ci, co, h, b)
        .gpu_blocks(co, h, b)
        .gpu_threads(ci);
    rows(w.unit);

    // Pairs, and what rows have of all of them.
    product_of_pairs(f.pair.scores, f.pair.scores.in());
    pairs(f.pair.weights);
    rows(f.factor);
    f.sum.compute_at(f.factor, i).store_in(MemoryType::Register);
    f.pair.sum.compute_at(f.sum, f.over_block).store_in(MemoryType::Register);
    rows(f.dden);
    f.out_dout.compute_at(f.dden, i).store_in(MemoryType::Register);
    product_of_pairs(f.dweights, f.dscores);

    // Sums over pairs: `kept` is the block that they are of, a block of threads; `over` the others.
    auto sum = [&](Func total, Func of_pair, const RDom &pairs, const RVar &kept, const std::vector<RVar> &over,
                   bool of_queries) {
        const Var x = total.args()[0], row = total.args()[1], of_block = total.args()[2];
        total.compute_root().bound(row, 0, block).split(x, xo, xt, high, guard);
        if (of_queries)
            total.reorder(row, xt, xo, of_block, h, b, g);
        else
            total.reorder(row, xt, xo, of_block, h, b);
        total.gpu_blocks(of_block, h, b).gpu_threads(row);
        Stage update = total.update();
        update.allow_race_conditions().split(x, xo, xt, features, guard).split(xt, xt, xi, high);
        std::vector<VarOrRVar> order = {xi};
        order.insert(order.end(), over.begin(), over.end());
        for (const VarOrRVar &axis : std::vector<VarOrRVar>{row, xt, xo, kept, h, b}) order.push_back(axis);
        if (of_queries) order.push_back(pairs.w);
        order.push_back(pairs.x);
        update.reorder(order).unroll(xi).gpu_blocks(xo, kept, h).gpu_threads(row, xt);
        of_pair.compute_at(total, over.front()).store_in(MemoryType::Register).bound_extent(x, high).unroll(x);
        of_pair.update().reorder(x, of_pair.rvars(0)[0]).unroll(x);
    };
    sum(f.dq, f.dqueries, f.over_dq, f.over_dq.z, {f.over_dq.y}, true);
    sum(f.dk, f.dkeys, f.over_dk, f.over_dk.y, {f.over_dk.z, f.over_dk.w}, false);
    sum(f.dv, f.dvalues, f.over_dv, f.over_dv.y, {f.over_dv.z, f.over_dv.w}, false);

    // Gates. Of pairs a thread for each row, then for each pair; of a block of rows a thread, from key to key.
    for (Func gates : {f.q_dq, f.k_dk, f.ddecay_after}) sums_of_rows(gates);
    Func of_row = f.ddecay_of_row.in(), of_pair = f.ddecay_of_pair.in(), of_later = f.ddecay_of_later.in();
    of_row.compute_root().bound(i, 0, block).reorder(i, n, c, h, b, g).gpu_blocks(n, c, h).gpu_threads(i);
    f.ddecay_of_row.compute_at(of_row, i).store_in(MemoryType::Register);
    of_pair.compute_root().split(n, co, ci, 32, guard).reorder(ci, co, c, h, b, g).gpu_blocks(co, c, h).gpu_threads(ci);
    f.ddecay_of_pair.compute_at(of_pair, ci).store_in(MemoryType::Register);
    const RDom &pairs_of_gates = f.over_gates;
    RVar ro("ro"), rt("rt");
    f.ddecay.compute_root().split(n, co, ci, 32, guard).gpu_blocks(co, c, h).gpu_threads(ci);
    Stage sum_of_pairs = f.ddecay.update();
    sum_of_pairs.allow_race_conditions().split(pairs_of_gates.y, ro, rt, 32, guard);
    sum_of_pairs.reorder(rt, ro, pairs_of_gates.z, h, b, pairs_of_gates.w, pairs_of_gates.x);
    sum_of_pairs.gpu_blocks(ro, pairs_of_gates.z, h).gpu_threads(rt);
    f.ddecay_before.compute_root().split(n, co, ci, 32, guard).gpu_blocks(co, c, h).gpu_threads(ci);
    f.ddecay_before.update()
        .split(c, co, ci, 32, guard)
        .reorder(f.over_before, ci, co, h, b)
        .gpu_blocks(co, h, b)
        .gpu_threads(ci);
    of_later.compute_root().split(c, co, ci, 32, guard).gpu_blocks(co, h, b).gpu_threads(ci);
    f.ddecay_of_later.compute_at(of_later, ci).store_in(MemoryType::Register);

    // Results: a thread per element of some rows. Undefined at first, as in chunkwise_backward.cpp.
    auto result = [&](Func rows, const RDom &over) {
        rows.gpu_single_thread();
        Stage update = rows.update();
        update.allow_race_conditions();  // each row is written once
        if (rows.dimensions() == 3)
            return (void)update.reorder(over.x, over.y, h, b).gpu_blocks(over.y, h, b).gpu_threads(over.x);
        update.split(rows.args()[0], xo, xt, 32, guard).split(over.x, ro, rt, 8);
        if (rows.dimensions() == 5)
            update.reorder(xt, rt, xo, ro, over.y, h, b, g);
        else
            update.reorder(xt, rt, xo, ro, over.y, h, b);
        update.gpu_blocks(over.y, h, b).gpu_threads(xt, rt);
    };
    result(f.result_dq, f.over_result_dq), result(f.result_dk, f.over_result_dk), result(f.result_dv, f.over_result_dv);
    result(f.result_dlog_decay, f.over_result_dlog_decay);
}

bool matches(const Target &t, const ParallelSizes &s) {
    return t.has_gpu_feature() && s.block == block && s.key == 0 && s.value == 0;
}

const bool added = Schedule<ParallelBackwardFuncs, ParallelSizes>::add({"gpu", 5, matches, apply});
}  // namespace
