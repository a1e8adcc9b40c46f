// x86 with AVX-512 or AVX2: the scan over the chunks of a call, the scan back, then each gradient for all of them. Matrix products
// in register tiles of `rows` x `columns` vectors. Not parallel: the runtime spreads batch entries and heads over threads, and
// calls for a few chunks at a time so that all of their rows and states stay in L2.
//
// AMD EPYC (Zen 4), one core, AVX-512, in turn with the forward kernel over the same rows, useful operations, of which there are
// 2.5 times the forward's; calls of 4 chunks at K = V = 64, of 2 at 128. From cache (T 512 of one head): 80 GFLOP/s at 64, 2.54
// times the forward's time; 92 at 128, 2.49 times. With rows from L3 (T 1024 of 8 heads), while others used the machine: 65 to
// 69, 2.6 to 2.8 times; 80 to 83, 2.4 to 2.55 times. AVX2: 68, 2.6 times. No gradient of q, k, v and decays wanted: 20% of it.
//
// The whole call, two threads, T 4096 of 8 heads, calls of 8 chunks: 13.4 to 14.2 ms at 64, 3.0 to 3.2 times the forward's time, where
// it was 14.7 to 15.0 ms and 3.3 times before rows were asked for and results of q and k written chunk by chunk; 43 to 45 ms at 128,
// 3.1 times, 1% less than before. The products with states are six to the forward's two: the runtime's states, those again here, and
// the four of gradients. With states that the forward kept every 128 tokens (holdfast_backward_args::states) they are five: 12.5 ms at
// 64 where the forward takes 4.4, 39 at 128 where it takes 15.4, 2.8 and 2.5 times. By count, a product with states as the unit, the
// forward is 2.5 and 2.2, the gradient with such states 6.1 and 5.4: 2.4 times at the forward's share of the peak.
//
// In turn with that, two threads, states kept: 4 to 5% less at 64, 2 to 3% at 128. Asked for are the rows of whichever head the runtime
// takes next and its state; rows of q during the scan, not a call ahead, when those of seven tensors, 2 KiB apart, meet in a quarter
// of L2's sets or fewer: 3.4 and 2.4%. Blocks of 16 x 16 turned over in registers instead of 4 x 16: 1.5% at both, also from cache.
//
// At 64 from cache, products take 69% of the time, at the peak: those with states 52%, inside chunks 18%. Transposing 6%, rows in 5%,
// results out 2%, products of gates 5%, adding to states and their gradients 3%, the mask's exp 2%, memory for stages 1%: what is no
// product moves lines between L2 and L1, two or three cycles each. At 128 products are three quarters: of the 37 ms that two threads
// take for T 4096 of 8 heads 26 are products at the peak.
//
// From memory, two threads at 64, 10.2 ms of T 4096 and 8 heads, from cache, become 11.2 with tensors on pages of 2 MiB, 12.0 on pages
// of 4 KiB, the forward's 4.0 become 4.1 and 4.3: in loops that ask, rows in, results out, and 2% in products. NumPy's arrays of 8
// MiB are three quarters on pages of 2 MiB. Results alone on pages of 4 KiB: 3%; one of q, k, dout or states: 1% or nothing; workspace:
// nothing. Rows 256 bytes or 2304 apart instead of 2048: 1%. States kept every 256 tokens, as many as a call has, instead of 128: the
// forward 3%, both 1 to 2% faster at 64; every 64: 4% slower; at 128 every 128 and 256 the same, 512 8% slower.
//
// Tried: copies for each product by the chunk, the next chunk's rows asked for ahead, as chunkwise.cpp does: 5% slower from cache, no
// faster from L3. Nothing asked for behind rows: 8% slower at 64; into L1 instead of L2: the same; a line every 8 terms of a product
// instead of 16 before each tile: 3% slower at 64, 5% at 128, and where the product reads a state by the chunk table sums leave
// registers. Chunks of 64: 9% slower at 64, 4% at 128. Calls of 1, 2, 3, 4 chunks, which recompute fewer states: 20, 10, 6, 4% slower at
// 64; of 6 to 16 there, and of 3 to 8 at 128: the same. Rows of states a line further apart, and a strip of columns of theirs for all
// rows of a chunk, to read them from L1: the same at 128, 1 to 3% slower at 64.
// Results stored past the caches (vmovntps put into the assembly) and not asked for: 2% faster from memory with pages of 2 MiB, 4% with
// 4 KiB, 1 to 2% slower with tensors in L3, and whoever reads results next waits for memory; asked for all the same: 1 and 3%; neither:
// 6 and 4% slower. Products of gates summed in registers, and those of 16 rows turned over at once; keys and values transposed by
// the chunk; no exp in the mask's block that is zero: 1% fewer samples in these loops, the whole no faster.
#include "../schedule.h"
#include "chunkwise_backward.h"

namespace {
using namespace Halide;
using namespace holdfast;

struct ChunkwiseBackward : x86::ChunkwiseBackwardLoops {
    using ChunkwiseBackwardLoops::ChunkwiseBackwardLoops;

    void apply() const {
        // Rows of the caller's tensors are H * D apart, often a power of two: copied, they do not fight for one cache set, and the
        // clamp of the row and the widening of 16 bits are paid once.
        for (Func copy : {r.f.q, r.f.k, r.f.v, r.dout_staged, r.dinter, r.f.keys_decayed}) {
            elementwise(copy);
            if (sized) copy.unroll(copy.args()[0]);
        }
        scans(true);  // dq reads states along d alone

        // Products inside chunks. dq and dk share dscores, all of the square; weights are computed for dv a strip of keys at a time.
        transposed(r.f.k, {r.f.scores}), transposed(r.f.v, {r.dweights});
        transposed(r.dcontribution, {r.dkeys_decayed, r.state_product});
        gradients_of_rows(vec);
        const LoopLevel strip = gradient_of_values(vec);
        Var j = r.f.weights.args()[0], i = r.f.weights.args()[1];
        r.f.weights.compute_at(strip)
            .bound_storage(i, sizes.chunk)
            .split(i, yo, yi, score_rows)
            .reorder(j, yi, yo)
            .vectorize(j, vec)
            .unroll(j)
            .unroll(yi);
        tile(r.f.scores, {r.f.weights, yo}, score_columns, score_rows);

        gates();
        elementwise(r.state_product).update().reorder(r.state_product.args()[0], r.over_value.x);
        r.state_product.update().vectorize(r.state_product.args()[0], vec);
    }
};

void apply(ChunkwiseBackwardFuncs &r, const ChunkwiseSizes &sizes, const Target &target) {
    ChunkwiseBackward(r, sizes, target).apply();
}

bool matches(const Target &t, const ChunkwiseSizes &s) {
    if (t.arch != Target::X86 || t.has_gpu_feature() || !t.has_feature(Target::AVX2) || s.operands != Dtype::f32) return false;
    const int wide = tile_of(t).columns * t.natural_vector_size<float>();
    return s.chunk % wide == 0 && s.chunk % tile_of(t).rows == 0;
}

const bool added = Schedule<ChunkwiseBackwardFuncs, ChunkwiseSizes>::add({"x86", 10, matches, apply});
}  // namespace
