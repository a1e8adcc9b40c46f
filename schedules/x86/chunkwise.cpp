// x86 with AVX-512 or AVX2: the scan over all chunks of a call, then the output chunk by chunk. Matrix products in register
// tiles of `rows` x `columns` vectors. Not parallel: the runtime spreads batch entries and heads over threads, and calls for a
// few chunks at a time so that their rows and states stay in L2.
//
// Intel Xeon (Emerald Rapids), one core, AVX-512, in turn with a loop of nothing but fused multiply-adds, useful operations:
// from cache (T 1024 of one head) 61% of that peak at K = V = 64, 70% at 128; from memory (T 4096 of 8 heads) 51 to 54% and 53
// to 56%, 57 to 58% with huge pages. Before rows were asked for ahead and strips had 16 rows: 57, 65, 43 to 45, 52%.
//
// There, from cache, K = V = 64: 46% of the time in products with states, at the peak, ten loads for sixteen fused multiply-adds;
// scores 12%, 17 loads for 16; intra 8%; copies 9%, two or three cycles a line of L2; the mask's exp 6%, transposing keys 4%, adding
// to states 4%, decays 3%. From memory, looking up a page for each row of 4 KiB or more: it holds up the loop that asks.
// Zen 4, one core, K = V = 64: products with states 58% of the time from cache and 43% from memory, scores 15 and 10%, intra 10 and
// 11%, copies 7 and 25%; 71% of the peak from cache, 62 to 63% from memory, 69% with huge pages: most of what memory costs is looking
// up pages. At 128 79% and 71%. Keys transposed in registers from the caller's rows, without a copy of them, save 1% at 64, on
// two threads 0.5 to 5%. Calls for 12 to 19 chunks: the same.
// Tried: asking in bursts of 16 lines before each tile, for L1 instead of L2, or copying with nothing asked for: 3, 1 and 15%
// slower from memory at 64; one head after the other: 7%. Transposing 8 or 16 features at a time: 3%. Longer loops of scores: the
// same.
#include "../schedule.h"
#include "chunkwise.h"
#include "pairs.h"
#include "transpose.h"

namespace {
using namespace Halide;
using namespace holdfast;

struct Chunkwise : x86::ChunkwiseLoops {
    using ChunkwiseLoops::ChunkwiseLoops;

    void product(Func p, const LoopLevel &at, const RDom &over, Var x, int x_extent, Var y, int y_extent, bool asks) override {
        p.compute_at(at).bound_extent(x, x_extent).bound_extent(y, y_extent).vectorize(x, vec).unroll(x).unroll(y);
        p.update().reorder(x, y, over.x).vectorize(x, vec).unroll(x).unroll(y);
        RVar outer(x86::ask_ahead), term("term");
        if (const int terms = asks ? terms_per_line(over) : 0) p.update().split(over.x, outer, term, terms).unroll(term);
    }
    // Rows of the caller's tensors are H * D apart, often a power of two: copied, they do not fight for one cache set, and
    // the clamp of the row and the widening of 16 bits are paid once. By the chunk, keys and values once for states and once for
    // outputs: while products compute the next ones come from memory. Sizes known at run time only, which are not asked for
    // ahead: all rows of a call at once, many lines are then on their way together.
    void copy_rows() {
        const bool sized = sizes.key > 0 && sizes.value > 0;
        Func queries = f.q.in({f.scores, f.inter});
        // Scores read keys along j.
        x86::Transposed keys(sized ? f.k : f.k.in(), vec);
        x86::replace_calls(f.scores, f.k, [&](auto at) { return keys(at); });
        keys.compute_at({f.result, in}, {keys.lines(), keys.lines().args()[1]});
        f.keys_decayed.compute_at(f.state, chunk).vectorize(d, vec);
        if (sized) {
            Func values = f.v.in(f.intra), added = f.v.in(f.contribution);
            queries.compute_at(f.result, g), values.compute_at(f.result, in), added.compute_at(f.state, chunk);
            for (Func rows : {queries, values, added}) rows.vectorize(rows.args()[0], vec);
            for (Func rows : {queries, values, added, f.keys_decayed}) rows.unroll(rows.args()[0]);
            for (Func rows : {queries, added, f.keys_decayed})  // the other ones find theirs in L2
                rows.rename(rows.args()[1], Var(x86::rows_ahead));
        } else {
            for (Func rows : {queries, f.k.in(), f.v.in()}) rows.compute_root().vectorize(rows.args()[0], vec);
        }
    }
    void apply() {
        outputs(f.weights);
        copy_rows();
        states(f.contribution);
        decays();
    }
};

void apply(ChunkwiseFuncs &f, const ChunkwiseSizes &sizes, const Target &target) { Chunkwise(f, sizes, target).apply(); }

bool matches(const Target &t, const ChunkwiseSizes &s) {
    if (t.arch != Target::X86 || t.has_gpu_feature() || !t.has_feature(Target::AVX2)) return false;
    const int wide = tile_of(t).columns * t.natural_vector_size<float>();
    return s.chunk % wide == 0 && s.chunk % tile_of(t).rows == 0;
}

const bool added = Schedule<ChunkwiseFuncs, ChunkwiseSizes>::add({"x86", 10, matches, apply});
}  // namespace
