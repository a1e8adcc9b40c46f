// x86 with AVX-512 or AVX2. Not parallel: the runtime spreads batch entries and heads over threads.
//
// A token at a time: rows of the state are read and written from end to end, as memory likes it best. Where there are
// registers for the values and sums of a whole row, they stay there, down all rows; else they pass through L1 with each row.
// One core of an Intel Xeon at 2.3 GHz, AVX-512, one token of 8 heads: K = V = 64 in 3.6 us, 73 GB/s read and written in L2, 0.6
// us of it the call's checks; 128 in 14 us, 74 GB/s. From memory 75 to 89% of what copying moves.
// Zen 4, one core, states from memory, where updating an array moves 38 GB/s: AVX-512 39 at V = 64 and 128, 30 at 256, 34 to 37 at
// 512; AVX2 39 to 41 at 64 and 128, 27 to 39 above. A strip of columns in registers at a time, down all rows, is 20 wherever it is
// not the whole row, as are 4 or 8 rows at a time; from cache it is 8 to 12% faster with AVX-512, and 9% at V = 64 with AVX2, which
// above takes up to 1.5 times as long.
//
// Blocks of tokens: a vector of columns of the state at a time, down all rows. The vector is in a register while tokens multiply it,
// add to it and add it to their sums, three operations for two multiply-adds of a step; values and sums are in registers, keys
// and queries in L1. Zen 4, one core, AVX-512, a token and head in cache: K = V = 32 in 74 ns, 64 in 254, 128 in 970, 256 in
// 4000; a chunkwise kernel takes 97, 240, 810 and 3300 where chunks are full. The same loop alone, in intrinsics, takes 53,
// 211 and 840: the rest is rows copied, decays, the first row's masks and sums written. Tried without gain: `out` asked for ahead;
// 4 tokens and two vectors, as fast. AVX2 has registers for 4 tokens: 8 take 5 to 15% longer.
#include "../../generators/recurrent.h"
#include "../schedule.h"
#include "prefetch.h"

namespace {
using namespace Halide;
using namespace holdfast;

constexpr int rows = 4;  // of a step, at a time: the first of them asks whether it is the first of all

// Of a part of a row. Twice as many registers hold its sums and values; five more the decay and what passes through.
int columns(int value, const Target &t) {
    int n = t.has_feature(Target::AVX512_Skylake) ? 8 : 4;  // of 32 registers, of 16
    while (value % (n * t.natural_vector_size<float>())) n /= 2;
    return n;
}

/// Tokens at once: a register for the sum of each, one for its value.
int tokens_at_once(const Target &t) { return t.has_feature(Target::AVX512_Skylake) ? 8 : 4; }

struct Recurrent {
    RecurrentFuncs &f;
    const RecurrentSizes &sizes;
    const Target &target;
    const int vec = target.natural_vector_size<float>();
    Var b{"b"}, h{"h"}, g{"g"}, n{"n"}, i{"i"}, e{"e"}, eo{"eo"}, ei{"ei"};
    RVar row = f.over_key_feature;

    void step(int wide) {
        RVar ro("ro"), ri("ri");
        Stage update = f.state_and_sum.update().split(e, eo, ei, wide);
        if (wide < sizes.value)
            update.reorder(ei, eo, row, i, n, h, b);
        else
            update.split(row, ro, ri, rows).reorder(ei, ri, ro, eo, i, n, h, b).unroll(ri);
        update.vectorize(ei, vec).unroll(ei);
        f.v.compute_at(f.state_and_sum, eo).vectorize(f.v.args()[0], vec).unroll(f.v.args()[0]);
    }
    void blocks() {
        Var io("io"), ii("ii");
        RVar ask(x86::ask_ahead), term("term");
        f.state_and_sum.update()
            .split(e, eo, ei, vec)
            .split(row, ask, term, sizes.key % 8 ? 4 : 8)
            .split(i, io, ii, tokens_at_once(target))
            .reorder(ei, ii, term, ask, io, eo, n, h, b)
            .vectorize(ei)
            .unroll(ii)
            .unroll(term)
            .unroll(io);
        Func values = f.v.in(f.state_and_sum), queries = f.q.in(f.state_and_sum);
        values.compute_at(f.state_and_sum, eo).vectorize(values.args()[0], vec).unroll(values.args()[1]);
        for (Func rows : {queries, f.k, f.v}) {
            rows.compute_at(f.state_and_sum, n).vectorize(rows.args()[0], vec, TailStrategy::GuardWithIf);
            rows.rename(rows.args()[1], Var(x86::rows_ahead));
        }
        f.decay.vectorize(f.decay.args()[0], sizes.tokens);
    }
    void apply() {
        const int wide = columns(sizes.value, target) * vec;
        f.decay.compute_at(f.state_and_sum, n);
        f.left_out.compute_at(f.state_and_sum, n);
        sizes.tokens == 1 ? step(wide) : blocks();
        // Other queries read the state from cache.
        f.result.split(e, eo, ei, wide).vectorize(ei, vec).unroll(ei);
        f.others.compute_at(f.result, eo).vectorize(e, vec).unroll(e);
        f.others.update().reorder(e, f.over_state).vectorize(e, vec).unroll(e);
    }
};

void apply(RecurrentFuncs &f, const RecurrentSizes &sizes, const Target &target) { Recurrent{f, sizes, target}.apply(); }

bool matches(const Target &t, const RecurrentSizes &s) {
    return t.arch == Target::X86 && !t.has_gpu_feature() && t.has_feature(Target::AVX2) && s.key > 0 && s.key % rows == 0 &&
           s.value > 0 && s.value % t.natural_vector_size<float>() == 0 && (s.tokens == 1 || s.tokens % tokens_at_once(t) == 0);
}

const bool added = Schedule<RecurrentFuncs, RecurrentSizes>::add({"x86", 10, matches, apply});
}  // namespace
