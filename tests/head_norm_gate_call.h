// Calls of a kernel of norm and gate by its own C signature, against the reference: for kernels compiled ahead of time or just
// in time.
#pragma once
#include "check.h"
#include "reference/head_norm_gate.h"
#include "stored.h"
#include "view.h"

#include <string>

namespace test {

struct NormCase {
    std::string name;
    int64_t B, T, H, V;
    Layout layout;
    bool layer_norm, gated;
    enum Out { apart, is_x, is_gate } where = apart;
    double from_zero = 0;  // what is added to x
    bool weighted = true;
};

/// `cpu`: also with what Halide's runtime does not copy to a GPU, negative strides and nothing at all. The library never asks it to.
inline std::vector<NormCase> norm_cases(bool cpu) {
    std::vector<NormCase> cases;
    for (bool layer_norm : {false, true})
        for (bool gated : {false, true}) {
            const std::string kind = std::string(layer_norm ? "layer" : "rms") + (gated ? "_gated_" : "_");
            // One element, less than a vector, vectors, and one more.
            for (int64_t V : {1, 5, 64, 97})
                cases.push_back({kind + "V" + std::to_string(V), 2, 3, 2, V, Layout::compact, layer_norm, gated});
            cases.push_back({kind + "padded", 2, 2, 3, 33, Layout::padded, layer_norm, gated});
        }
    // More heads, and longer rows, than schedules take at once.
    for (bool in_place : {false, true})
        cases.push_back({std::string("many_heads") + (in_place ? "_in_place" : ""), 2, 3, 11, 72, Layout::padded, in_place,
                         true, in_place ? NormCase::is_x : NormCase::apart});
    cases.push_back({"long_rows", 1, 1, 1, 150, Layout::padded, false, true});
    cases.push_back({"far_from_zero", 1, 3, 2, 80, Layout::compact, true, true, NormCase::apart, 3000});
    cases.push_back({"out_is_x", 1, 3, 2, 80, Layout::padded, true, true, NormCase::is_x});
    cases.push_back({"out_is_gate", 1, 3, 2, 80, Layout::padded, false, true, NormCase::is_gate});
    for (int64_t V : {1, 40})
        cases.push_back(
            {"no_weight_V" + std::to_string(V), 2, 3, 2, V, Layout::compact, false, true, NormCase::apart, 0, false});
    if (!cpu) return cases;
    cases.push_back({"reversed", 2, 3, 2, 33, Layout::reversed, true, true});
    cases.push_back({"no_heads", 1, 2, 0, 8, Layout::compact, false, false});
    cases.push_back({"no_tokens", 2, 0, 2, 8, Layout::compact, false, false});
    return cases;
}

/// Rows [..., V] normed and gated, row-major; weight [H, V], where H is the last axis but one.
inline reference::NormedRow normed(const Array &x, const Array &gate, const Array &weight, bool layer_norm, bool gated,
                                   double eps) {
    reference::NormedRow all;
    const int last = (int)x.shape.size() - 1;
    Index rows = x.shape;
    rows.pop_back();
    each(rows, [&](Index i) {
        std::vector<double> row, gates, weights;
        const int64_t h = i.back();
        i.push_back(0);
        for (int64_t &e = i.back(); e < x.shape[last]; e++)
            row.push_back(x(i)), gates.push_back(gated ? gate(i) : 0), weights.push_back(weight({h, e}));
        const reference::NormedRow one = reference::head_norm_gate(row, gates, weights, layer_norm, gated, eps);
        all.out.insert(all.out.end(), one.out.begin(), one.out.end());
        all.spread.insert(all.spread.end(), one.spread.begin(), one.spread.end());
    });
    return all;
}

/// Gates of every size: small, large, and where fp32 ends.
inline void fill_gates(Array &gate, Random &random) {
    each(gate.shape, [&](const Index &i) {
        const double dice = random(0, 1);
        gate(i) = (float)(dice < 0.8 ? random(-6, 6) : dice < 0.9 ? random(-60, 200) : dice < 0.95 ? -1000 : 0);
    });
}

class NormCall {
public:
    NormCall(const NormCase &c, const Dtype &dtype)
        : c(c), dtype(dtype), x(array()), gate(array()), out(array()), weight({c.H, c.V}, strides({c.H, c.V}, c.layout)) {
        each(x.shape, [&](const Index &i) { x(i) = (float)(c.from_zero + random(-1, 1)); });
        fill_gates(gate, random), weight.fill(random, -2, 2), out.forget();
        if (!c.weighted) weight.fill(1);
        for (Array *a : {&x, &gate}) round_to(dtype, *a);
    }

    /// kernel(x, gate, weight, layer_norm, gated, weighted, eps, out) returns 0 and does what the reference does.
    template<class Kernel>
    void expect_reference(const Kernel &kernel) {
        SCOPED_TRACE(c.name);
        using Buffer = Halide::Runtime::Buffer<void>;
        const float eps = 1e-3f;
        const reference::NormedRow want = normed(x, gate, weight, c.layer_norm, c.gated, eps);
        if (!c.weighted) weight.forget();
        const Array inputs[] = {x, gate, weight};
        Stored sx(dtype, x), sg(dtype, gate), so(dtype, out);
        auto rows = [&](Stored &stored, const Array &a) { return view(stored.data(), dtype, a, {3, 2, 1, 0}); };
        Buffer bx = rows(sx, x), bg = rows(sg, gate), bo = rows(so, out), bw = view(weight.data(), f32, weight, {1, 0});
        for (Buffer *buffer : {&bx, &bg, &bo, &bw}) buffer->set_host_dirty();  // as in kernel_call.h
        Buffer &br = c.where == NormCase::is_x ? bx : c.where == NormCase::is_gate ? bg : bo;
        ASSERT_EQ(kernel(bx, bg, bw, (int32_t)c.layer_norm, (int32_t)c.gated, (int32_t)c.weighted, eps, br), 0);
        ASSERT_EQ(br.copy_to_host(), 0);
        Array &result = c.where == NormCase::is_x ? x : c.where == NormCase::is_gate ? gate : out;
        Stored &stored = c.where == NormCase::is_x ? sx : c.where == NormCase::is_gate ? sg : so;
        stored.load();
        expect_close("out", result, want.out, want.spread, tolerance::of_norm(c.V), dtype);
        EXPECT_TRUE(result.gaps_intact() && stored.gaps_intact()) << "memory between the rows was written";
        EXPECT_TRUE(c.where == NormCase::is_x || (x.same_memory(inputs[0]) && sx.unchanged())) << "x was written";
        EXPECT_TRUE(c.where == NormCase::is_gate || (gate.same_memory(inputs[1]) && sg.unchanged())) << "gate was written";
        EXPECT_TRUE(weight.same_memory(inputs[2])) << "weight was written";
    }

private:
    const NormCase c;
    const Dtype dtype;
    Random random;
    Array x, gate, out, weight;

    Array array() const { return Array({c.B, c.T, c.H, c.V}, c.layout); }
};

}  // namespace test
