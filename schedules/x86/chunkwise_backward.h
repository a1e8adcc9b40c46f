// What schedules of gradients on x86 have in common: products of fp32 (chunkwise_backward.cpp, which says how fast) and of pairs of
// bf16 (chunkwise_backward_bf16.cpp), both in registers.
#pragma once
#include "../../generators/chunkwise_backward.h"
#include "pairs.h"
#include "prefetch.h"
#include "tile.h"
#include "transpose.h"

#include <string>
#include <utility>
#include <vector>

namespace holdfast::x86 {

struct ChunkwiseBackwardLoops {
    static constexpr int score_columns = 16;  // narrower than other products: half of the scores are masked

    ChunkwiseBackwardFuncs &r;
    const ChunkwiseSizes &sizes;
    const bool sized;
    const int vec, rows, wide;
    const int score_rows;  // as many sums of scores as other products have
    Halide::Var xo{"xo"}, xi{"xi"}, yo{"yo"}, yi{"yi"};

    ChunkwiseBackwardLoops(ChunkwiseBackwardFuncs &r, const ChunkwiseSizes &sizes, const Halide::Target &target)
        : r(r), sizes(sizes), sized(sizes.key > 0 && sizes.value > 0), vec(target.natural_vector_size<float>()),
          rows(tile_of(target).rows), wide(tile_of(target).columns * vec), score_rows(score_columns > vec ? rows : 2 * rows) {}
    virtual ~ChunkwiseBackwardLoops() = default;

    /// The loops of update `u` of a product: x and y in registers, inside of those over its terms.
    virtual void sum(Halide::Func p, int u, const Halide::Var &x, const Halide::Var &y) const {
        std::vector<Halide::VarOrRVar> order = {x, y};
        for (const Halide::RVar &over : p.rvars(u)) order.push_back(over);
        p.update(u).reorder(order).vectorize(x, vec).unroll(x).unroll(y);
    }

    /// The loop over tiles of a product, in which rows are asked for: of a gradient during the product before it, of inputs for
    /// the next head.
    Halide::Var asking(const std::vector<std::string> &tensors, bool behind = false) const {
        return sized ? Halide::Var(ask_for(tensors, sizes.chunk, behind)) : Halide::Var("xo");
    }
    /// A product accumulated in registers for the tile that its consumer works on, a whole one also where that ends inside it.
    void tile(Halide::Func p, const Halide::LoopLevel &at, int columns, int rows) const {
        Halide::Var x = p.args()[0], y = p.args()[1];
        p.compute_at(at).bound_extent(x, columns).bound_extent(y, rows).vectorize(x, vec).unroll(x).unroll(y);
        for (int u = 0; u < p.num_update_definitions(); u++) sum(p, u, x, y);
    }
    /// Tiles of a stage of whole chunks; returns where the product behind it is accumulated.
    Halide::LoopLevel tiles(Halide::Func stage, int columns, int rows, const Halide::Var &xo = Halide::Var("xo")) const {
        Halide::Var x = stage.args()[0], y = stage.args()[1];
        stage.compute_root()
            .align_bounds(x, columns)
            .align_bounds(y, rows)
            .split(x, xo, xi, columns)
            .split(y, yo, yi, rows)
            .reorder(xi, yi, xo, yo)
            .vectorize(xi, vec)
            .unroll(xi)
            .unroll(yi);
        return Halide::LoopLevel(stage, xo);
    }
    /// A product of whole chunks; returns where it is accumulated.
    Halide::LoopLevel product(Halide::Func p, const Halide::Var &xo) const {
        const Halide::LoopLevel at = tiles(p.in(), wide, rows, xo);
        tile(p, at, wide, rows);
        return at;
    }
    Halide::Func elementwise(Halide::Func f) const { return f.compute_root().vectorize(f.args()[0], vec); }

    /// For products that read it along its second axis: turned over in registers.
    void transposed(const Halide::Func &source, const std::vector<Halide::Func> &users) const {
        Transposed columns(source, vec);
        for (const Halide::Func &user : users) replace_calls(user, source, [&](auto at) { return columns(at); });
        columns.compute_at(Halide::LoopLevel::root(), {columns.lines(), columns.lines().args()[1]});
    }

    /// Scan and scan back, whose products are of fp32; the states so that they lie along d, or along e as their gradients do.
    void scans(bool along_keys) const {
        Halide::Var e = r.f.state.args()[0], d = r.f.state.args()[1];
        if (along_keys) {
            transposed(r.f.state_in, {r.f.state});
            r.f.state.reorder_storage(d, e);
            scan(r.f.state, r.f.contribution, d, e, asking({"q"}));
        } else {
            scan(r.f.state, r.f.contribution, e, d, asking({"q"}));
        }
        scan(r.dstate, r.dstate_from_inter, e, d, asking({"dk"}));
        r.dstate_in.update(0).vectorize(r.dstate_in.args()[0], vec, Halide::TailStrategy::GuardWithIf);
    }
    /// Products of rows that lie in whole chunks; `lanes` of the results are rounded at once.
    void gradients_of_rows(int lanes) const {
        elementwise(r.f.mask);
        tile(r.dweights, tiles(r.dscores, score_columns, score_rows), score_columns, score_rows);
        product(r.dkeys_decayed, asking({"dv"}));
        const Halide::LoopLevel of_dq = product(r.dq, asking({"dq"}));
        if (r.dq_from_state.defined()) tile(r.dq_from_state, of_dq, wide, rows);
        product(r.dk, asking({"dout", "state_in"}, true));
        for (auto [result, over] : {std::make_pair(r.result_dq, r.over_dq), {r.result_dk, r.over_dk}}) {
            Halide::Var x = result.args()[0];
            result.update(0).reorder(x, over.x, over.y).vectorize(x, lanes, Halide::TailStrategy::GuardWithIf);
        }
    }
    /// dv, a strip of keys at a time, from the start of its causal tile. Returns the loop over strips, for the weights.
    Halide::LoopLevel gradient_of_values(int lanes) const {
        Halide::RVar row = r.over_dv.x, rs("rs"), ro("ro"), ri("ri");
        Halide::Var x = r.result_dv.args()[0], columns = asking({"k", "v"}, true);
        r.result_dv.update(0)
            .split(row, rs, ri, score_columns)
            .split(ri, ro, ri, rows)
            .split(x, columns, xi, wide, Halide::TailStrategy::GuardWithIf)
            .reorder(xi, ri, columns, ro, rs, r.over_dv.y)
            .vectorize(xi, lanes)
            .unroll(xi)
            .unroll(ri);
        const Halide::LoopLevel at(r.result_dv, columns);
        tile(r.dv, at, wide, rows);
        if (r.dv_from_state.defined()) tile(r.dv_from_state, at, wide, rows);
        return Halide::LoopLevel(r.result_dv, rs);
    }
    void gates() const {
        for (Halide::Func row : {r.f.row_decay, r.f.key_decay, r.f.row_steps, r.f.row_rest, r.added_product, r.dlog_decay})
            elementwise(row);
        r.f.chunk_decay.compute_root();
        for (Halide::Func product : {r.row_product, r.key_product, r.end_product})
            product.compute_root().update().atomic().vectorize(product.rvars(0)[0], vec);
        for (Halide::Func row : {r.added_product, r.dlog_decay})
            row.update().reorder(row.args()[0], row.rvars(0)[0]).vectorize(row.args()[0], vec);
        for (Halide::Func decay : {r.f.decay_steps, r.f.decay_rest}) {
            Halide::Func all = decay.in();
            Halide::Var i = all.args()[0], c = all.args()[1];
            all.compute_root().bound(i, 0, sizes.chunk).vectorize(i, vec).unroll(i);
            i = decay.args()[0];
            decay.compute_at(all, c).vectorize(i, vec).unroll(i);
            decay.update().reorder(i, r.f.over_row.x).vectorize(i, vec).unroll(i);
        }
    }

private:
    void scan(Halide::Func state, Halide::Func summed, Halide::Var x, Halide::Var y, const Halide::Var &xo) const {
        Halide::RVar over = state.rvars(1)[0];
        state.compute_root().align_bounds(x, wide).align_bounds(y, rows);
        state.update(0).vectorize(x, vec);
        state.update(1)
            .split(x, xo, xi, wide)
            .split(y, yo, yi, rows)
            .reorder(xi, yi, xo, yo, over)
            .vectorize(xi, vec)
            .unroll(xi)
            .unroll(yi);
        Halide::Var px = summed.args()[0], py = summed.args()[1];
        if (x.name() != state.args()[0].name()) std::swap(px, py);
        summed.compute_at(state, xo).reorder_storage(px, py).bound_extent(px, wide).bound_extent(py, rows).reorder(px, py);
        summed.vectorize(px, vec).unroll(px).unroll(py);
        std::vector<Halide::VarOrRVar> order = {px, py};
        for (const Halide::RVar &sum : summed.rvars(0)) order.push_back(sum);
        summed.update().reorder(order).vectorize(px, vec).unroll(px).unroll(py);
    }
};

}  // namespace holdfast::x86
