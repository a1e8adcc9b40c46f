// Calls of a rotation kernel by its own C signature, against the reference: for kernels compiled ahead of time or just in time.
#pragma once
#include "check.h"
#include "reference/rotate.h"
#include "stored.h"
#include "view.h"

#include <limits>
#include <string>

namespace test {

/// Where tokens may stand: at the beginning, where an angle in fp32 is wrong, at the ends of 32 and 64 bits; anything between.
inline std::vector<int64_t> positions(int64_t T, Random &random) {
    constexpr int64_t least = std::numeric_limits<int64_t>::min(), most = std::numeric_limits<int64_t>::max(), one = 1;
    std::vector<int64_t> list = {0,         1,         -1,    999'983, 1'000'000,           -1'048'575,      (one << 31) - 1,
                                 one << 31, one << 32, least, most,    (one << 40) + 12345, -(one << 33) - 1};
    while ((int64_t)list.size() < T) list.push_back((int64_t)random(0, 1 << 22));
    list.resize(T);
    return list;
}

/// Angles from one position to the next: conventional ones; now and then any float.
inline Array thetas(int64_t pairs, Random &random) {
    const float odd[] = {0, -1, 3.1415927f, 6.2831855f, 1e-6f, 1e-42f, 123456.7f, -3.4028235e38f, 0x1p-149f};
    Array theta({pairs});
    each(theta.shape, [&](const Index &i) {
        theta(i) = (float)std::pow(10000.0, -(double)i[0] / (double)pairs);
        if (random(0, 1) < 0.3) theta(i) = odd[(int)random(0, std::size(odd))];
    });
    return theta;
}

struct RotateCase {
    std::string name;
    int64_t B, T, H, K;
    Layout layout;
    bool interleaved, in_place;
    int position_bits = 64;  // 0: they begin at `start`
    int64_t start = 0;
    bool backward = false;
};

/// `cpu`: also with what Halide's runtime does not copy to a GPU, negative strides and nothing at all. The library never asks it to.
inline std::vector<RotateCase> rotate_cases(bool cpu) {
    std::vector<RotateCase> cases;
    for (bool interleaved : {false, true}) {
        const std::string pairs = interleaved ? "interleaved_" : "halves_";
        // One pair, less than a vector of them, some vectors, and one more.
        for (int64_t K : {2, 6, 64, 66, 150})
            cases.push_back({pairs + "K" + std::to_string(K), 3, 5, 3, K, Layout::compact, interleaved, false});
        for (Layout layout : {Layout::padded, Layout::reversed})
            if (cpu || layout != Layout::reversed)
                cases.push_back({pairs + name(layout), 2, 3, 2, 38, layout, interleaved, false});
        cases.push_back({pairs + "in_place", 1, 5, 3, 38, Layout::padded, interleaved, true});
        cases.push_back({pairs + "backward", 2, 13, 2, 38, Layout::padded, interleaved, interleaved, 64, 0, true});
    }
    cases.push_back({"one", 1, 1, 1, 64, Layout::compact, false, false});
    cases.push_back({"positions_of_32_bits", 2, 5, 1, 8, Layout::compact, false, false, 32});
    for (int64_t start : {(int64_t)0, ((int64_t)1 << 32) - 2, (int64_t)-3, std::numeric_limits<int64_t>::max() - 4})
        cases.push_back({"from_" + std::to_string(start), 2, 5, 1, 8, Layout::compact, false, false, 0, start});
    cases.push_back({"backward_from_-3", 2, 5, 1, 8, Layout::compact, false, false, 0, -3, true});
    if (!cpu) return cases;
    cases.push_back({"no_heads", 1, 2, 0, 8, Layout::compact, false, false});
    cases.push_back({"no_tokens", 2, 0, 2, 8, Layout::compact, false, false});
    return cases;
}

class RotateCall {
public:
    RotateCall(const RotateCase &c, const Dtype &dtype)
        : c(c), dtype(dtype), x(array()), out(array()), theta(thetas(c.K / 2, random)), where(positions(c.B * c.T, random)) {
        x.fill(random), out.forget();
        for (int64_t n = 0; n < (int64_t)where.size(); n++) {
            if (c.position_bits == 32) where[n] = (int32_t)where[n];
            if (c.position_bits == 0) where[n] = c.start + n % c.T;
        }
        round_to(dtype, x);
    }

    /// kernel(x, theta, position, position_bits, start, start_upper, backward, out) returns 0 and does what the reference does.
    template<class Kernel>
    void expect_reference(const Kernel &kernel) {
        SCOPED_TRACE(c.name);
        using Buffer = Halide::Runtime::Buffer<void>;
        std::vector<double> want, spread;
        each(x.shape, [&](const Index &i) {
            auto feature = [&](int64_t n) { return x({i[0], i[1], i[2], n, i[4]}); };
            const std::complex<double> rotation = reference::rotation(theta({i[4]}), where[i[0] * c.T + i[1]]);
            const std::complex<double> turned =
                std::complex<double>(feature(0), feature(1)) * (c.backward ? std::conj(rotation) : rotation);
            want.push_back(i[3] ? turned.imag() : turned.real());
            spread.push_back(std::abs(turned));
        });
        const Array input = x, angles = theta;
        Array &result = c.in_place ? x : out;
        Stored sx(dtype, x), so(dtype, out);
        Buffer bx = view(sx.data(), dtype, x, {4, 3, 2, 1, 0}), bo = view(so.data(), dtype, out, {4, 3, 2, 1, 0});
        Buffer bt = view(theta.data(), f32, theta, {0});
        std::vector<int32_t> words;  // where they are read; else nonsense
        for (int64_t position : where) {
            if (c.position_bits != 0) words.push_back((int32_t)(uint32_t)position);
            if (c.position_bits == 64) words.push_back((int32_t)(uint32_t)((uint64_t)position >> 32));
        }
        words.resize(std::max<size_t>(words.size(), 1), 0x7f123456);
        const int32_t T = (int32_t)c.T, step = c.position_bits / 32;
        const halide_dimension_t axes[] = {{0, 2, step == 2}, {0, T, step}, {0, (int32_t)c.B, step * T}};
        Buffer bp(halide_type_of<uint32_t>(), words.data(), 3, axes);
        for (Buffer *buffer : {&bx, &bo, &bt, &bp}) buffer->set_host_dirty();  // as in kernel_call.h
        Buffer &br = c.in_place ? bx : bo;
        ASSERT_EQ(kernel(bx, bt, bp, c.position_bits, (uint32_t)c.start, (uint32_t)((uint64_t)c.start >> 32),
                         (int32_t)c.backward, br),
                  0);
        ASSERT_EQ(br.copy_to_host(), 0);
        Stored &stored = c.in_place ? sx : so;
        stored.load();
        expect_close("out", result, want, spread, tolerance::of_rotation, dtype);
        EXPECT_TRUE(result.gaps_intact() && stored.gaps_intact()) << "memory between the rows was written";
        EXPECT_TRUE(theta.same_memory(angles)) << "theta was written";
        EXPECT_TRUE(c.in_place || (x.same_memory(input) && sx.unchanged())) << "x was written";
    }

private:
    const RotateCase c;
    const Dtype dtype;
    Random random;
    Array x, out, theta;  // rows as [B, T, H, 2, K/2]
    std::vector<int64_t> where;

    Array array() const {
        Index stride = strides({c.B, c.T, c.H, c.K}, c.layout);
        stride.back() = c.interleaved ? 1 : c.K / 2;
        stride.push_back(c.interleaved ? 2 : 1);
        return Array({c.B, c.T, c.H, 2, c.K / 2}, stride);
    }
};

}  // namespace test
