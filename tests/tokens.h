// Calls of holdfast_rotate and holdfast_head_norm_gate, and of their gradients, for tests: tensors by name of float arrays, in any
// type.
#pragma once
#include "forward.h"
#include "head_norm_gate_backward_call.h"
#include "rotate_call.h"

namespace test {

/// A target and a type.
struct TokensInstance {
    std::string target;
    Dtype dtype;
    std::string missing;  // as in Instance
};
inline std::string name(const TokensInstance &i) { return i.target + "__" + i.dtype.name; }
inline void PrintTo(const TokensInstance &i, std::ostream *stream) { *stream << name(i); }

/// All of the CPU's that have the kernel.
inline std::vector<TokensInstance>
tokens_instances(const std::string &kernel, std::vector<Dtype> dtypes = {std::begin(all_dtypes), std::end(all_dtypes)}) {
    std::vector<TokensInstance> list;
    for (const holdfast_variant &v : variants())
        for (const Dtype &dtype : dtypes)
            if (v.kernel == kernel && v.dtype == std::string(dtype.name) && backend_of(v.target) == "cpu")
                list.push_back({v.target, dtype, v.missing});
    return list;
}

/// A test of such calls, on a context for the instance's target.
class TokensTest : public testing::TestWithParam<TokensInstance> {
protected:
    const Dtype dtype = GetParam().dtype;
    Random random;
    std::optional<Context> context;

    void SetUp() override {
        if (!GetParam().missing.empty()) GTEST_SKIP() << "this CPU lacks " << GetParam().missing;
        context.emplace(GetParam().target);
    }
    Array rows(const Index &shape, Layout layout = Layout::compact) {
        Array x = Array(shape, layout).fill(random);
        round_to(dtype, x);
        return x;
    }
    Array gates(const Index &shape, Layout layout = Layout::compact) {
        Array gate(shape, layout);
        fill_gates(gate, random);
        round_to(dtype, gate);
        return gate;
    }
    /// Rotation, HeadNormGate or HeadNormGateBackward, of the instance's type.
    template<class Call>
    void run(Call call) {
        call.dtype = dtype;
        ASSERT_EQ(call.run(*context), HOLDFAST_OK) << context->error();
    }
};

/// Rows [B, T, H, *] as a tensor of the type while it lives; afterwards what has been written is in the floats.
class RowsArgument {
public:
    RowsArgument(const Dtype &dtype, Tensor rows) : rows(rows), stored(dtype, rows.data, rows.shape, rows.stride) {
        view = this->rows.dl();
        view.data = stored.data(), view.dtype = dl_type(dtype);
    }
    RowsArgument(const RowsArgument &) = delete;
    ~RowsArgument() {
        EXPECT_TRUE(stored.gaps_intact()) << "memory between the elements was written";
        stored.load();
    }
    DLTensor *dl() { return &view; }

private:
    Tensor rows;
    Stored stored;
    DLTensor view;
};

struct Rotation {
    Tensor x, theta, out;  // out without data: x itself
    int64_t offset = 0;
    bool interleaved = false;
    Dtype dtype = f32;
    DLTensor *positions = nullptr;
    bool backward = false;

    holdfast_status run(holdfast_context *context) {
        RowsArgument rows(dtype, x);
        std::optional<RowsArgument> apart;
        if (out.data) apart.emplace(dtype, out);
        DLTensor angles = theta.dl(), *to = apart ? apart->dl() : rows.dl();
        if (backward) {
            const holdfast_rotate_backward_args args = {sizeof args, rows.dl(), &angles, positions, to, offset, interleaved};
            return holdfast_rotate_backward(context, &args);
        }
        const holdfast_rotate_args args = {sizeof args, rows.dl(), &angles, positions, to, offset, interleaved};
        return holdfast_rotate(context, &args);
    }
};

/// `out` is x turned by theta position(b, t), the other way if `backward`.
template<class Position>
void expect_rotated(const Array &x, const Array &theta, const Array &out, bool interleaved, const Position &position,
                    const Dtype &dtype, bool backward = false) {
    std::vector<double> want, spread;
    const int64_t pairs = x.shape[3] / 2;
    each(x.shape, [&](const Index &i) {
        const int64_t j = interleaved ? i[3] / 2 : i[3] % pairs, second = interleaved ? i[3] % 2 : i[3] / pairs;
        auto feature = [&](int64_t n) { return (double)x({i[0], i[1], i[2], interleaved ? 2 * j + n : j + n * pairs}); };
        const std::complex<double> rotation = reference::rotation(theta({j}), position(i[0], i[1]));
        const std::complex<double> turned =
            std::complex<double>(feature(0), feature(1)) * (backward ? std::conj(rotation) : rotation);
        want.push_back(second ? turned.imag() : turned.real());
        spread.push_back(std::abs(turned));
    });
    expect_close("out", out, want, spread, tolerance::of_rotation, dtype);
    EXPECT_TRUE(out.gaps_intact()) << "memory between the elements was written";
}

struct HeadNormGate {
    Tensor x, gate, weight, out;  // without data: not given; out: x itself
    holdfast_norm norm = HOLDFAST_NORM_RMS;
    float eps = 1e-6f;
    Dtype dtype = f32;

    holdfast_status run(holdfast_context *context) {
        RowsArgument rows(dtype, x);
        std::optional<RowsArgument> gates, apart;
        if (gate.data) gates.emplace(dtype, gate);
        if (out.data) apart.emplace(dtype, out);
        DLTensor weights = weight.dl();
        const holdfast_head_norm_gate_args args = {sizeof args,
                                                   rows.dl(),
                                                   gates ? gates->dl() : nullptr,
                                                   weight.data ? &weights : nullptr,
                                                   apart ? apart->dl() : rows.dl(),
                                                   norm,
                                                   eps};
        return holdfast_head_norm_gate(context, &args);
    }
};

struct HeadNormGateBackward {
    Tensor x, gate, weight, dout, dx, dgate, dweight;  // without data: not given
    holdfast_norm norm = HOLDFAST_NORM_RMS;
    float eps = 1e-6f;
    Dtype dtype = f32;

    holdfast_status run(holdfast_context *context) {
        std::optional<RowsArgument> rows[5];
        DLTensor *views[5] = {};
        int n = 0;
        for (Tensor *t : {&x, &gate, &dout, &dx, &dgate}) {
            if (t->data) rows[n].emplace(dtype, *t), views[n] = rows[n]->dl();
            n++;
        }
        DLTensor weights = weight.dl(), dweights = dweight.dl();
        const holdfast_head_norm_gate_backward_args args = {sizeof args, views[0], views[1], weight.data ? &weights : nullptr,
                                                            views[2],    views[3], views[4], dweight.data ? &dweights : nullptr,
                                                            norm,        eps};
        return holdfast_head_norm_gate_backward(context, &args);
    }
};

/// The gradients are those of the reference; those without data are not looked at.
inline void expect_gradients(const Array &x, const Array &gate, const Array &weight, const Array &dout, const Array *dx,
                             const Array *dgate, const Array *dweight, bool layer_norm, bool gated, float eps,
                             const Dtype &dtype) {
    const int64_t V = x.shape[3], tokens = x.shape[0] * x.shape[1];
    NormedGradient want = normed_gradient(x, gate, weight, dout, layer_norm, gated, eps);
    const double share = tolerance::of_norm_gradient(V);
    if (dx) expect_close("dx", *dx, want.dx, want.dx_spread, share, dtype);
    if (dgate) expect_close("dgate", *dgate, want.dgate, want.dgate_spread, share, dtype);
    if (!dweight) return;
    if (dweight->shape.size() == 1) share_weight(want, V);
    expect_close(
        "dweight", *dweight, want.dweight, want.dweight_spread,
        tolerance::of_norm_weight_gradient(V, std::min<int64_t>(tokens, 1024) * (dweight->shape.size() == 1 ? x.shape[2] : 1)));
}

}  // namespace test
