// Calls of holdfast_backward for tests: problems with random contents, what is wanted of them, and their reference.
#pragma once
#include "forward.h"
#include "reference/backward.h"
#include "reference/power_backward.h"

namespace test {

/// What a call is handed: views of arrays, for as long as this lives.
class Arguments {
public:
    explicit Arguments(const Dtype &dtype) : dtype(dtype) {}
    Arguments(const Arguments &) = delete;

    DLTensor *floats(Tensor x) {
        tensors.push_back(x);
        views.push_back(tensors.back().dl());
        return &views.back();
    }
    /// In the type, from and to the floats.
    DLTensor *rows(Array &x, bool written = false) {
        Tensor t(x);
        (written ? outputs : inputs).emplace_back(dtype, t.data, t.shape, t.stride);
        DLTensor *view = floats(t);
        view->data = (written ? outputs : inputs).back().data(), view->dtype = dl_type(dtype);
        return view;
    }
    DLTensor *starts(Index &list) {
        if (list.empty()) return nullptr;
        bounds = (int64_t)list.size();
        cu_seqlens = {list.data(), {kDLCPU, 0}, 1, {kDLInt, 64, 1}, &bounds, nullptr, 0};
        return &cu_seqlens;
    }
    /// After the call: what has been written is in the floats.
    void finish() {
        for (const Stored &s : inputs) EXPECT_TRUE(s.unchanged()) << "an input was written";
        for (Stored &s : outputs) {
            EXPECT_TRUE(s.gaps_intact()) << "memory between the elements of an output was written";
            s.load();
        }
    }

private:
    const Dtype dtype;
    std::deque<Tensor> tensors;
    std::deque<DLTensor> views;
    std::deque<Stored> inputs, outputs;
    int64_t bounds = 0;
    DLTensor cu_seqlens = {};
};

/// Gradients of a call, of its states in the order that they have there.
struct BackwardReference {
    struct Values {
        std::vector<double> value, spread;
    };
    Values q, k, v, log_decay, state, keys;
};

/// A call of holdfast_backward with all that it takes.
struct Backward {
    int64_t B, T, H, G, K, V;  // H heads of keys, G of queries to each
    int degree = 1;
    bool normalize = false;
    Gates gates = Gates::weak;
    Dtype dtype = f32;
    Layout layout = Layout::compact;
    bool initial = true, final = true;  // an initial state; gradients of the final one, and that of the initial one wanted
    Index starts = {};                  // of packed sequences, and T
    holdfast_form form = HOLDFAST_FORM_CHUNKWISE;
    holdfast_expansion expansion = HOLDFAST_EXPANSION_TIGHT;
    bool value_major = false;
    int64_t chunk_size = 0;
    float scale = 0;               // the default, K^-1/2
    int64_t state_interval = 0;    // of the states that the forward keeps; 0: none
    bool rounds_operands = false;  // by a variant that does
    bool has_dout = true;
    bool has_dstate = true, has_dsum = true;  // of the gradients of the final ones
    std::string target = "";                  // where a test makes a context for it

    Random random{};
    int64_t N = starts.empty() ? B : (int64_t)starts.size() - 1;
    int64_t D = holdfast_state_size(K, degree, expansion);
    // Odd degrees keep the sign: sums of weights stay away from 0.
    double low = degree % 2 && normalize ? 0.2 : -1;
    Array q = array({B, T, H * G, K}, low), k = array({B, T, H, K}, low), v = array({B, T, H, V});
    Array log_decay = log_decays(gates, B, T, H, layout, random);
    Array initial_state = states(), initial_keys = keys();
    Array out = array({B, T, H * G, V}).forget(), final_state = states().forget(), final_keys = keys().forget();
    Array dout = array({B, T, H * G, V}), dfinal_state = states(), dfinal_keys = array({N, H, D});
    Array dq = like(q), dk = like(k), dv = like(v), dinitial_state = like(initial_state), dinitial_keys = like(initial_keys);
    Array dlog_decay = gates == Gates::per_head ? Array({H}).forget() : Array({B, T, H}, layout).forget();
    Array kept = kept_states();
    /// Of q, k, v, g (log_decay), s (initial state) and z (its sum of keys) those that are wanted.
    std::string wanted = std::string("qkv") + (gates == Gates::none ? "" : "g") + (final ? normalize ? "sz" : "s" : "");

    /// Of kernels of chunks of so many tokens.
    double share(int64_t chunk) const {
        const int64_t chunks = T / std::max<int64_t>(chunk, 1) + 2;
        return is_power() ? tolerance::of_power_gradient_spread(K, V, D, G * chunk, chunks)
                          : tolerance::of_gradient_spread(K, V, G * chunk, chunks);
    }
    bool is_power() const { return degree > 1 || normalize; }
    bool wants(char what) const { return wanted.find(what) != std::string::npos; }

    /// holdfast_forward: out and the final states.
    holdfast_status forward(holdfast_context *context) {
        round();
        Arguments a(dtype);
        holdfast_forward_args args = forward_args(a.rows(q), a.rows(k), a.rows(v), decays(a), given(a, initial_state, initial),
                                                  a.rows(out, true), given(a, final_state, final));
        args.initial_sum_of_keys = sums(a, initial_keys, initial), args.final_sum_of_keys = sums(a, final_keys, final);
        options(args, a);
        const holdfast_status status = holdfast_forward(context, &args);
        a.finish();
        return status;
    }

    /// holdfast_backward, after the forward whose results it takes.
    holdfast_status run(holdfast_context *context) {
        if (normalize || state_interval)
            if (const holdfast_status status = forward(context)) return status;
        return backward(context);
    }
    holdfast_status backward(holdfast_context *context) {
        round();
        Arguments a(dtype);
        holdfast_backward_args args = {};
        args.struct_size = sizeof args;
        args.q = a.rows(q), args.k = a.rows(k), args.v = a.rows(v), args.log_decay = decays(a);
        if (has_dout) args.dout = a.rows(dout);
        args.initial_state = given(a, initial_state, initial), args.initial_sum_of_keys = sums(a, initial_keys, initial);
        args.dfinal_state = given(a, dfinal_state, final && has_dstate);
        args.dfinal_sum_of_keys = sums(a, dfinal_keys, final && has_dsum);
        if (normalize) args.out = a.rows(out);
        if (wants('q')) args.dq = a.rows(dq, true);
        if (wants('k')) args.dk = a.rows(dk, true);
        if (wants('v')) args.dv = a.rows(dv, true);
        if (wants('g')) args.dlog_decay = a.floats(dlog_decay);
        args.dinitial_state = given(a, dinitial_state, wants('s'));
        args.dinitial_sum_of_keys = sums(a, dinitial_keys, wants('z'));
        options(args, a);
        const holdfast_status status = holdfast_backward(context, &args);
        a.finish();
        return status;
    }

    /// Everything that is wanted is what the reference says, for kernels of chunks of so many tokens.
    void expect_reference(int64_t chunk) const {
        const BackwardReference want = reference(chunk);
        auto expect = [&](char what, const char *name, const Array &got, const BackwardReference::Values &values, Dtype type) {
            double share = this->share(chunk);
            if (rounds_operands && what != 's') share += tolerance::of_rounded_gradients(dtype);
            if (!wants(what))
                EXPECT_TRUE(same_bits(got, Array(got).forget())) << name << " is not wanted, and was written";
            else
                expect_close(name, got, values.value, values.spread, share, type);
            EXPECT_TRUE(got.gaps_intact()) << "memory between the elements of " << name << " was written";
        };
        expect('q', "dq", dq, want.q, dtype), expect('k', "dk", dk, want.k, dtype), expect('v', "dv", dv, want.v, dtype);
        expect('g', "dlog_decay", dlog_decay, want.log_decay, f32);
        expect('s', "dinitial_state", dinitial_state, want.state, f32);
        expect('z', "dinitial_sum_of_keys", dinitial_keys, want.keys, f32);
    }

    BackwardReference reference(int64_t chunk) const {
        BackwardReference all;
        auto reserve = [](BackwardReference::Values &x, const Array &like) {
            int64_t size = 1;
            for (int64_t extent : like.shape) size *= extent;
            x.value.assign(size, 0), x.spread.assign(size, 0);
        };
        reserve(all.q, q), reserve(all.k, k), reserve(all.v, v), reserve(all.log_decay, dlog_decay);
        reserve(all.state, initial_state), reserve(all.keys, initial_keys);
        const int64_t tight = holdfast_state_size(K, degree, HOLDFAST_EXPANSION_TIGHT);
        for (int64_t s = 0; s < N; s++) {
            const int64_t b = starts.empty() ? s : 0, from = starts.empty() ? 0 : starts[s];
            const int64_t length = starts.empty() ? T : starts[s + 1] - from;
            const Array state = in_tight_order(initial ? initial_state : zeros(initial_state), s, Of::states);
            const Array sum = in_tight_order(initial ? initial_keys : zeros(initial_keys), s, Of::states);
            const Array dstate = in_tight_order(final && has_dstate ? dfinal_state : zeros(dfinal_state), s, Of::gradients);
            const Array dsum = in_tight_order(final && has_dsum ? dfinal_keys : zeros(dfinal_keys), s, Of::gradients);
            auto rows = [&](const Array &a) { return strided(a, b * a.stride[0] + from * a.stride[1]); };
            BackwardReference one;
            const double used_scale = scale != 0 ? scale : 1 / std::sqrt((double)K);
            if (is_power() || G == 0) {  // the other one divides by G
                reference::PowerInputs in{1, length, H, G, K, V, degree, normalize};
                in.q = rows(q), in.k = rows(k), in.v = rows(v), in.log_decay = rows(log_decay), in.scale = used_scale;
                in.initial_state = strided(state), in.initial_keys = strided(sum), in.states = initial || final || wants('s');
                const reference::Strided given = normalize ? rows(out) : reference::Strided();
                reference::PowerGradients r =
                    reference::power_backward(in, rows(dout), strided(dstate), strided(dsum), given, chunk);
                one = {{r.dq, r.dq_spread},         {r.dk, r.dk_spread},
                       {r.dv, r.dv_spread},         {r.dlog_decay, r.dlog_decay_spread},
                       {r.dstate, r.dstate_spread}, {r.dkeys, r.dkeys_spread}};
            } else {
                reference::Inputs in{1, length, H * G, K, V, G};
                in.q = rows(q), in.k = rows(k), in.v = rows(v), in.log_decay = rows(log_decay), in.scale = used_scale;
                in.initial_state = strided(state);
                const reference::Gradients r = reference::retention_backward(in, rows(dout), strided(dstate)),
                                           of = reference::spread_backward(in, rows(dout), strided(dstate));
                one = {{r.q, of.q}, {r.k, of.k}, {r.v, of.v}, {r.log_decay, of.log_decay}, {r.initial_state, of.initial_state},
                       {}};
                one.keys.value.assign(H * tight, 0), one.keys.spread = one.keys.value;
            }
            // To their places.
            auto put = [&](const BackwardReference::Values &x, BackwardReference::Values &to, int64_t at) {
                std::copy(x.value.begin(), x.value.end(), to.value.begin() + at);
                std::copy(x.spread.begin(), x.spread.end(), to.spread.begin() + at);
            };
            put(one.q, all.q, (b * T + from) * H * G * K), put(one.k, all.k, (b * T + from) * H * K);
            put(one.v, all.v, (b * T + from) * H * V);
            if (gates != Gates::per_head)
                put(one.log_decay, all.log_decay, (b * T + from) * H);
            else
                // Errors of tokens' gradients have sums in common: they may have one sign.
                for (size_t n = 0; n < one.log_decay.value.size(); n++) {
                    all.log_decay.value[n % H] += one.log_decay.value[n];
                    all.log_decay.spread[n % H] += one.log_decay.spread[n];
                }
            from_tight_order(one.state, all.state, s, V), from_tight_order(one.keys, all.keys, s, 1);
        }
        return all;
    }

    /// Of tokens from .. to - 1 alone, with the states as they are here.
    Backward tokens(int64_t from, int64_t to) const {
        Backward part{B, to - from, H, G, K, V, degree, normalize, gates, dtype, Layout::compact, initial, final};
        part.form = form, part.chunk_size = chunk_size, part.scale = scale;
        auto rows = [&](const Array &a) { return slice(a, 1, from, to - from); };
        part.q = rows(q), part.k = rows(k), part.v = rows(v), part.dout = rows(dout), part.log_decay = rows(log_decay);
        part.initial_state = initial_state, part.initial_keys = initial_keys;
        part.dfinal_state = dfinal_state, part.dfinal_keys = dfinal_keys;
        return part;
    }

    /// Of one that has state_interval set.
    Array kept_states() {
        int64_t M = 0;
        for (int64_t s = 0; s < N && state_interval; s++)
            M += ((starts.empty() ? T : starts[s + 1] - starts[s]) + state_interval - 1) / state_interval + 1;
        if (!value_major) return Array({M, H, D, V}, layout).forget();
        Index stride = strides({M, H, V, D}, layout);
        std::swap(stride[2], stride[3]);
        return Array({M, H, D, V}, stride).forget();
    }

    std::vector<Array *> gradients() { return {&dq, &dk, &dv, &dlog_decay, &dinitial_state, &dinitial_keys}; }

    static reference::Strided strided(const Array &a, int64_t at = 0) {
        reference::Strided x{a.data() + at, {}};
        std::copy(a.stride.begin(), a.stride.end(), x.stride.begin());
        return x;
    }

private:
    Array array(const Index &shape, double least = -1) { return Array(shape, layout).fill(random, least); }
    static Array like(const Array &a) { return Array(a).forget(); }
    static Array zeros(const Array &a) { return Array(a).fill(0); }

    /// [N, H, D, V] by index, however it lies.
    Array states() {
        const Index shape = {N, H, D, V};
        if (!value_major) return array(shape);
        Index stride = strides({N, H, V, D}, layout);
        std::swap(stride[2], stride[3]);
        return Array(shape, stride).fill(random);
    }
    /// Sums of a few keys, so that sums of weights stay away from 0; in any order of features.
    Array keys() {
        Array tight({N, H, holdfast_state_size(K, degree, HOLDFAST_EXPANSION_TIGHT)}), sum({N, H, D}, layout);
        if (!normalize) return sum.fill(random);
        tight.fill(0);
        for (int64_t n = 0; n < N; n++)
            for (int64_t h = 0; h < H; h++)
                for (int key = 0; key < 3; key++) {
                    std::vector<double> x(K);
                    for (double &element : x) element = random(low, 1);
                    const std::vector<double> features = reference::phi(x, degree);
                    for (size_t f = 0; f < features.size(); f++) tight({n, h, (int64_t)f}) += (float)features[f];
                }
        if (expansion == HOLDFAST_EXPANSION_TIGHT) {
            each(sum.shape, [&](const Index &i) { sum(i) = tight(i); });
        } else {
            Tensor from(tight), to(sum);
            const DLTensor dl_from = from.dl();
            DLTensor dl_to = to.dl();
            EXPECT_EQ(holdfast_convert_state(nullptr, K, &dl_from, HOLDFAST_EXPANSION_TIGHT, &dl_to, expansion), HOLDFAST_OK);
        }
        return sum;
    }

    enum class Of { states, gradients };

    /// The matrix of holdfast_convert_state, out of the caller's order or into it: what it makes of the identity.
    Array conversion(bool out_of) const {
        const int64_t tight = holdfast_state_size(K, degree, HOLDFAST_EXPANSION_TIGHT), columns = out_of ? D : tight;
        Array identity({1, 1, columns, columns}), matrix({1, 1, out_of ? tight : D, columns});
        each(identity.shape, [&](const Index &i) { identity(i) = i[2] == i[3]; });
        Tensor from(identity), to(matrix);
        const DLTensor dl_from = from.dl();
        DLTensor dl_to = to.dl();
        const int32_t order[] = {expansion, HOLDFAST_EXPANSION_TIGHT};
        EXPECT_EQ(holdfast_convert_state(nullptr, K, &dl_from, order[!out_of], &dl_to, order[out_of]), HOLDFAST_OK);
        return matrix;
    }

    /// Sequence s of a state or sum of keys, or of a gradient by one, [1, H, D or tight D(, V)]. Gradients go by the transpose of the
    /// way that what they are gradients of takes.
    Array in_tight_order(const Array &all, int64_t s, Of of) const {
        const Array own = slice(all, 0, s, 1);
        if (expansion == HOLDFAST_EXPANSION_TIGHT) return own;
        const Array matrix = conversion(of == Of::states);
        Index shape = own.shape;
        shape[2] = holdfast_state_size(K, degree, HOLDFAST_EXPANSION_TIGHT);
        Array tight(shape);
        each(shape, [&](Index i) {
            double sum = 0;
            const int64_t f = i[2];
            float &element = tight(i);
            for (i[2] = 0; i[2] < D; i[2]++)
                sum += (double)own(i) * (of == Of::states ? matrix({0, 0, f, i[2]}) : matrix({0, 0, i[2], f}));
            element = (float)sum;
        });
        return tight;
    }
    /// Gradients by initial states, [1, H, tight D, columns], to where those of sequence s are.
    void from_tight_order(const BackwardReference::Values &x, BackwardReference::Values &to, int64_t s, int64_t columns) const {
        if (expansion == HOLDFAST_EXPANSION_TIGHT) {
            std::copy(x.value.begin(), x.value.end(), to.value.begin() + s * H * D * columns);
            std::copy(x.spread.begin(), x.spread.end(), to.spread.begin() + s * H * D * columns);
            return;
        }
        const Array matrix = conversion(true);
        const int64_t tight = matrix.shape[2];
        each({H, D, columns}, [&](const Index &i) {
            double sum = 0, squares = 0;
            for (int64_t f = 0; f < tight; f++) {
                const int64_t n = (i[0] * tight + f) * columns + i[2];
                const double factor = matrix({0, 0, f, i[1]});
                sum += factor * x.value[n], squares += factor * factor * x.spread[n] * x.spread[n];
            }
            const int64_t at = ((s * H + i[0]) * D + i[1]) * columns + i[2];
            to.value[at] = sum, to.spread[at] = std::sqrt(squares);
        });
    }

    void round() {
        for (Array *x : {&q, &k, &v, &dout}) round_to(dtype, *x);
    }
    DLTensor *decays(Arguments &a) {
        if (gates == Gates::none) return nullptr;
        return a.floats(gates == Gates::per_head ? Tensor(log_decay.data(), {H}, {log_decay.stride[2]}) : Tensor(log_decay));
    }
    DLTensor *given(Arguments &a, Array &state, bool is) {
        if (!is) return nullptr;
        Tensor t(state);
        if (value_major) std::swap(t.shape[2], t.shape[3]), std::swap(t.stride[2], t.stride[3]);
        return a.floats(t);
    }
    DLTensor *sums(Arguments &a, Array &sum, bool is) { return normalize && is ? a.floats(sum) : nullptr; }
    template<class Args>
    void options(Args &args, Arguments &a) {
        args.scale = scale, args.chunk_size = chunk_size, args.degree = degree, args.form = form, args.expansion = expansion;
        args.normalize = normalize ? HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS : HOLDFAST_NORMALIZE_NONE;
        args.state_layout = value_major ? HOLDFAST_STATE_VALUE_MAJOR : HOLDFAST_STATE_KEY_MAJOR;
        args.cu_seqlens = a.starts(starts);
        args.states = given(a, kept, state_interval > 0), args.state_interval = state_interval;
    }
};

}  // namespace test
