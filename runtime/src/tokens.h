// For kernels that compute each token by itself: on the CPU, how the tokens of a call are shared out among threads, and how many of
// them one call of a kernel takes.
#pragma once
#include "buffers.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <sstream>
#include <utility>

namespace holdfast {

/// Rows [B, T, H, *] of a call. With T = 1 the first two axes change places, so that a call of a kernel has many tokens.
struct Rows {
    Tensor *tensors[5];  // null: not there
    bool turned;
    int64_t B, T, H;

    explicit Rows(Tensor *first, Tensor *second, Tensor *third = nullptr, Tensor *fourth = nullptr, Tensor *fifth = nullptr)
        : tensors{first, second, third, fourth, fifth}, turned(first->shape[1] == 1) {
        for (Tensor *t : tensors)
            if (t && turned) std::swap(t->shape[0], t->shape[1]), std::swap(t->stride[0], t->stride[1]);
        B = first->shape[0], T = first->shape[1], H = first->shape[2];
    }
};

/// The work of a call in pieces.
class Tokens {
public:
    static constexpr int64_t most_at_once = 1024;
    static constexpr int64_t worth_a_thread = 512 * 1024;  // bytes: to wake a thread takes as long as to move so many

    /// At most so many pieces; at most so many bytes at once, but one token.
    explicit Tokens(const Rows &rows, int64_t most_pieces = std::numeric_limits<int64_t>::max(),
                    int64_t most_bytes = std::numeric_limits<int64_t>::max())
        : T(rows.T), all(rows.H ? rows.B * rows.T : 0) {
        int64_t bytes = 0;
        for (const Tensor *t : rows.tensors) {
            if (!t) continue;
            bytes += rows.H * t->shape[3] * t->dtype.bytes();
            const int64_t heads = check_axis(*t, 2);
            if (span(*t, 1) > 0) at_once = std::min<int64_t>(at_once, 1 + (reach - heads) / std::llabs(t->stride[1]));
        }
        at_once = std::min(at_once, std::max<int64_t>(most_bytes / std::max<int64_t>(bytes, 1), 1));
        count = (int64_t)std::min<double>(all, all ? 1 + (double)all * bytes / worth_a_thread : 0);
        count = std::min(count, most_pieces);
    }

    /// Elements from the first to the last along an axis that a call of a kernel has all of. Throws UNSUPPORTED.
    static int64_t check_axis(const Tensor &t, int axis) {
        const int64_t elements = span(t, axis);
        if (elements > reach)
            fail(HOLDFAST_UNSUPPORTED, t.name, " has stride ", t.stride[axis], " on axis ", axis, "; expected at most ",
                 reach / (t.shape[axis] - 1), " either way");
        return elements;
    }

    int64_t pieces() const { return count; }

    /// Call run(b, t, tokens) for piece n, a number of tokens at a time.
    template<class Run>
    void each(int64_t n, const Run &run) const {
        const int64_t end = (n + 1) * all / count;
        for (int64_t first = n * all / count, tokens; first < end; first += tokens) {
            tokens = std::min({at_once, T - first % T, end - first});
            run(first / T, first % T, tokens);
        }
    }

private:
    static constexpr int64_t reach = 1 << 29;  // elements: 2^31 bytes, at most
    int64_t T, all, count, at_once = most_at_once;

    static int64_t span(const Tensor &t, int axis) {
        return t.empty() || t.shape[axis] == 1 ? 0 : (t.shape[axis] - 1) * std::llabs(t.stride[axis]);
    }
};

/// The variant for rows of that type.
inline const Variant &variant_for(const char *kernel, const Tensor &rows, const Choice &choice) {
    return select_variant(kernel, rows.dtype.name, 0, 0, 0, choice.backend, choice.forced);
}

/// Tell the context's listener, if there is one, what runs for `call` ("rotate") on [B, T, H, *]; on a CPU in how many pieces.
inline void announce(const holdfast_context &c, const char *call, const Variant &variant, const char *why, const Tensor &rows,
                     int64_t pieces = 0) {
    if (!c.verbose) return;
    std::ostringstream line;
    line << call << ": " << variant.name << " (" << why << "), B " << rows.shape[0] << ", T " << rows.shape[1] << ", H "
         << rows.shape[2] << ", size " << rows.shape[3] << ", " << workers(c, variant, rows, pieces);
    c.verbose(c.verbose_user, line.str().c_str());
}

}  // namespace holdfast
