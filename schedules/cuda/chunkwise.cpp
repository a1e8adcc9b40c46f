// NVIDIA GPUs from sm_80 (A100) on: products of 16-bit operands on tensor cores (docs/tensor-cores.md), of fp32 by FFMA.
//
// One call is the whole problem: blocks go over chunks, heads and batch entries. Kernels: log decays (steps, rest),
// contributions of chunks to the state, the scan over chunks (initial states, steps), final states, outputs. Contributions and
// states of all chunks are scratch in device memory. Ragged lengths come in through the chunk table alone: products see whole
// chunks. Rows of q, k and v start at 16-byte boundaries (the generator's row_alignment).
//
// Not measured: no GPU was at hand. docs/cuda-expected-times.md has what the machine code lets expect, and of which kernel.
#include "../../generators/chunkwise.h"
#include "../schedule.h"
#include "fragments.h"

namespace {
using namespace Halide;
using namespace holdfast;

/// Largest tile of a block's results: columns are value features; rows, where they are not a chunk's, key features. 64 x 64
/// sums of 4 warps leave room for two or more blocks on a multiprocessor up to K = 128 (tests/cuda/test_code.py).
struct Tiles {
    int capability;  // of the architecture, at least
    int columns, rows;
};
constexpr Tiles tiles[] = {{80, 64, 64}};

struct Stages {
    ChunkwiseFuncs &f;
    const ChunkwiseSizes &sizes;
    const Tiles &most;
    Var b{"b"}, h{"h"}, c{"c"}, i{"i"}, j{"j"}, d{"d"}, e{"e"}, s{"s"};
    Var eo{"eo"}, ei{"ei"}, dd{"do"}, di{"di"}, lane{"lane"}, warp{"warp"}, block{"block"};

    // Log decays inside chunks: a thread per row.
    void decays() {
        for (Func decay : {f.decay_steps, f.decay_rest}) {
            Func rows = decay.in();
            rows.compute_root().bound(i, 0, sizes.chunk).gpu_blocks(c, h, b).gpu_threads(i);
            decay.compute_at(rows, i).store_in(MemoryType::Register);
        }
    }
    // Outputs: a block per chunk and E of its columns.
    Stage rows_of_chunks(int E, const RVar &blocks) {
        f.result
            .gpu_single_thread();  // undefined at first, so that nothing is run; but Halide would want it in host memory too
        Stage result = f.result.update(0);
        result.allow_race_conditions();  // each row belongs to one chunk: chunks.h
        return result.split(e, eo, ei, E)
            .fuse(eo, f.over_result.y, blocks)
            .reorder(ei, f.over_result.x, blocks, h, b)
            .gpu_blocks(blocks, h, b);
    }
    // States: a thread per four elements, the scan over chunks on the device.
    void scan() {
        const int wide = 4, threads = 128;
        auto each = [&](auto stage, const std::vector<VarOrRVar> &inside) {
            Var rest("rest"), all("all"), at("at"), thread("thread");
            stage.split(e, rest, e, wide).fuse(rest, d, all).split(all, at, thread, threads);
            std::vector<VarOrRVar> order{e};
            order.insert(order.end(), inside.begin(), inside.end());
            order.push_back(thread), order.push_back(at);
            stage.reorder(order).vectorize(e).gpu_blocks(at, h, b).gpu_threads(thread);
        };
        f.state.compute_root().bound(e, 0, sizes.value).bound(d, 0, sizes.key);
        each(f.state.update(0), {f.over_sequence.x});
        each(f.state.update(1), {f.over_chunk.x});
        each(f.state_out, {s});
    }
};

const Tiles &best_tiles(const Target &target) {
    const Tiles *best = &tiles[0];
    for (const Tiles &t : tiles)
        if (target.get_cuda_capability_lower_bound() >= t.capability) best = &t;
    return *best;
}

struct TensorCores : Stages {
    void output() {
        const int C = sizes.chunk, K = sizes.key, V = sizes.value, E = std::min(V, most.columns);
        const cuda::Fragments square(C, C, C, 16), tile(E, C, E, 16);
        RVar row = f.over_result.x, blocks("blocks");
        Stage result = rows_of_chunks(E, blocks);
        tile.store(result, ei, row);
        const LoopLevel at(f.result, blocks);
        tile.share(f.out_stored, e, i, at);
        square.product(f.scores, j, i, {f.over_key_feature}, at);
        tile.product(f.intra, e, i, {f.over_key}, at);
        tile.product(f.inter, e, i, {f.over_state}, at);
        cuda::stage(f.q_stored, tile.warps(), d, K, i, C, at);
        Func k = f.k.clone_in(f.scores), v = f.v.clone_in(f.intra);
        cuda::stage(f.k_stored.in(k), tile.warps(), d, K, i, C, at);
        cuda::stage(f.v_stored.in(v), tile.warps(), e, E, i, C, at);
        cuda::stage(f.state_read[0], tile.warps(), e, E, d, K, at);
    }
    void contributions() {
        const int C = sizes.chunk, E = std::min(sizes.value, most.columns), D = std::min(sizes.key, most.rows);
        const cuda::Fragments tile(E, D, E, 16);
        Func contribution = f.contribution.in();
        contribution.compute_root()
            .bound(e, 0, sizes.value)
            .bound(d, 0, sizes.key)
            .split(e, eo, ei, E)
            .split(d, dd, di, D)
            .fuse(eo, dd, block)
            .fuse(block, c, block)
            .reorder(ei, di, block, h, b)
            .gpu_blocks(block, h, b);
        tile.result(contribution, ei, di);
        const LoopLevel at(contribution, block);
        tile.product(f.contribution, e, d, {f.over_token}, at);
        cuda::stage(f.k_stored.in(f.k), tile.warps(), d, D, i, C, at);
        cuda::stage(f.v_stored.in(f.v), tile.warps(), e, E, i, C, at);
        f.key_decay.compute_at(at)
            .store_in(MemoryType::GPUShared)
            .bound_extent(j, C)
            .split(j, warp, lane, 32)
            .gpu_threads(lane, warp);
    }
};

struct Ffma : Stages {
    static constexpr int depth = 32;  // of a sum, in shared memory at a time

    void output() {
        const int C = sizes.chunk, V = sizes.value, E = std::min(V, most.columns);
        const cuda::RegisterTile square(C, C, 4, C / 16), tile(E, C, E / 16, C / 16);
        RVar row = f.over_result.x, blocks("blocks"), d_tile("d_tile"), d_in("d_in");
        Stage result = rows_of_chunks(E, blocks);
        tile.result(result, ei, row);
        const LoopLevel at(f.result, blocks);

        f.scores.update().split(f.over_key_feature.x, d_tile, d_in, depth);
        square.product(f.scores, j, i, d_in, 4, at, {d_tile});
        square.share(f.weights, j, i, at);
        f.inter.update().split(f.over_state.x, d_tile, d_in, depth);
        tile.product(f.inter, e, i, d_in, 4, at, {d_tile});
        tile.product(f.intra, e, i, f.over_key, 4, at);

        const LoopLevel in_scores(f.scores, d_tile), in_inter(f.inter, d_tile);
        Func q = f.q.clone_in(f.scores), k = f.k.clone_in(f.scores), v = f.v.clone_in(f.intra);
        cuda::stage(f.q_stored.in(q), tile.warps(), d, depth, i, C, in_scores);
        cuda::stage(f.k_stored.in(k), tile.warps(), d, depth, i, C, in_scores);
        cuda::stage(f.q_stored.in(f.q), tile.warps(), d, depth, i, C, in_inter);
        cuda::stage(f.state.in(f.inter), tile.warps(), e, E, d, depth, in_inter);
        cuda::stage(f.v_stored.in(v), tile.warps(), e, E, i, C, at);
    }
    void contributions() {
        const int C = sizes.chunk, E = std::min(sizes.value, most.columns), D = std::min(sizes.key, most.rows);
        const cuda::RegisterTile tile(E, D, E / 16, D / 16);
        Func contribution = f.contribution.in();
        contribution.compute_root()
            .bound(e, 0, sizes.value)
            .bound(d, 0, sizes.key)
            .split(e, eo, ei, E)
            .split(d, dd, di, D)
            .fuse(eo, dd, block)
            .fuse(block, c, block)
            .reorder(ei, di, block, h, b)
            .gpu_blocks(block, h, b);
        tile.result(contribution, ei, di);
        const LoopLevel at(contribution, block);
        tile.product(f.contribution, e, d, f.over_token, 4, at);
        cuda::stage(f.keys_decayed, tile.warps(), d, D, j, C, at);
        cuda::stage(f.v_stored.in(f.v), tile.warps(), e, E, i, C, at);
        f.key_decay.compute_at(at)
            .store_in(MemoryType::GPUShared)
            .bound_extent(j, C)
            .split(j, warp, lane, 32)
            .gpu_threads(lane, warp);
    }
};

void apply_ffma(ChunkwiseFuncs &f, const ChunkwiseSizes &sizes, const Target &target) {
    Ffma s{{f, sizes, best_tiles(target)}};
    s.decays(), s.output(), s.contributions(), s.scan();
}

// Whole tiles, and no sum of 16 that is left over.
bool tuned(int size) { return size == 32 || (size > 0 && size % 64 == 0); }

bool matches_ffma(const Target &t, const ChunkwiseSizes &s) {
    return t.has_feature(Target::CUDA) && s.operands == Dtype::f32 && s.causal_tile == s.chunk && s.chunk == 64 &&
           tuned(s.key) && tuned(s.value);
}

void apply_tensor_cores(ChunkwiseFuncs &f, const ChunkwiseSizes &sizes, const Target &target) {
    TensorCores s{{f, sizes, best_tiles(target)}};
    s.decays(), s.output(), s.contributions(), s.scan();
}

bool matches_tensor_cores(const Target &t, const ChunkwiseSizes &s) {
    return t.has_feature(Target::CUDA) && t.get_cuda_capability_lower_bound() >= 80 && s.operands != Dtype::f32 &&
           s.causal_tile == s.chunk && s.chunk == 64 && tuned(s.key) && tuned(s.value);
}

const bool added =
    Schedule<ChunkwiseFuncs, ChunkwiseSizes>::add({"cuda_tensor_cores", 20, matches_tensor_cores, apply_tensor_cores}) &&
    Schedule<ChunkwiseFuncs, ChunkwiseSizes>::add({"cuda", 10, matches_ffma, apply_ffma});
}  // namespace
