// Every GPU API that Halide has, any sizes. A call is one chunk of all heads and batch entries. Each stage that others read is a kernel
// of its own with a thread per row, or per value feature, and what is summed up in registers; they go through device memory, phi and
// its gradient too, which are of the size of the state. What goes from that gradient to elements is added up by one thread for each
// row.
#include "../../generators/power_backward.h"
#include "../schedule.h"

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int threads = 64;  // along value features
constexpr int high = 8;      // of a product, in the registers of a thread

void apply(PowerBackwardFuncs &w, const PowerSizes &sizes, const Target &) {
    Var b("b"), h("h"), g("g"), i("i"), j("j"), d("d"), f("f"), e("e"), u("u");
    Var eo("eo"), et("et"), jo("jo"), ji("ji"), fo("fo"), fi("fi"), heads("heads");
    RVar blocks("blocks"), in_block("in_block"), outer("outer"), thread("thread");
    PowerFuncs &p = w.p;
    const TailStrategy guard = TailStrategy::GuardWithIf;

    auto in_registers = [&](Func stage, const LoopLevel &at) {
        stage.compute_at(at).store_in(MemoryType::Register);
        for (Var axis : stage.args())  // of one head, which bounds inference does not see through a fused loop
            if (axis.name() == "g" || axis.name() == "h" || axis.name() == "b") stage.bound_extent(axis, 1);
    };
    // A thread per row, a block for each of the other axes. Query heads of all groups lie along one axis of the grid.
    auto grid = [&](Func kernel, Var row) {
        kernel.compute_root().bound(row, 0, sizes.chunk);
        std::vector<Var> axes;
        bool of_queries = false;
        for (Var axis : kernel.args()) {
            if (axis.name() == "g") of_queries = true;
            if (axis.name() != row.name() && axis.name() != "g" && axis.name() != "h" && axis.name() != "b")
                axes.push_back(axis);
        }
        if (of_queries) kernel.fuse(g, h, heads);
        axes.push_back(of_queries ? heads : h), axes.push_back(b);
        return axes;
    };
    auto by_rows = [&](Func kernel, Var row) {
        const std::vector<Var> axes = grid(kernel, row);
        if (axes.size() == 3)
            kernel.reorder_storage(row, axes[0]).reorder(row, axes[0], axes[1], b).gpu_blocks(axes[0], axes[1], b);
        else
            kernel.reorder(row, axes[0], b).gpu_blocks(axes[0], b);
        kernel.gpu_threads(row);
    };
    auto sum_by_rows = [&](Func sum, Var row) {
        Func kernel = sum.in();
        by_rows(kernel, row);
        in_registers(sum, {kernel, row});
    };

    // The table, gates and operands, as in power.cpp.
    for (Func list : p.phi.table()) list.compute_root().gpu_tile(f, fo, fi, 64, guard);
    for (Func factor : p.phi.searched)
        factor.update().split(f, fo, fi, 64, guard).reorder(p.phi.over_bit, fi, fo).gpu_blocks(fo).gpu_threads(fi);
    for (Func decay : {p.decay_steps, p.decay_rest}) sum_by_rows(decay, i);
    by_rows(p.unit, i);
    in_registers(p.largest, {p.unit, i});
    for (Func stage : {p.queries, p.queries_decayed, p.phi_q}) by_rows(stage, i);
    for (Func stage : {p.keys, p.keys_decayed, p.phi_k}) by_rows(stage, j);
    by_rows(p.v.in({w.dweights, w.dphi_k}), p.v.args()[1]);

    // Numerators and denominators.
    by_rows(w.row, i);
    for (Func sum : {w.den_inter, w.den_intra}) in_registers(sum, {w.row, i});
    in_registers(w.den_block, {w.den_inter, w.over_block.x});
    by_rows(w.dden, i);
    in_registers(w.from_out, {w.dden, i});
    w.dnum.compute_root()
        .bound(i, 0, sizes.chunk)
        .fuse(g, h, heads)
        .split(e, eo, et, threads, guard)
        .reorder(et, eo, i, heads, b)
        .gpu_blocks(i, heads, b)
        .gpu_threads(et);
    by_rows(w.dnum.in({w.dphi_q, w.dweights}), i);

    // The chunk's own keys.
    for (Func sum : {p.scores, w.dweights, w.dqueries}) sum_by_rows(sum, i);
    for (Func stage : {p.weights, w.dscores}) by_rows(stage, i);
    sum_by_rows(w.dkeys, j);

    // Through phi.
    auto through_phi = [&](Func stage, const RDom &over, Func dphi, Var row) {
        Func kernel = dphi.in();
        kernel.split(f, fo, fi, high, guard);
        std::vector<Var> axes = grid(kernel, row);
        kernel.reorder_storage(row, f).reorder(fi, row, fo, axes[1], b).unroll(fi).gpu_blocks(fo, axes[1], b).gpu_threads(row);
        in_registers(dphi, {kernel, row});
        dphi.bound_extent(f, high).unroll(f);
        for (int n = 0; n < dphi.num_update_definitions(); n++) {
            std::vector<VarOrRVar> order = {f};
            for (const RVar &r : dphi.rvars(n)) order.push_back(r);
            dphi.update(n).reorder(order).unroll(f);
        }
        by_rows(stage, row);
        Stage update = stage.update();
        const bool of_queries = axes[1].name() == heads.name();
        if (of_queries) update.fuse(g, h, heads);
        update.reorder(over.x, over.y, row, axes[1], b).gpu_blocks(axes[1], b).gpu_threads(row);
    };
    through_phi(w.dqueries_state, w.over_factor_q, w.dphi_q, i);
    through_phi(w.dkeys_state, w.over_factor_k, w.dphi_k, j);

    // Values, and the initial state: a thread per value feature.
    w.dvalues.update(1).split(w.dvalues.rvars(1)[0], blocks, in_block, sizes.block, guard);
    Func dvalues_block = w.dvalues.update(1).rfactor(blocks, u);
    Func values = w.dvalues.in();
    values.compute_root()
        .bound(j, 0, sizes.chunk)
        .split(e, eo, et, threads, guard)
        .split(j, jo, ji, high)
        .reorder(ji, et, eo, jo, h, b)
        .unroll(ji)
        .gpu_blocks(jo, h, b)
        .gpu_threads(et);
    in_registers(w.dvalues, {values, et});
    w.dvalues.bound_extent(e, 1).bound_extent(j, high).unroll(j);
    w.dvalues.update(0).reorder(j, w.dvalues.rvars(0)[0], w.dvalues.rvars(0)[1]).unroll(j);
    w.dvalues.update(1).reorder(j, blocks).unroll(j);
    in_registers(dvalues_block, {w.dvalues, blocks});
    dvalues_block.bound_extent(e, 1).bound_extent(j, high).unroll(j);
    dvalues_block.update().reorder(j, in_block).unroll(j);

    RVar entry = w.wanted_dstate.x;
    w.dstate_in.update()
        .allow_race_conditions()
        .split(e, eo, et, threads, guard)
        .split(f, fo, fi, high, guard)
        .reorder(fi, et, eo, fo, h, entry)
        .unroll(fi)
        .gpu_blocks(fo, h, entry)
        .gpu_threads(et);
    in_registers(w.from_queries, {w.dstate_in, et});
    w.from_queries.bound_extent(e, 1).bound_extent(f, high).unroll(f);
    w.from_queries.update().reorder(f, w.from_queries.rvars(0)[0], w.from_queries.rvars(0)[1]).unroll(f);
    entry = w.wanted_dkeys.x;
    w.dkeys_in.update()
        .allow_race_conditions()
        .split(f, fo, fi, 32, guard)
        .reorder(fi, fo, h, entry)
        .gpu_blocks(fo, h, entry)
        .gpu_threads(fi);
    in_registers(w.keys_from_queries, {w.dkeys_in, fi});

    // Gates.
    sum_by_rows(w.along_row, i);
    for (Func sum : {w.along_key, w.along_end}) sum_by_rows(sum, j);
    Func along = w.along_state.in();
    along.compute_root().gpu_tile(e, eo, et, threads, guard).gpu_blocks(h, b);
    in_registers(w.along_state, {along, et});
    in_registers(w.along_block, {w.along_state, w.over_state_block.x});
    Func kept = w.kept.in();
    kept.compute_root().gpu_tile(h, jo, ji, 32, guard).gpu_blocks(b);
    in_registers(w.kept, {kept, ji});
    in_registers(w.along_keys, {kept, ji});
    in_registers(w.along_keys_block, {w.along_keys, w.over_state_block.x});
    sum_by_rows(w.dgates, i);

    // Results: a thread per element of a row. Undefined at first, so that nothing is run there; but Halide would want them in host
    // memory too.
    for (Func result : {w.result_dq, w.result_dk, w.result_dv, w.result_dlog_decay, w.dstate_in, w.dkeys_in})
        result.gpu_single_thread();
    auto result = [&](Func rows, const RDom &wanted, Var row, bool of_queries) {
        Stage update = rows.update();
        if (of_queries) update.fuse(g, h, heads);
        const Var along_heads = of_queries ? heads : h;
        update.split(wanted.x, outer, thread, threads, guard)
            .reorder(thread, outer, row, along_heads, b)
            .gpu_blocks(row, along_heads, b)
            .gpu_threads(thread);
    };
    result(w.result_dq, w.wanted_dq, i, true);
    result(w.result_dk, w.wanted_dk, j, false);
    result(w.result_dv, w.wanted_dv, j, false);
    w.result_dlog_decay.update()
        .split(w.wanted_dlog_decay.x, outer, thread, threads, guard)
        .reorder(thread, outer, h, b)
        .gpu_blocks(h, b)
        .gpu_threads(thread);
}

bool matches(const Target &t, const PowerSizes &s) { return t.has_gpu_feature() && s.chunk % high == 0 && s.chunk <= 256; }

const bool added = Schedule<PowerBackwardFuncs, PowerSizes>::add({"gpu", 5, matches, apply});
}  // namespace
