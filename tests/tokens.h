// Calls of holdfast_rotate and holdfast_head_norm_gate for tests: tensors by name of float arrays, in any type.
#pragma once
#include "forward.h"
#include "head_norm_gate_call.h"
#include "rotate_call.h"

namespace test {

/// A target and a type.
struct TokensInstance {
    std::string target;
    Dtype dtype;
    std::string missing;  // as in Instance
};
inline std::string name(const TokensInstance &i) { return i.target + "_" + i.dtype.name; }
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

    holdfast_status run(holdfast_context *context) {
        RowsArgument rows(dtype, x);
        std::optional<RowsArgument> apart;
        if (out.data) apart.emplace(dtype, out);
        DLTensor angles = theta.dl();
        const holdfast_rotate_args args = {sizeof args, rows.dl(),  &angles, positions, apart ? apart->dl() : rows.dl(),
                                           offset,      interleaved};
        return holdfast_rotate(context, &args);
    }
};

/// `out` is x turned by theta position(b, t).
template<class Position>
void expect_rotated(const Array &x, const Array &theta, const Array &out, bool interleaved, const Position &position,
                    const Dtype &dtype) {
    std::vector<double> want, spread;
    const int64_t pairs = x.shape[3] / 2;
    each(x.shape, [&](const Index &i) {
        const int64_t j = interleaved ? i[3] / 2 : i[3] % pairs, second = interleaved ? i[3] % 2 : i[3] / pairs;
        auto feature = [&](int64_t n) { return (double)x({i[0], i[1], i[2], interleaved ? 2 * j + n : j + n * pairs}); };
        const std::complex<double> turned =
            std::complex<double>(feature(0), feature(1)) * reference::rotation(theta({j}), position(i[0], i[1]));
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

}  // namespace test
