// Calls of a power kernel by its own C signature, chunk by chunk, against the reference: for kernels compiled ahead of time or just
// in time.
#pragma once
#include "check.h"
#include "reference/power.h"
#include "shapes.h"
#include "stored.h"
#include "view.h"

#include <algorithm>
#include <numeric>
#include <string>

namespace test {

/// T tokens in calls of so many, the state of each call being that of the one before.
struct PowerCase {
    std::string name;
    Index calls;
    int64_t B, H, G;  // heads of keys, query heads to each
    Layout layout;
    Gates gates;
    bool normalize;
    enum class Contents { random, positive, ones } contents = Contents::random;
    double size_of_keys = 1;
    bool in_place = false;                     // the state is read and written where it lies
    bool no_queries = false;                   // of H G heads none, in the place of those that there are: states alone
    std::vector<double> size_of_queries = {};  // beside that of keys, for each of a group; {}: 1
};

/// Everything that a kernel with chunks of C tokens may meet.
inline std::vector<PowerCase> power_cases(int C, const Dtype &dtype) {
    std::vector<PowerCase> cases;
    for (Gates gates : all_gates)
        cases.push_back(
            {std::string("gates_") + name(gates), {C, C / 2 + 1}, 1, 2, 1, Layout::padded, gates, gates != Gates::none});
    for (Layout layout : layouts)
        cases.push_back(
            {std::string("layout_") + name(layout), {C - 1, 1}, 2, 1, 2, layout, Gates::weak, layout != Layout::swapped});
    cases.push_back({"positive", {C, C}, 1, 1, 3, Layout::compact, Gates::weak, true, PowerCase::Contents::positive});
    cases.push_back({"ones", {C, C, C, 2}, 1, 1, 1, Layout::compact, Gates::none, true, PowerCase::Contents::ones});
    for (double size : {dtype == f16 ? 1e-2 : 1e-8, dtype == f16 ? 1e2 : 1e6})
        cases.push_back({size < 1 ? "tiny" : "huge",
                         {C, 3},
                         1,
                         1,
                         1,
                         Layout::compact,
                         Gates::weak,
                         true,
                         PowerCase::Contents::positive,
                         size});
    // What brings these to 1, to the power p, is beyond fp32: no kernel may meet it.
    const double faint = dtype == f16 ? 6e-7 : 1e-22;
    cases.push_back({"faint_queries", {C, 3}, 1, 1, 2, Layout::compact, Gates::weak, true, PowerCase::Contents::positive});
    cases.back().size_of_queries = {1, faint};
    cases.push_back({"queries_of_zero", {C, 3}, 1, 1, 3, Layout::compact, Gates::weak, false});
    cases.back().size_of_queries = {1, 0, faint};
    cases.push_back({"no_queries", {C, C / 2 + 1}, 2, 2, 1, Layout::padded, Gates::resets, true});
    cases.back().no_queries = true;
    cases.push_back({"in_place", {C, 5, C}, 2, 2, 2, Layout::padded, Gates::weak, true, PowerCase::Contents::random, 1, true});
    cases.push_back(cases.back());
    cases.back().name = "in_place_no_queries", cases.back().no_queries = true;
    return cases;
}

/// What a call of `c` reads, and `out`, with which a gradient begins.
template<class Case>
class PowerTensors {
protected:
    using Buffer = Halide::Runtime::Buffer<void>;
    using Contents = PowerCase::Contents;
    const Case c;
    const int degree;
    const Dtype dtype;
    const int64_t K, V, D, T;
    const double lowest;  // of random elements; the highest is 1
    Random random;
    Array q, k, v, log_decay, state, keys, out;
    const float scale = 0.25f;

    /// Kernels for a known V want states without gaps between rows.
    PowerTensors(const Case &c, Size size, int degree, const Dtype &dtype, bool dense_states, double lowest)
        : c(c), degree(degree), dtype(dtype), K(size.K), V(size.V), D((int64_t)reference::monomials(K, degree).size()),
          T(std::accumulate(c.calls.begin(), c.calls.end(), int64_t(0))), lowest(lowest),
          q(array({c.B, T, c.H * c.G, K}, c.size_of_keys)), k(array({c.B, T, c.H, K}, c.size_of_keys)),
          v(array({c.B, T, c.H, V}, 1)), log_decay(log_decays(c.gates, c.B, T, c.H, c.layout, random)),
          state(array({c.B, c.H, D, V}, std::pow(c.size_of_keys, degree), dense_states)), keys(sums_of_keys()),
          out(array({c.B, T, c.H * c.G, V}, 1).forget()) {
        for (Array *x : {&q, &k, &v}) round_to(dtype, *x);
    }

    Array array(const Index &shape, double size, bool dense = false) {
        const Layout layout = dense ? Layout::compact : c.layout;
        if (c.contents == Contents::ones) return Array(shape, layout).fill(1);
        return Array(shape, layout).fill(random, (c.contents == Contents::random ? lowest : 0.5) * size, size);
    }
    /// Of many keys: far from 0 on every side that queries look from, so that quotients are not wrong by cancellation alone.
    Array sums_of_keys() {
        Array sums(Index{c.B, c.H, D}, c.layout);
        each({c.B, c.H}, [&](const Index &i) {
            std::vector<double> sum(D);
            for (int n = 0; n < 8; n++) {
                std::vector<double> key(K);
                for (double &x : key) x = c.contents == Contents::ones ? 1 : random(degree % 2 ? 0.5 : -1, 1) * c.size_of_keys;
                const std::vector<double> features = reference::phi(key, degree);
                for (int64_t f = 0; f < D; f++) sum[f] += features[f];
            }
            for (int64_t f = 0; f < D; f++) sums({i[0], i[1], f}) = (float)sum[f];
        });
        return sums;
    }
    /// Of tokens t .. t + tokens - 1, from such states.
    reference::PowerInputs inputs(int64_t t, int64_t tokens, const Array &from, const Array &sum) const {
        reference::PowerInputs in{c.B, tokens, c.H, c.G, K, V, degree, c.normalize};
        in.q = strided(q, t), in.k = strided(k, t), in.v = strided(v, t), in.log_decay = strided(log_decay, t);
        in.initial_state = strided(from), in.initial_keys = strided(sum);
        in.scale = scale;
        return in;
    }

    /// Halide's view of tokens t .. t + n - 1: (d or e, t, [g,] h, b).
    Buffer rows(Stored &stored, const Array &a, int64_t t, int64_t n, int64_t group = 0) const {
        const int64_t bytes = dtype == f32 ? sizeof(float) : sizeof(uint16_t);
        Array part({a.shape[0], n, a.shape[2], a.shape[3]}, Index{0, 0, 0, 0});  // its extents alone count
        part.stride = a.stride;
        char *first = (char *)stored.data() + t * a.stride[1] * bytes;
        if (!group) return view(first, dtype, part, {3, 1, 2, 0});
        part.shape = {a.shape[0], n, a.shape[2] / group, group, a.shape[3]};
        part.stride = {a.stride[0], a.stride[1], a.stride[2] * group, a.stride[2], a.stride[3]};
        return view(first, dtype, part, {4, 1, 3, 2, 0});
    }
    static Buffer gates(Array &a, int64_t t, int64_t n) {
        Buffer buffer = view(a.data() + t * a.stride[1], f32, a, {1, 2, 0});
        buffer.raw_buffer()->dim[0].extent = (int32_t)n;
        return buffer;
    }
    static Buffer state_of(Array &a) { return view(a.data(), f32, a, {3, 2, 1, 0}); }
    static Buffer keys_of(Array &a) { return view(a.data(), f32, a, {2, 1, 0}); }
    static reference::Strided strided(const Array &a, int64_t t = 0) {
        reference::Strided x{a.data() + (t ? t * a.stride[1] : 0), {}};
        std::copy(a.stride.begin(), a.stride.end(), x.stride.begin());
        return x;
    }
};

class PowerCall : PowerTensors<PowerCase> {
public:
    PowerCall(const PowerCase &c, Size size, int degree, const Dtype &dtype = f32, bool dense_states = false)
        : PowerTensors(c, size, degree, dtype, dense_states, -1) {
        if (c.size_of_queries.empty()) return;
        each(q.shape, [&](const Index &i) { q(i) *= (float)c.size_of_queries[i[2] % c.G]; });
        round_to(dtype, q);
    }

    /// kernel(q, k, v, log_decay, state_in, keys_in, degree, normalize, scale, out, state_out, keys_out) returns 0 for every chunk,
    /// and together they do what the reference does.
    template<class Kernel>
    void expect_reference(const Kernel &kernel) {
        SCOPED_TRACE(c.name + ", degree " + std::to_string(degree));
        const reference::PowerResult want = reference::power(inputs(0, T, state, keys));

        const Array before[] = {q, k, v, log_decay};
        Stored sq(dtype, q), sk(dtype, k), sv(dtype, v), so(dtype, out);
        Array next_state = state, next_keys = keys;
        int64_t t = 0;
        for (int64_t n : c.calls) {
            Buffer bq = rows(sq, q, t, n, c.G), bk = rows(sk, k, t, n), bv = rows(sv, v, t, n), bo = rows(so, out, t, n, c.G);
            if (c.no_queries) bq.raw_buffer()->dim[2].extent = bo.raw_buffer()->dim[2].extent = 0;
            Buffer bg = gates(log_decay, t, n), bs = state_of(state), bz = state_of(next_state);
            Buffer bc = keys_of(keys), by = keys_of(next_keys);
            // A GPU's kernel copies what it reads, and all of an output: what it does not write there stays as it is.
            for (Buffer *buffer : {&bq, &bk, &bv, &bg, &bs, &bc, &bo, &bz, &by}) buffer->set_host_dirty();
            Buffer &to = c.in_place ? bs : bz, &keys_to = c.in_place ? bc : by;
            ASSERT_EQ(kernel(bq, bk, bv, bg, bs, bc, degree, (int)c.normalize, scale, bo, to, keys_to), 0);
            for (Buffer *buffer : {&bo, &to, &keys_to}) ASSERT_EQ(buffer->copy_to_host(), 0);
            if (!c.in_place) std::swap(state, next_state), std::swap(keys, next_keys);
            t += n;
        }
        const int64_t longest = *std::max_element(c.calls.begin(), c.calls.end());
        const double share = tolerance::of_power_spread(K, D, longest, (int64_t)c.calls.size());
        Array untouched = out;
        if (c.no_queries)
            EXPECT_TRUE(same_bits(out, untouched.forget()));
        else
            so.load(), expect_close("out", out, want.out, want.out_spread, share, dtype);
        expect_close("state", state, want.state, want.state_spread, share);
        if (c.normalize) expect_close("sum of keys", keys, want.keys, want.keys_spread, share);
        EXPECT_TRUE(out.gaps_intact() && so.gaps_intact() && state.gaps_intact() && keys.gaps_intact())
            << "memory between the rows was written";
        const Array *after[] = {&q, &k, &v, &log_decay};
        for (int n = 0; n < 4; n++) EXPECT_TRUE(after[n]->same_memory(before[n])) << "input " << n << " was written";
        const Stored *stored[] = {&sq, &sk, &sv};
        for (int n = 0; n < 3; n++) EXPECT_TRUE(stored[n]->unchanged()) << "input " << n << " was written";
    }
};

/// The kernel of one token as one of a chunk: steps of each batch entry, in place.
template<class Step>
auto token_by_token(const Step &step) {
    using Buffer = Halide::Runtime::Buffer<void>;
    return [=](const Buffer &q, const Buffer &k, const Buffer &v, const Buffer &log_decay, const Buffer &state_in,
               const Buffer &keys_in, int degree, int normalize, float scale, const Buffer &out, Buffer &state, Buffer &keys) {
        state.copy_from(state_in), keys.copy_from(keys_in);
        const int D = state.dim(1).extent(), V = state.dim(0).extent(), H = state.dim(2).extent();
        int block = 1;  // any divisor
        for (int n = 2; n <= 100; n++)
            if (D % n == 0) block = n;
        const int G = q.dim(2).extent(), of_block = V * G;
        std::vector<float> memory(of_block * (D / block) * H), keys_before(D * H);
        for (int b = 0; b < q.dim(4).extent(); b++)
            for (int t = 0; t < q.dim(1).extent(); t++) {
                Buffer bs = state.sliced(3, b), by = keys.sliced(2, b);
                const halide_dimension_t rows = bs.raw_buffer()->dim[1], head = bs.raw_buffer()->dim[2];
                const int row = rows.stride, of_head = of_block * (D / block);
                const halide_dimension_t in_blocks[] = {
                    {0, V, 1}, {0, block, row}, {0, G, 0}, {0, D / block, row * block}, {0, H, head.stride}};
                const halide_dimension_t sums[] = {
                    {0, V, 1}, {0, block, 0}, {0, G, V}, {0, D / block, of_block}, {0, H, of_head}};
                const halide_dimension_t features[] = {{0, D, 1}, {0, H, D}};
                Buffer blocks(halide_type_of<float>(), bs.data(), 5, in_blocks),
                    sum(halide_type_of<float>(), memory.data(), 5, sums),
                    before(halide_type_of<float>(), keys_before.data(), 2, features);
                Buffer bq = q.sliced(4, b).sliced(1, t), bk = k.sliced(3, b).sliced(1, t), bv = v.sliced(3, b).sliced(1, t);
                Buffer bg = log_decay.sliced(2, b).sliced(0, t), bo = out.sliced(4, b).sliced(1, t);
                // For a GPU's kernel, as above.
                for (Buffer *buffer : {&bq, &bk, &bv, &bg, &blocks, &sum, &by, &before, &bo}) buffer->set_host_dirty();
                if (int rc = step(bq, bk, bv, bg, block, D / block, degree, normalize, scale, blocks, sum, by, before, bo))
                    return rc;
                for (Buffer *buffer : {&blocks, &by, &bo})
                    if (int rc = buffer->copy_to_host()) return rc;
            }
        return 0;
    };
}

}  // namespace test
