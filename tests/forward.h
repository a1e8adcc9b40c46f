// Calls of holdfast_forward for tests: tensors over Arrays, contexts, problems with random contents and their reference.
#pragma once
#include "check.h"
#include "reference/retention.h"
#include "shapes.h"
#include "stored.h"

#include <holdfast/holdfast.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

namespace test {

/// A context with the messages of its verbose callback.
class Context {
public:
    explicit Context(const std::string &target = "", int threads = 0) {
        EXPECT_NE(context.get(), nullptr);
        EXPECT_EQ(holdfast_context_set_verbose(*this, listen, this), HOLDFAST_OK);
        EXPECT_EQ(holdfast_context_set_threads(*this, threads), HOLDFAST_OK);
        const char *forced = target.empty() ? nullptr : target.c_str();
        EXPECT_EQ(holdfast_context_set_target(*this, forced), HOLDFAST_OK) << error();
    }
    Context(const Context &) = delete;
    operator holdfast_context *() const { return context.get(); }
    std::string error() const { return holdfast_last_error(*this); }
    void destroy() { context.reset(); }

    std::vector<std::string> messages;

private:
    using Pointer = std::unique_ptr<holdfast_context, void (*)(holdfast_context *)>;
    Pointer context{holdfast_context_create(), holdfast_context_destroy};

    static void listen(void *user, const char *message) { ((Context *)user)->messages.push_back(message); }
};

/// Memory seen as a tensor, with its own shape and strides.
struct Tensor {
    float *data = nullptr;
    Index shape, stride;

    Tensor() = default;
    Tensor(float *data, const Index &shape, const Index &stride) : data(data), shape(shape), stride(stride) {}
    Tensor(Array &a) : Tensor(a.data(), a.shape, a.stride) {}

    /// Of axis `axis`, only from .. to - 1.
    Tensor part(int axis, int64_t from, int64_t to) const {
        Tensor t = *this;
        t.data += from * stride[axis];
        t.shape[axis] = to - from;
        return t;
    }
    /// Without axis `axis`, of which the first is left.
    Tensor without(int axis) const {
        Tensor t = *this;
        t.shape.erase(t.shape.begin() + axis), t.stride.erase(t.stride.begin() + axis);
        return t;
    }
    /// DLPack's view. It points into this object.
    DLTensor dl() { return {data, {kDLCPU, 0}, (int32_t)shape.size(), {kDLFloat, 32, 1}, shape.data(), stride.data(), 0}; }
};

inline DLDataType dl_type(const Dtype &dtype) {
    if (dtype == f32) return {kDLFloat, 32, 1};
    return {(uint8_t)(dtype == f16 ? kDLFloat : kDLBfloat), 16, 1};
}

/// The arguments that every call has, tensors that may be NULL; all options are off.
inline holdfast_forward_args forward_args(const DLTensor *q, const DLTensor *k, const DLTensor *v, const DLTensor *log_decay,
                                          const DLTensor *initial_state, DLTensor *out, DLTensor *final_state) {
    holdfast_forward_args args = {};
    args.struct_size = sizeof args;
    args.q = q, args.k = k, args.v = v, args.log_decay = log_decay, args.initial_state = initial_state;
    args.out = out, args.final_state = final_state;
    return args;
}

/// Arguments of holdfast_forward. A Tensor without data is not given. q, k, v and out are handed over in the type `dtype`,
/// from and to the floats here.
struct Forward {
    Tensor q, k, v, log_decay, initial_state, out, final_state;
    float scale = 0;
    int64_t chunk_size = 0;
    Dtype dtype = f32;
    holdfast_form form = HOLDFAST_FORM_AUTO;
    holdfast_state_layout state_layout = HOLDFAST_STATE_KEY_MAJOR;
    Index starts = {};  // of packed sequences, and T
    Tensor states = {};
    int64_t state_interval = 0;

    holdfast_status run(holdfast_context *context) {
        Tensor *tensors[] = {&q, &k, &v, &log_decay, &initial_state, &out, &final_state, &states};
        DLTensor dl[8];
        for (int n = 0; n < 8; n++) dl[n] = tensors[n]->dl();
        std::deque<Stored> stored;
        for (int n : {0, 1, 2, 5}) {
            stored.emplace_back(dtype, tensors[n]->data, tensors[n]->shape, tensors[n]->stride);
            dl[n].data = stored.back().data(), dl[n].dtype = dl_type(dtype);
        }
        auto given = [&](int n) { return tensors[n]->data ? &dl[n] : nullptr; };
        holdfast_forward_args args = forward_args(given(0), given(1), given(2), given(3), given(4), given(5), given(6));
        args.scale = scale, args.chunk_size = chunk_size, args.form = form, args.state_layout = state_layout;
        int64_t sequences = (int64_t)starts.size();
        const DLTensor cu_seqlens = {starts.data(), {kDLCPU, 0}, 1, {kDLInt, 64, 1}, &sequences, nullptr, 0};
        if (sequences) args.cu_seqlens = &cu_seqlens;
        args.states = given(7), args.state_interval = state_interval;
        const holdfast_status status = holdfast_forward(context, &args);
        for (int n : {0, 1, 2}) EXPECT_TRUE(stored[n].unchanged()) << "input " << n << " was written";
        EXPECT_TRUE(stored[3].gaps_intact()) << "memory between the elements of out was written";
        stored[3].load();
        return status;
    }

    Forward tokens(int64_t from, int64_t to) const {
        Forward f = *this;
        for (Tensor *x : {&f.q, &f.k, &f.v, &f.out}) *x = x->part(1, from, to);
        if (log_decay.shape.size() == 3) f.log_decay = log_decay.part(1, from, to);
        return f;
    }
    Forward head(int64_t b, int64_t h) const {
        Forward f = *this;
        for (Tensor *x : {&f.q, &f.k, &f.v, &f.out}) *x = x->part(0, b, b + 1).part(2, h, h + 1);
        for (Tensor *x : {&f.initial_state, &f.final_state})
            if (x->data) *x = x->part(0, b, b + 1).part(1, h, h + 1);
        if (log_decay.shape.size() == 3) f.log_decay = log_decay.part(0, b, b + 1).part(2, h, h + 1);
        if (log_decay.shape.size() == 1) f.log_decay = log_decay.part(0, h, h + 1);
        return f;
    }
};

/// Random inputs, outputs that wait to be written, and what must be written to them.
struct Problem {
    int64_t B, T, H, K, V;
    Gates gates = Gates::weak;
    Layout layout = Layout::compact;
    bool initial = true;  // an initial state is given
    Dtype dtype = f32;
    int64_t group = 1;  // heads of queries to one of keys
    Index starts = {};  // of packed sequences, and T; {}: each batch entry is one
    bool value_major = false;

    Random random{};
    int64_t Hk = H / group, N = starts.empty() ? B : (int64_t)starts.size() - 1;
    Array q = array({B, T, H, K}), k = array({B, T, Hk, K}), v = array({B, T, Hk, V});
    Array log_decay = log_decays(gates, B, T, Hk, layout, random);
    Array initial_state = state();
    Array out = array({B, T, H, V}).forget(), final_state = state().forget();
    float scale = 0;  // the default, K^-1/2

    /// The call, with everything that there is. A decay that is the same for all tokens is given per head. q, k and v are
    /// rounded to the type first.
    Forward forward() {
        for (Array *x : {&q, &k, &v}) round_to(dtype, *x);
        Forward f{q, k, v, {}, {}, out, final_state};
        f.scale = scale, f.dtype = dtype, f.starts = starts;
        if (value_major) f.state_layout = HOLDFAST_STATE_VALUE_MAJOR;
        if (initial) f.initial_state = initial_state;
        if (gates == Gates::per_head)
            f.log_decay = Tensor(log_decay.data(), {Hk}, {log_decay.stride[2]});
        else if (gates != Gates::none)
            f.log_decay = log_decay;
        return f;
    }

    /// Of all batch entries, or of packed sequence s.
    reference::Inputs inputs(int64_t s = 0) const {
        const int64_t start = starts.empty() ? 0 : starts[s], length = starts.empty() ? T : starts[s + 1] - start;
        auto rows = [&](const Array &a) {
            reference::Strided x{a.data() + start * a.stride[1], {}};
            std::copy(a.stride.begin(), a.stride.end(), x.stride.begin());
            return x;
        };
        static const float zero = 0;
        reference::Inputs in{B, length, H, K, V, group};
        in.q = rows(q), in.k = rows(k), in.v = rows(v), in.log_decay = rows(log_decay);
        in.initial_state = {&zero, {}};
        if (initial) {
            in.initial_state.data = initial_state.data() + s * initial_state.stride[0];
            std::copy(initial_state.stride.begin(), initial_state.stride.end(), in.initial_state.stride.begin());
            if (value_major) std::swap(in.initial_state.stride[2], in.initial_state.stride[3]);
        }
        in.scale = scale != 0 ? scale : 1 / std::sqrt((double)K);
        return in;
    }

    /// States every so many tokens, and after all: how many, of all sequences; and that they are what the reference says.
    int64_t states_inside(int64_t interval) const {
        int64_t count = 0;
        for (int64_t s = 0; s < N; s++) count += (length(s) + interval - 1) / interval + 1;
        return count;
    }
    int64_t length(int64_t s) const { return starts.empty() ? T : starts[s + 1] - starts[s]; }
    void expect_states(const Array &states, int64_t interval, int64_t chunk, int64_t decays,
                       bool rounded_operands = false) const {
        const tolerance::OfCall allowed = tolerance::of_call(K, chunk, decays, dtype, rounded_operands);
        Array key_major = states;
        if (value_major) std::swap(key_major.shape[2], key_major.shape[3]), std::swap(key_major.stride[2], key_major.stride[3]);
        int64_t n = 0;
        for (int64_t s = 0; s < N; s++)
            for (int64_t t = 0;; t += interval, n++) {
                SCOPED_TRACE("sequence " + std::to_string(s) + ", after " + std::to_string(t) + " tokens");
                reference::Inputs in = inputs(starts.empty() ? 0 : s);
                in.T = std::min(t, length(s));
                const std::vector<double> want = reference::retention(in).state, spread = reference::spread(in).state;
                const int64_t size = Hk * K * V, from = starts.empty() ? s * size : 0;
                auto part = [&](const std::vector<double> &x) {
                    return std::vector<double>(x.begin() + from, x.begin() + from + size);
                };
                expect_close("states", slice(key_major, 0, n, 1), part(want), part(spread), allowed.state, f32,
                             allowed.absolute);
                if (t >= length(s)) {
                    n++;
                    break;
                }
            }
        EXPECT_EQ(n, states.shape[0]);
        EXPECT_TRUE(states.gaps_intact()) << "memory between the states was written";
    }

    /// out and final_state are what the reference says, up to the errors of multiplying the state `decays` times; and of operands,
    /// by a variant that rounds them.
    void expect_reference(int64_t chunk, int64_t decays, bool rounded_operands = false) const {
        const tolerance::OfCall allowed = tolerance::of_call(K, chunk, decays, dtype, rounded_operands);
        Array state = final_state;  // key-major
        if (value_major) std::swap(state.shape[2], state.shape[3]), std::swap(state.stride[2], state.stride[3]);
        for (int64_t s = 0; s < (starts.empty() ? 1 : N); s++) {
            SCOPED_TRACE("sequence " + std::to_string(s));
            const reference::Inputs in = inputs(s);
            const reference::Result want = reference::retention(in), spread = reference::spread(in);
            expect_close("out", slice(out, 1, starts.empty() ? 0 : starts[s], in.T), want.out, spread.out, allowed.out, dtype,
                         allowed.absolute);
            expect_close("final_state", slice(state, 0, s, starts.empty() ? B : 1), want.state, spread.state, allowed.state,
                         f32, allowed.absolute);
        }
        EXPECT_TRUE(out.gaps_intact() && final_state.gaps_intact()) << "memory between the elements was written";
    }

private:
    Array array(const Index &shape) { return Array(shape, layout).fill(random); }
    Array state() { return array(value_major ? Index{N, Hk, V, K} : Index{N, Hk, K, V}); }
};

/// Variants as the library lists them for a context.
inline std::vector<holdfast_variant> variants(holdfast_context *context) {
    std::vector<holdfast_variant> list(holdfast_variant_count());
    for (size_t n = 0; n < list.size(); n++) holdfast_variant_at(context, (int)n, &list[n]);
    return list;
}
/// The same for the default one, once: thousands of processes each look for their instances.
inline const std::vector<holdfast_variant> &variants() {
    static const std::vector<holdfast_variant> list = variants(nullptr);
    return list;
}

/// Names of the targets, best first; if wanted, only those that run here and take any call in fp32.
inline std::vector<std::string> targets(bool running = false) {
    std::vector<std::string> names;
    for (const holdfast_variant &v : variants()) {
        const bool any = v.runs_here && v.key_size == 0 && v.dtype == std::string("f32");
        if ((!running || any) && (names.empty() || names.back() != v.target)) names.push_back(v.target);
    }
    return names;
}

/// The backend of a target.
inline std::string backend_of(const std::string &target) {
    for (int n = 0; n < holdfast_backend_count(); n++) {
        holdfast_backend backend = {};
        backend.struct_size = sizeof backend;
        EXPECT_EQ(holdfast_backend_at(n, &backend), HOLDFAST_OK);
        if ((" " + std::string(backend.targets) + " ").find(" " + target + " ") != std::string::npos) return backend.name;
    }
    ADD_FAILURE() << "no backend has target " << target;
    return "";
}

/// Whether a CPU's variant of a kernel for rows of that type runs here: builds leave some out (COSTLY in cmake/kernels.cmake).
inline bool has_type(const std::string &kernel, const Dtype &dtype) {
    return std::any_of(variants().begin(), variants().end(), [&](const holdfast_variant &v) {
        return v.kernel == kernel && v.dtype == std::string(dtype.name) && v.runs_here && backend_of(v.target) == "cpu";
    });
}

/// The variant of a type and kernel that `target` runs for the size, by default: the first of exactly that size, else of any.
/// Null if there is none.
inline std::optional<holdfast_variant> variant_for(const std::string &target, Size size, const Dtype &dtype = f32,
                                                   const std::string &kernel = "chunkwise") {
    std::optional<holdfast_variant> any;
    for (const holdfast_variant &v : variants()) {
        if (v.target != target || v.dtype != std::string(dtype.name) || v.kernel != kernel) continue;
        if (v.key_size == size.K && v.value_size == size.V) return v;
        if (v.key_size == 0 && v.value_size == 0 && !any) any = v;
    }
    return any;
}

/// A target, and a size and type that it has a variant of a kernel for.
struct Instance {
    std::string target;
    Size size;
    Dtype dtype;
    int64_t chunk;
    bool rounds_operands;  // holdfast_variant::round_operands
    std::string missing;   // CPU features that this machine lacks, or why the backend cannot run
};
/// Filters find a target by the two underscores behind it, which no target's name has: that of one may begin with another's, and go
/// on with a type's.
inline std::string name(const Instance &i) {
    return i.target + "__" + i.dtype.name + "_K" + std::to_string(i.size.K) + "_V" + std::to_string(i.size.V);
}
inline void PrintTo(const Instance &i, std::ostream *stream) { *stream << name(i); }

/// Of these sizes in fp32, and on the CPU of those in the types of 16 bits. (GPUs' rows of 16 bits are tested by variants/ and
/// api/gpu_test.cpp: stand-ins are slow.)
inline std::vector<Instance> instances(const std::vector<Size> &sizes, const std::vector<Size> &sizes_of_16_bits = {},
                                       const std::string &kernel = "chunkwise") {
    std::vector<Instance> list;
    for (const std::string &target : targets())
        for (const Dtype &dtype : all_dtypes)
            for (Size size : dtype == f32 ? sizes : backend_of(target) == "cpu" ? sizes_of_16_bits : std::vector<Size>())
                if (auto v = variant_for(target, size, dtype, kernel))
                    list.push_back({target, size, dtype, v->chunk, v->round_operands != 0, v->missing});
    return list;
}

/// Those of the CPU's targets.
inline std::vector<Instance> on_cpu(std::vector<Instance> list) {
    list.erase(std::remove_if(list.begin(), list.end(), [](const Instance &i) { return backend_of(i.target) != "cpu"; }),
               list.end());
    return list;
}

}  // namespace test
