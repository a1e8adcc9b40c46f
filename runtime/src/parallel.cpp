// The parallel form on the CPU: rows of out are apart from one another, so pieces of work are parts of the rows of a head. The
// final state is a call of its own afterwards, without rows: it may lie where the initial one is read. Of degrees above 1 it is
// made by the kernels of power retention.
#include "parallel.h"

#include "buffers.h"
#include "expansion.h"
#include "failure.h"
#include "power.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string>

namespace holdfast {
namespace {

constexpr int64_t most = std::numeric_limits<int32_t>::max();  // elements within reach of a kernel

// Rows for which a call is worth what it does for all keys: copies them, and sums their decays.
constexpr int64_t least_rows = 256;

class Work {
public:
    int64_t parts;  // of the rows of a head of keys

    Work(const Problem &p, const Variant &variant, const holdfast_context &context) : p(p), variant(variant) {
        const int64_t heads = p.long_sequences() * p.Hk, threads = context.all_threads();
        parts = 1;
        while (heads * parts % threads != 0 && heads * parts < 4 * threads && p.T / (parts + 1) >= least_rows) parts++;
        // What a kernel's 32 bits reach of the weights.
        if (p.weights.rank) {
            const int64_t stride = p.T > 1 ? std::llabs(p.weights.stride[2]) : 0;
            const int64_t rows = most / std::max<int64_t>({stride, p.T, 1});
            if (rows < variant.chunk)
                fail(HOLDFAST_UNSUPPORTED, "weights has stride ", p.weights.stride[2], " on axis 2; expected at most ",
                     most / variant.chunk, " either way");
            // Parts have the same number of weights, so that the first one has the most rows.
            while (part_end(p.T, 1) + variant.chunk > rows) parts++;
        }
    }

    /// Part n of the rows of head h of keys of sequence s.
    void rows(Workspace &workspace, int64_t s, int64_t h, int64_t n) const {
        const int64_t T = p.length(s), from = n ? part_end(T, n) : 0, to = part_end(T, n + 1);
        if (from == to) return;
        const Initial initial(p, workspace, s, h);
        const int64_t group = p.group(), at_once = groups_fit() ? group : 1;
        for (int64_t g = 0; g < group; g += at_once) {
            const int64_t head = h * group + g;
            float nothing = 0;
            Buffer weights(
                &nothing, halide_type(p.q.dtype),
                {{0, (int32_t)T, 1}, {0, 0, 0}, {0, (int32_t)(to - from), 0}, {0, (int32_t)at_once, 0}, {0, 1, 0}, {0, 1, 0}});
            if (p.weights.rank) {
                weights.host = p.weights.at<uint8_t>(p.entry(s), head, p.start(s) + from);
                weights.axes[0] = {-(int32_t)p.start(s), (int32_t)p.T, 1};  // those of other sequences become 0
                weights.axes[1].extent = 1, weights.axes[2] = axis(to - from, p.weights.stride[2]);
            }
            call(workspace, s, h, {initial, head, at_once, from, to, weights}, nullptr, nullptr);
        }
    }

    /// The final state of head h of sequence s, and the sum of keys.
    void state(Workspace &workspace, int64_t s, int64_t h) const {
        const Initial initial(p, workspace, s, h);
        const Scratch state(workspace, p.K * p.V), sum(workspace, p.K);
        if (p.length(s) == 0) {
            for (int64_t n = 0; n < p.K * p.V; n++) state.floats()[n] = initial.given ? initial.state.floats()[n] : 0;
            for (int64_t n = 0; n < p.K; n++) sum.floats()[n] = initial.given ? initial.sum.floats()[n] : 0;
        } else {
            float nothing = 0;
            Buffer weights(&nothing, halide_type(p.q.dtype),
                           {{0, (int32_t)p.length(s), 1}, {0, 0, 0}, {0, 1, 0}, {0, 0, 0}, {0, 1, 0}, {0, 1, 0}});
            call(workspace, s, h, {initial, h * p.group(), 0, 0, 1, weights}, state.floats(), sum.floats());
        }
        const Tensor &z = p.final_sum;
        if (p.final_state.rank) copy_state(State(state.floats(), p.K, p.V, p.V), State(p.final_state, s, h));
        if (z.rank) std::copy_n(sum.floats(), p.K, z.at(s, h));
    }

private:
    const Problem &p;
    const Variant &variant;

    /// The initial state of a head, key-major and compact, its features in the kernel's order.
    struct Initial {
        const bool given;
        const int64_t features;
        Scratch state, sum;
        Initial(const Problem &p, Workspace &workspace, int64_t s, int64_t h)
            : given(p.initial_state.rank), features(given ? tight_size(p) : p.K), state(workspace, features * p.V),
              sum(workspace, features) {
            constexpr auto order = HOLDFAST_EXPANSION_TIGHT;
            auto of_caller = [&](const Tensor &t) { return Features{t.at(s, h), t.stride[2], t.rank == 4 ? t.stride[3] : 1}; };
            if (given) convert(of_caller(p.initial_state), p.expansion, {state.floats(), p.V, 1}, order, p.D, p.K, p.V);
            std::fill_n(sum.floats(), features, 0.0f);
            if (p.initial_sum.rank) convert(of_caller(p.initial_sum), p.expansion, {sum.floats(), 1, 1}, order, p.D, p.K, 1);
        }
        static int64_t tight_size(const Problem &p) {
            return expanded_size(p.K, p.degree, HOLDFAST_EXPANSION_TIGHT, std::numeric_limits<int32_t>::max());
        }
    };

    /// What a call has: rows from .. to - 1 of `heads` heads of queries.
    struct Rows {
        const Initial &initial;
        int64_t head, heads, from, to;
        Buffer &weights;
    };

    /// Where part n - 1 of T rows ends and part n begins: row i has i + 1 weights.
    int64_t part_end(int64_t T, int64_t n) const {
        if (n == parts) return T;
        const int64_t end = (int64_t)(T * std::sqrt((double)n / parts));
        return std::min(T, end / variant.chunk * variant.chunk);
    }

    /// A call reaches all heads of queries that share a key.
    bool groups_fit() const {
        if (p.weights.rank) return false;
        for (const Tensor *t : {&p.q, &p.out})
            if (std::max(t->stride[2], -t->stride[2]) > most / std::max<int64_t>(p.group(), 1)) return false;
        return true;
    }

    void call(Workspace &workspace, int64_t s, int64_t h, const Rows &r, float *state, float *sum) const {
        static const float no_decay = 0;
        float nothing = 0;
        const int64_t b = p.entry(s), t = p.start(s), tokens = state ? p.length(s) : r.to;
        auto queries = [&](const Tensor &x) {
            return Buffer(x.at<uint8_t>(b, t + r.from, r.head), halide_type(x.dtype),
                          {{0, (int32_t)x.shape[3], 1},
                           axis(r.to - r.from, x.stride[1]),
                           axis(r.heads, x.stride[2]),
                           {0, 1, 0},
                           {0, 1, 0}});
        };
        auto keys = [&](const Tensor &x) {
            return Buffer(x.at<uint8_t>(b, t, h), halide_type(x.dtype),
                          {{0, (int32_t)x.shape[3], 1}, axis(tokens, x.stride[1]), {0, 1, 0}, {0, 1, 0}});
        };
        auto states = [&](const float *data, int64_t features, bool given) {
            return Buffer(given ? data : &nothing, float32,
                          {{0, (int32_t)p.V, 1}, {0, (int32_t)features, (int32_t)p.V}, {0, given, 0}, {0, 1, 0}, {0, 1, 0}});
        };
        auto sums = [&](const float *data, int64_t features, bool given) {
            return Buffer(given ? data : &nothing, float32, {{0, (int32_t)features, 1}, {0, given, 0}, {0, 1, 0}, {0, 1, 0}});
        };
        const Tensor &g = p.log_decay;
        Buffer log_decay(g.rank == 3   ? g.at(b, t, h)
                         : g.rank == 1 ? g.at(h)
                                       : &no_decay,
                         float32, {axis(tokens, g.rank == 3 ? g.stride[1] : 0), {0, 1, 0}, {0, 1, 0}});
        Buffer q = queries(p.q), out = queries(p.out), k = keys(p.k), v = keys(p.v);
        const Initial &initial = r.initial;
        Buffer state_in = states(initial.state.floats(), initial.features, initial.given),
               sum_in = sums(initial.sum.floats(), initial.features, initial.given);
        Buffer state_out = states(state, p.K, state), sum_out = sums(sum, p.K, sum && p.final_sum.rank);
        check_returned(std::get<ParallelKernel *>(variant.run)(&workspace, &q, &k, &v, &log_decay, &state_in, &sum_in,
                                                               (int32_t)(r.from / variant.chunk), p.degree, p.normalized,
                                                               p.scale, &out, &state_out, &sum_out, &r.weights),
                       variant, workspace);
    }
};

}  // namespace

const Variant &parallel_variant(const Problem &p, const Choice &choice) {
    return select_variant("parallel", p.q.dtype.name, p.K, p.V, 0, choice.backend, choice.forced);
}

void run_parallel(holdfast_context &c, const Problem &p, const Choice &choice) {
    const Variant &variant = parallel_variant(p, choice);
    check_kernel_strides(p, p.T);
    const Work work(p, variant, c);
    const int64_t heads = p.N * p.Hk, pieces = heads * work.parts;
    announce(c, "forward", variant, choice.why, p, "parallel form, rows in " + std::to_string(work.parts) + " parts", pieces);
    if (heads == 0) return;
    // The last rows have the most keys: they begin first.
    c.for_each(pieces, [&](Workspace &workspace, int64_t n) {
        work.rows(workspace, n % heads / p.Hk, n % heads % p.Hk, work.parts - 1 - n / heads);
    });
    if (!p.final_state.rank && !p.final_sum.rank) return;
    if (p.degree > 1)
        run_power_states(c, "forward", p, choice);
    else
        c.for_each(heads, [&](Workspace &workspace, int64_t n) { work.state(workspace, n / p.Hk, n % p.Hk); });
}

}  // namespace holdfast
