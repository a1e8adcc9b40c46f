// Tensor cores, as a schedule asks for them. The algorithm stays a plain product of plain Funcs,
//
//   scores(j, i) += q(d, i) * k(d, j)
//
// and Fragments says which lane of which warp holds which element of its result: docs/tensor-cores.md. The passes of
// lowering.h find the loops named here in the final IR and replace them, or stop the build and say why not.
#pragma once
#include "Halide.h"
#include <vector>

namespace holdfast::cuda {

/// A block's tile of cols x rows results, of which each warp owns warp_cols x warp_rows: multiples of 8 columns and 16 rows,
/// as mma.sync.m16n8k16 has them. A Func that is used by rows in one product and by columns in another is declared with `col`
/// and `row` exchanged in one of the two.
class Fragments {
public:
    const int cols, rows, warp_cols, warp_rows;

    Fragments(int cols, int rows, int warp_cols, int warp_rows);
    int warps() const { return (cols / warp_cols) * (rows / warp_rows); }

    /// f(col, row, ...) += a(row, k) * b(k, col), each update of f, sums in registers. `k` has the sum's variable of each update
    /// in turn, `at` is the loop over blocks, `outer` are loops over parts of the sum that stay outside (staging).
    void product(Halide::Func f, const Halide::Var &col, const Halide::Var &row, const std::vector<Halide::RVar> &k,
                 const Halide::LoopLevel &at, const std::vector<Halide::VarOrRVar> &outer = {}) const;

    /// A Func of products, element by element, kept in registers by the lanes that own it.
    void keep(Halide::Func f, const Halide::Var &col, const Halide::Var &row, const Halide::LoopLevel &at) const;

    /// The same, 16 bits wide and in shared memory, for products that read it in another orientation.
    void share(Halide::Func f, const Halide::Var &col, const Halide::Var &row, const Halide::LoopLevel &at) const;

    /// The result of a kernel: each lane stores what it owns, two columns at a time.
    void result(Halide::Stage stage, const Halide::Var &col, const Halide::Var &row) const;

    /// The same, where it is a copy of a Func in shared memory (share): all warps store rows, 8 elements at a time.
    void store(Halide::Stage stage, const Halide::Var &inner, const Halide::VarOrRVar &outer) const;

private:
    struct Loops;
    Loops split(Halide::Stage &stage, const Halide::Var &col, const Halide::Var &row) const;
    void elementwise(Halide::Stage stage, const Halide::Var &col, const Halide::Var &row) const;
};

/// A block's tile of cols x rows results without tensor cores: each thread owns thread_cols x thread_rows of them, in registers
/// over the whole sum, and multiplies them out one by one (FFMA). Columns are consecutive in memory in what is read and stored.
class RegisterTile {
public:
    const int cols, rows, thread_cols, thread_rows;

    RegisterTile(int cols, int rows, int thread_cols, int thread_rows);
    int warps() const { return (cols / thread_cols) * (rows / thread_rows) / 32; }

    /// As those of Fragments; `k` is summed in steps of `step`, unrolled.
    void product(Halide::Func f, const Halide::Var &col, const Halide::Var &row, const Halide::RVar &k, int step,
                 const Halide::LoopLevel &at, const std::vector<Halide::VarOrRVar> &outer = {}) const;
    void share(Halide::Func f, const Halide::Var &col, const Halide::Var &row, const Halide::LoopLevel &at) const;
    void result(Halide::Stage stage, const Halide::VarOrRVar &col, const Halide::VarOrRVar &row) const;

private:
    void split(Halide::Stage stage, const Halide::VarOrRVar &col, const Halide::VarOrRVar &row,
               const std::vector<Halide::VarOrRVar> &inside, const std::vector<Halide::VarOrRVar> &outside) const;
};

/// inner x outer elements in shared memory, filled by `warps` warps, each thread 16 bytes at a time: by cp.async where it is a
/// copy. Rows are padded by 16 bytes, with which ldmatrix meets no bank conflict.
void stage(Halide::Func f, int warps, const Halide::Var &inner, int inner_extent, const Halide::Var &outer, int outer_extent,
           const Halide::LoopLevel &at);

/// Adds the passes to a pipeline. They do nothing where there is nothing to do.
void add_passes(Halide::Pipeline pipeline, const Halide::Target &target);

}  // namespace holdfast::cuda
