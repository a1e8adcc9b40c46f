// Calls of power retention and normalised outputs for tests, and their reference.
#pragma once
#include "forward.h"
#include "reference/power.h"

namespace test {

/// A call of holdfast_forward with all that power retention takes, or the same by holdfast_step.
struct PowerProblem {
    int64_t B, T, H, G, K, V;  // H heads of keys, G of queries to each
    int degree = 2;
    bool normalize = true;
    Gates gates = Gates::weak;
    Dtype dtype = f32;
    holdfast_form form = HOLDFAST_FORM_AUTO;
    holdfast_expansion expansion = HOLDFAST_EXPANSION_TIGHT;
    bool value_major = false, initial = true;
    bool in_place = false;  // the final state and sum of keys are where the initial ones are
    int64_t chunk_size = 0;
    float scale = 0;
    Layout layout = Layout::compact;
    bool final = true;  // the final state and sum of keys are wanted

    Random random{};
    int64_t D = holdfast_state_size(K, degree, expansion);
    double low = degree % 2 && normalize ? 0.2 : -1;  // odd degrees keep the sign: denominators stay away from 0
    Array q = Array(Index{B, T, H * G, K}, layout).fill(random, low), k = Array(Index{B, T, H, K}, layout).fill(random, low);
    Array v = Array(Index{B, T, H, V}, layout).fill(random), log_decay = log_decays(gates, B, T, H, layout, random);
    Array out = Array(Index{B, T, H * G, V}, layout).forget();
    Array state = Array(states_shape()).fill(0), keys = Array(Index{sequences(), H, D}).fill(0);
    Array initial_state = state, initial_keys = keys;
    std::vector<int32_t> starts = {};  // of packed sequences

    int64_t sequences() const { return starts.empty() ? B : (int64_t)starts.size() - 1; }
    Index states_shape() const { return value_major ? Index{sequences(), H, V, D} : Index{sequences(), H, D, V}; }

    holdfast_status run(holdfast_context *context, int64_t from = 0, int64_t to = -1) {
        if (to < 0) to = T;
        for (Array *x : {&q, &k, &v}) round_to(dtype, *x);
        Tensor rows[] = {Tensor(q).part(1, from, to), Tensor(k).part(1, from, to), Tensor(v).part(1, from, to),
                         Tensor(out).part(1, from, to)};
        Tensor g = Tensor(log_decay).part(1, from, to), in(in_place ? state : initial_state),
               ink(in_place ? keys : initial_keys), fin(state), fink(keys);
        DLTensor dl[4], dl_g = g.dl(), dl_in = in.dl(), dl_ink = ink.dl(), dl_fin = fin.dl(), dl_fink = fink.dl();
        std::deque<Stored> stored;
        for (int n = 0; n < 4; n++) {
            stored.emplace_back(dtype, rows[n].data, rows[n].shape, rows[n].stride);
            dl[n] = rows[n].dl(), dl[n].data = stored.back().data(), dl[n].dtype = dl_type(dtype);
        }
        holdfast_forward_args args =
            forward_args(&dl[0], &dl[1], &dl[2], &dl_g, initial ? &dl_in : nullptr, &dl[3], final ? &dl_fin : nullptr);
        args.scale = scale, args.chunk_size = chunk_size, args.degree = degree, args.form = form, args.expansion = expansion;
        args.normalize = normalize ? HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS : HOLDFAST_NORMALIZE_NONE;
        args.state_layout = value_major ? HOLDFAST_STATE_VALUE_MAJOR : HOLDFAST_STATE_KEY_MAJOR;
        if (normalize)
            args.initial_sum_of_keys = initial ? &dl_ink : nullptr, args.final_sum_of_keys = final ? &dl_fink : nullptr;
        int64_t sequences = (int64_t)starts.size();
        DLTensor cu = {starts.data(), {kDLCPU, 0}, 1, {kDLInt, 32, 1}, &sequences, nullptr, 0};
        if (!starts.empty()) args.cu_seqlens = &cu;
        const holdfast_status status = holdfast_forward(context, &args);
        stored[3].load();
        initial_state = state, initial_keys = keys, initial = true;  // whoever goes on begins there
        return status;
    }
    /// Token t by holdfast_step, on state and keys.
    holdfast_status step(holdfast_context *context, int64_t t) {
        auto token = [&](Array &a) { return Tensor(a).part(1, t, t + 1).without(1); };
        Tensor tq = token(q), tk = token(k), tv = token(v), to = token(out), tg = token(log_decay), ts(state), tz(keys);
        DLTensor dq = tq.dl(), dk = tk.dl(), dv = tv.dl(), dout = to.dl(), dg = tg.dl(), ds = ts.dl(), dz = tz.dl();
        holdfast_step_args args = {};
        args.struct_size = sizeof args, args.q = &dq, args.k = &dk, args.v = &dv, args.log_decay = &dg, args.state = &ds;
        args.out = &dout, args.scale = scale, args.degree = degree, args.expansion = expansion;
        args.sum_of_keys = normalize ? &dz : nullptr;
        args.normalize = normalize ? HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS : HOLDFAST_NORMALIZE_NONE;
        args.state_layout = value_major ? HOLDFAST_STATE_VALUE_MAJOR : HOLDFAST_STATE_KEY_MAJOR;
        return holdfast_step(context, &args);
    }

    reference::PowerResult want(bool states = true) const {
        auto strided = [&](const Array &a) {
            reference::Strided x{a.data(), {}};
            std::copy(a.stride.begin(), a.stride.end(), x.stride.begin());
            return x;
        };
        static const float zero = 0;
        reference::PowerInputs in{B, T, H, G, K, V, degree, normalize};
        in.q = strided(q), in.k = strided(k), in.v = strided(v), in.log_decay = strided(log_decay);
        in.initial_state = in.initial_keys = {&zero, {}};
        in.scale = scale != 0 ? scale : 1 / std::sqrt((double)K);
        in.states = states;
        return reference::power(in);
    }
    double share(int64_t chunk = 128) const { return tolerance::of_power_spread(K, D, chunk, T / 64 + 2); }
};

/// States of `columns` values or sums of keys, key-major, from the tight order of features, which the reference has, to that of `p`: by
/// the formulas of holdfast.h.
inline std::vector<double> ordered_as_of(const PowerProblem &p, const std::vector<double> &tight, int64_t columns) {
    if (p.expansion == HOLDFAST_EXPANSION_TIGHT) return tight;
    const size_t size = holdfast_state_size(p.K, 2, HOLDFAST_EXPANSION_TIGHT) * columns;
    std::vector<double> tiled;
    for (size_t first = 0; first < tight.size(); first += size)
        for (int64_t Y = 0; Y < p.K / 16; Y++)
            for (int64_t o = 0; o < 16 * (Y + 1); o++)
                for (int64_t i = 0; i < 16; i++) {
                    const int64_t a = std::min(o, 16 * Y + i), b = std::max(o, 16 * Y + i);
                    const double factor = (o < 16 * Y ? 2 : 1) / (a < b ? std::sqrt(2.0) : 1);
                    const double *row = &tight[first + (a + b * (b + 1) / 2) * columns];
                    for (int64_t e = 0; e < columns; e++) tiled.push_back(factor * row[e]);
                }
    return tiled;
}

inline void expect_right(PowerProblem &p, const reference::PowerResult &want) {
    expect_close("out", p.out, want.out, want.out_spread, p.share(), p.dtype);
    Array state = p.state;  // key-major
    if (p.value_major) std::swap(state.shape[2], state.shape[3]), std::swap(state.stride[2], state.stride[3]);
    expect_close("state", state, ordered_as_of(p, want.state, p.V), ordered_as_of(p, want.state_spread, p.V), p.share());
    if (p.normalize)
        expect_close("sum of keys", p.keys, ordered_as_of(p, want.keys, 1), ordered_as_of(p, want.keys_spread, 1), p.share());
}

}  // namespace test
