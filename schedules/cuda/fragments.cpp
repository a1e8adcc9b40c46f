// Fragments as splits and fuses of loops, and the passes in their order.
#include "fragments.h"
#include "../schedule.h"
#include "lowering.h"

namespace holdfast::cuda {

/// The loops of a stage over one block's tile, innermost first: two columns, two rows (8 apart), the fragments of the warp,
/// its lanes, the warps.
struct Fragments::Loops {
    Var in_col{tag_col}, in_row{tag_row}, tile_col{"tile_col"}, tile_row{"tile_row"}, lane{"lane"}, warp{"warp"};
};

Fragments::Fragments(int cols, int rows, int warp_cols, int warp_rows)
    : cols(cols), rows(rows), warp_cols(warp_cols), warp_rows(warp_rows) {
    if (warp_cols % 8 || warp_rows % 16 || cols % warp_cols || rows % warp_rows)
        fail("Fragments", text("a tile of ", cols, " x ", rows, " in warps of ", warp_cols, " x ", warp_rows,
                               "; warps own multiples of 8 columns and 16 rows"));
}

// Lane l of a warp holds of each 8 columns x 16 rows the columns 2 (l % 4) + {0, 1} and the rows l / 4 + {0, 8}.
Fragments::Loops Fragments::split(Stage &s, const Var &col, const Var &row) const {
    const Loops l;
    Var quarter("quarter"), eighth("eighth"), warp_col("warp_col"), warp_row("warp_row");
    s.split(col, warp_col, l.tile_col, warp_cols)
        .split(l.tile_col, l.tile_col, quarter, 8)
        .split(quarter, quarter, l.in_col, 2)
        .split(row, warp_row, l.tile_row, warp_rows)
        .split(l.tile_row, l.tile_row, l.in_row, 16)
        .split(l.in_row, l.in_row, eighth, 8)
        .fuse(quarter, eighth, l.lane)
        .fuse(warp_col, warp_row, l.warp);
    return l;
}

void Fragments::elementwise(Stage s, const Var &col, const Var &row) const {
    const Loops l = split(s, col, row);
    s.reorder({l.in_col, l.in_row, l.tile_col, l.tile_row, l.lane, l.warp})
        .unroll(l.in_col)
        .unroll(l.in_row)
        .unroll(l.tile_col)
        .unroll(l.tile_row)
        .gpu_threads(l.lane, l.warp);
}

void Fragments::result(Stage s, const Var &col, const Var &row) const {
    const Loops l = split(s, col, row);
    s.reorder({l.in_col, l.in_row, l.tile_col, l.tile_row, l.lane, l.warp})
        .vectorize(l.in_col)
        .unroll(l.in_row)
        .unroll(l.tile_col)
        .unroll(l.tile_row)
        .gpu_threads(l.lane, l.warp);
}

void Fragments::store(Stage s, const Var &inner, const VarOrRVar &outer) const {
    const int threads_inner = cols / 8, threads_outer = 32 * warps() / threads_inner;
    if (rows % threads_outer) fail("Fragments", text(rows, " rows for ", threads_outer, " threads"));
    Var vectors("vectors");
    VarOrRVar thread("thread", outer.is_rvar), turn("turn", outer.is_rvar), all("all", outer.is_rvar),
        lane("lane", outer.is_rvar), warp("warp", outer.is_rvar);
    s.split(inner, vectors, inner, 8)
        .split(outer, thread, turn, rows / threads_outer)
        .reorder(inner, turn, vectors, thread)
        .fuse(vectors, thread, all)
        .split(all, warp, lane, 32)
        .reorder(inner, turn, lane, warp)
        .vectorize(inner)
        .unroll(turn)
        .gpu_threads(lane, warp);
}

void Fragments::product(Func f, const Var &col, const Var &row, const std::vector<RVar> &k, const LoopLevel &at,
                        const std::vector<VarOrRVar> &outer) const {
    if ((int)k.size() != f.num_update_definitions())
        fail(f.name(), text(k.size(), " variables of sums for ", f.num_update_definitions(), " updates"));
    keep(f, col, row, at);
    for (int update = 0; update < (int)k.size(); update++) {
        Stage s = f.update(update);
        const Loops l = split(s, col, row);
        RVar k_steps("k_steps"), k_in(tag_k);
        s.split(k[update], k_steps, k_in, 16);
        std::vector<VarOrRVar> order{l.in_col, l.in_row, k_in, l.tile_col, l.tile_row, k_steps, l.lane, l.warp};
        order.insert(order.end(), outer.begin(), outer.end());
        s.reorder(order)
            .unroll(l.tile_col)
            .unroll(l.tile_row)
            .unroll(k_steps)
            .gpu_threads(l.lane, l.warp)
            .never_partition_all();
    }
}

void Fragments::keep(Func f, const Var &col, const Var &row, const LoopLevel &at) const {
    f.compute_at(at).store_in(MemoryType::Register).bound_extent(col, cols).bound_extent(row, rows);
    elementwise(f, col, row);
}

void Fragments::share(Func f, const Var &col, const Var &row, const LoopLevel &at) const {
    const Var inner = f.args()[0];
    f.compute_at(at)
        .store_in(MemoryType::GPUShared)
        .bound_extent(col, cols)
        .bound_extent(row, rows)
        .align_storage(inner, (inner.name() == col.name() ? cols : rows) + 8);
    elementwise(f, col, row);
}

RegisterTile::RegisterTile(int cols, int rows, int thread_cols, int thread_rows)
    : cols(cols), rows(rows), thread_cols(thread_cols), thread_rows(thread_rows) {
    if (cols % thread_cols || rows % thread_rows || (cols / thread_cols) * (rows / thread_rows) % 32)
        fail("RegisterTile", text("a tile of ", cols, " x ", rows, " in threads of ", thread_cols, " x ", thread_rows,
                                  " is not made of whole warps"));
}

void RegisterTile::split(Stage s, const VarOrRVar &col, const VarOrRVar &row, const std::vector<VarOrRVar> &inside,
                         const std::vector<VarOrRVar> &outside) const {
    const bool both = col.is_rvar || row.is_rvar;
    VarOrRVar thread_col("thread_col", col.is_rvar), thread_row("thread_row", row.is_rvar), in_col("in_col", col.is_rvar),
        in_row("in_row", row.is_rvar), thread("thread", both), lane("lane", both), warp("warp", both);
    s.split(col, thread_col, in_col, thread_cols).split(row, thread_row, in_row, thread_rows);
    std::vector<VarOrRVar> order{in_col, in_row};
    order.insert(order.end(), inside.begin(), inside.end());
    order.insert(order.end(), {thread_col, thread_row});
    order.insert(order.end(), outside.begin(), outside.end());
    s.reorder(order).fuse(thread_col, thread_row, thread).split(thread, warp, lane, 32);
    s.vectorize(in_col).unroll(in_row).gpu_threads(lane, warp);
}

void RegisterTile::product(Func f, const Var &col, const Var &row, const RVar &k, int step, const LoopLevel &at,
                           const std::vector<VarOrRVar> &outer) const {
    f.compute_at(at).store_in(MemoryType::Register).bound_extent(col, cols).bound_extent(row, rows);
    split(f, col, row, {}, {});
    RVar k_steps("k_steps"), k_in("k_in");
    f.update().split(k, k_steps, k_in, step).unroll(k_in).never_partition_all();
    split(f.update(), col, row, {k_in, k_steps}, outer);
}

void RegisterTile::share(Func f, const Var &col, const Var &row, const LoopLevel &at) const {
    f.compute_at(at)
        .store_in(MemoryType::GPUShared)
        .bound_extent(col, cols)
        .bound_extent(row, rows)
        .align_storage(col, cols + 4);
    split(f, col, row, {}, {});
}

void RegisterTile::result(Stage s, const VarOrRVar &col, const VarOrRVar &row) const { split(s, col, row, {}, {}); }

void stage(Func f, int warps, const Var &inner, int inner_extent, const Var &outer, int outer_extent, const LoopLevel &at) {
    Var vectors("vectors"), rest("rest"), turn("turn"), thread("thread"), all("all"), warp("warp");
    const int vector = 16 / f.type().bytes();
    f.compute_at(at)
        .store_in(MemoryType::GPUShared)
        .bound_extent(inner, inner_extent)
        .bound_extent(outer, outer_extent)
        .align_storage(inner, inner_extent + vector)
        .split(inner, vectors, inner, vector)
        .fuse(vectors, outer, all)
        .split(all, turn, rest, 32 * warps)
        .split(rest, warp, thread, 32)
        .reorder(inner, turn, thread, warp)
        .vectorize(inner)
        .unroll(turn)
        .gpu_threads(thread, warp);
}

void add_passes(Pipeline pipeline, const Target &target) {
    Pass passes[] = {widen_bfloat16(), shift_shared(),   match_products(), pair_loads(),     privatize(),
                     lower_bfloat16(), merge_barriers(), copy_async(),     check_products(), machine_code(target)};
    for (Pass &pass : passes) pipeline.add_custom_lowering_pass(pass.release());
}

namespace {
bool matches(const Target &target) { return target.has_feature(Target::CUDA); }
const bool added = Lowering::add({100, matches, add_passes});
}  // namespace

}  // namespace holdfast::cuda
