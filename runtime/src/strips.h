// Where threads outnumber heads: columns of a head's values that threads share. Each column of a state and of outputs is computed as
// among all of them, to the bit.
#pragma once
#include "context.h"
#include "problem.h"
#include "variants.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>

namespace holdfast {

/// The variant that does for fewer columns of values what `whole` does, to the bit and no slower: itself where it takes any, else one
/// for those, of chunks of the same length, on the same target. Null if there is none.
inline const Variant *narrower(const Variant &whole, int64_t columns) {
    if (!whole.value_size || whole.value_size == columns) return &whole;
    for (const Variant &v : variants())
        if (v.target == whole.target && v.key_size == whole.key_size && v.value_size == columns && v.chunk == whole.chunk &&
            v.row_alignment <= whole.row_alignment && v.round_operands == whole.round_operands && v.degree == whole.degree &&
            !std::strcmp(v.kernel, whole.kernel) && !std::strcmp(v.dtype, whole.dtype))
            return &v;
    return nullptr;
}

/// The same problem for some columns of values.
inline Problem columns_of(Problem p, int64_t first, int64_t columns) {
    p.V = columns;
    for (Tensor *x : {&p.v, &p.out, &p.initial_state, &p.final_state, &p.states}) {
        if (!x->rank) continue;
        if (x->data) x->data += first * x->stride[3] * x->dtype.bytes();
        x->shape[3] = columns;
    }
    return p;
}

/// How tokens one by one are cut into pieces: neighbouring heads, or strips of columns of one head.
struct StepPieces {
    int64_t of_heads = 0, strips = 1;

    /// On the context's threads; `variants` run it.
    StepPieces(const Problem &p, const holdfast_context &context, std::initializer_list<const Variant *> variants) : V(p.V) {
        const int64_t heads = p.N * p.Hk;
        if (heads == 0) return;
        const double tokens = p.packed() ? (double)p.T / p.N : (double)std::max<int64_t>(p.T, 1);  // of a sequence
        const double bytes = (double)heads * (double)p.state_bytes() * tokens;
        of_heads = (int64_t)std::min((double)heads, 1 + bytes / worth_a_thread);
        auto narrow = [&](int64_t n) {
            return std::all_of(variants.begin(), variants.end(), [&](const Variant *v) {
                return !v->value_size || (V % (n * least_columns) == 0 && narrower(*v, V / n));
            });
        };
        const double threads = context.all_threads();
        const int64_t long_heads = p.long_sequences() * p.Hk;  // those beside them are little work, or none
        strips = std::min((int64_t)std::min(threads, 1 + bytes / worth_a_strip) / long_heads, V / least_columns);
        while (strips > 1 && !narrow(strips)) strips--;
        strips = std::max<int64_t>(strips, 1);
    }
    int64_t count() const { return of_heads * strips; }
    std::string how() const {
        return "token by token" + (strips > 1 ? ", columns of values in " + std::to_string(strips) + " strips" : std::string());
    }
    /// The first column of strip n, or behind the last.
    int64_t begin(int64_t n) const { return n == strips ? V : V * n / strips / least_columns * least_columns; }

private:
    int64_t V;

    // Bytes of states to go through. To wake a thread takes as long as half a megabyte: one step of a head of 256x512 takes 14 us on one
    // thread and 16 on two, of 700x1000 92 and 54 (Zen 4).
    static constexpr double worth_a_thread = 512 * 1024, worth_a_strip = 1024 * 1024;
    static constexpr int64_t least_columns = 16;  // a line of cache
};

}  // namespace holdfast
