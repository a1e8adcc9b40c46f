// Calls of a kernel of the gradient of norm and gate by its own C signature, against the reference: for kernels compiled ahead of
// time or just in time.
#pragma once
#include "head_norm_gate_call.h"

namespace test {

struct NormBackwardCase {
    NormCase forward;  // out: apart
    bool want_dx = true, want_dgate = true, want_dweight = true;
    bool shared = false;  // the weight is one row for all heads
    bool add = false;     // dweight is added to what is there
};

inline std::vector<NormBackwardCase> norm_backward_cases(bool cpu) {
    std::vector<NormBackwardCase> cases;
    for (NormCase c : norm_cases(cpu)) {
        if (c.where != NormCase::apart || c.H * c.T == 0) continue;  // the library calls no kernel for nothing
        cases.push_back({c, true, c.gated, c.weighted});
    }
    const NormCase layer = {"layer", 2, 3, 4, 37, Layout::padded, true, true},
                   rms = {"rms", 2, 3, 4, 37, Layout::padded, false, true};
    for (const NormCase &c : {layer, rms})
        for (int wanted = 0; wanted < 8; wanted++) {
            NormBackwardCase some = {c, (wanted & 1) != 0, (wanted & 2) != 0, (wanted & 4) != 0};
            some.forward.name += "_wanted_" + std::to_string(wanted);
            cases.push_back(some);
        }
    cases.push_back({rms, true, true, true, true});
    cases.back().forward.name = "shared_weight";
    cases.push_back({layer, true, true, true, true, true});
    cases.back().forward.name = "shared_weight_added";
    cases.push_back({layer, true, true, true, false, true});
    cases.back().forward.name = "added";
    // More tokens than any sum over them takes at once.
    for (bool shared : {false, true})
        cases.push_back({{"many_tokens", 3, 131, 2, 5, Layout::compact, true, true}, true, true, true, shared});
    return cases;
}

struct NormedGradient {
    std::vector<double> dx, dgate, dweight, dx_spread, dgate_spread, dweight_spread;  // row-major; dweight of a weight [H, V]
};

/// The gradient of rows [..., V], row-major; of a weight [H, V], where H is the last axis but one.
inline NormedGradient normed_gradient(const Array &x, const Array &gate, const Array &weight, const Array &dout,
                                      bool layer_norm, bool gated, double eps) {
    NormedGradient all;
    const int last = (int)x.shape.size() - 1;
    const int64_t V = x.shape[last], H = x.shape[last - 1];
    std::vector<double> squares(H * V);
    all.dweight.resize(H * V), all.dweight_spread.resize(H * V);
    Index rows = x.shape;
    rows.pop_back();
    each(rows, [&](Index i) {
        std::vector<double> row, gates, weights, douts;
        const int64_t h = i.back();
        i.push_back(0);
        for (int64_t &e = i.back(); e < V; e++) {
            row.push_back(x(i)), gates.push_back(gated ? gate(i) : 0), weights.push_back(weight({h, e}));
            douts.push_back(dout(i));
        }
        const reference::NormedRowGradient one =
            reference::head_norm_gate_backward(row, gates, weights, douts, layer_norm, gated, eps);
        auto append = [](std::vector<double> &to, const std::vector<double> &from) {
            to.insert(to.end(), from.begin(), from.end());
        };
        append(all.dx, one.dx), append(all.dx_spread, one.dx_spread);
        append(all.dgate, one.dgate), append(all.dgate_spread, one.dgate_spread);
        for (int64_t e = 0; e < V; e++) {
            all.dweight[h * V + e] += one.dweight[e];
            squares[h * V + e] += one.dweight_spread[e] * one.dweight_spread[e];
        }
    });
    for (size_t n = 0; n < squares.size(); n++) all.dweight_spread[n] = std::abs(all.dweight[n]) + std::sqrt(squares[n]);
    return all;
}

/// The same of one weight [V] of all heads.
inline void share_weight(NormedGradient &all, int64_t V) {
    const size_t H = all.dweight.size() / (size_t)V;
    for (size_t e = 0; e < (size_t)V; e++) {
        double squares = all.dweight_spread[e] * all.dweight_spread[e];
        for (size_t h = 1; h < H; h++) {
            all.dweight[e] += all.dweight[h * V + e];
            squares += all.dweight_spread[h * V + e] * all.dweight_spread[h * V + e];
        }
        all.dweight_spread[e] = std::sqrt(squares);
    }
    all.dweight.resize(V), all.dweight_spread.resize(V);
}

class NormBackwardCall {
public:
    NormBackwardCall(const NormBackwardCase &all, const Dtype &dtype)
        : all(all), c(all.forward), dtype(dtype), x(array()), gate(array()), dout(array()), dx(array()), dgate(array()),
          weight(weights(c.H)), dweight(weights(all.shared ? 1 : c.H)) {
        each(x.shape, [&](const Index &i) { x(i) = (float)(c.from_zero + random(-1, 1)); });
        fill_gates(gate, random), weight.fill(random, -2, 2), dout.fill(random), dx.forget(), dgate.forget(), dweight.forget();
        if (!c.weighted) weight.fill(1);
        if (all.shared) each(weight.shape, [&](const Index &i) { weight(i) = weight({0, i[1]}); });
        if (all.add) dweight.fill(random);
        for (Array *a : {&x, &gate, &dout}) round_to(dtype, *a);
    }

    /// kernel(x, gate, weight, dout, layer_norm, gated, weighted, eps, want_dx, want_dgate, want_dweight, add_dweight, dx, dgate,
    /// dweight) returns 0 and does what the reference does.
    template<class Kernel>
    void expect_reference(const Kernel &kernel) {
        SCOPED_TRACE(c.name);
        using Buffer = Halide::Runtime::Buffer<void>;
        const float eps = 1e-3f;
        NormedGradient want = normed_gradient(x, gate, weight, dout, c.layer_norm, c.gated, eps);
        if (all.shared) share_weight(want, c.V);
        if (all.add) {
            size_t n = 0;
            each(dweight.shape,
                 [&](const Index &i) { want.dweight[n] += dweight(i), want.dweight_spread[n] += std::abs(dweight(i)), n++; });
        }
        if (!c.weighted) weight.forget();
        const Array before[] = {x, gate, weight, dout, dx, dgate, dweight};
        Stored sx(dtype, x), sg(dtype, gate), so(dtype, dout), sdx(dtype, dx), sdg(dtype, dgate);
        auto rows = [&](Stored &stored, const Array &a) { return view(stored.data(), dtype, a, {3, 2, 1, 0}); };
        Buffer bx = rows(sx, x), bg = rows(sg, gate), bo = rows(so, dout), bdx = rows(sdx, dx), bdg = rows(sdg, dgate);
        Buffer bw = view(weight.data(), f32, weight, {1, 0}), bdw = view(dweight.data(), f32, dweight, {1, 0});
        if (all.shared) bw.raw_buffer()->dim[1].stride = 0;
        for (Buffer *buffer : {&bx, &bg, &bo, &bdx, &bdg, &bw, &bdw}) buffer->set_host_dirty();  // as in kernel_call.h
        ASSERT_EQ(kernel(bx, bg, bw, bo, (int32_t)c.layer_norm, (int32_t)c.gated, (int32_t)c.weighted, eps,
                         (int32_t)all.want_dx, (int32_t)all.want_dgate, (int32_t)all.want_dweight, (int32_t)all.add, bdx, bdg,
                         bdw),
                  0);
        for (Buffer *buffer : {&bdx, &bdg, &bdw}) ASSERT_EQ(buffer->copy_to_host(), 0);
        auto expect = [&](const char *name, bool wanted, Array &got, const Array &untouched, Stored *stored,
                          const std::vector<double> &value, const std::vector<double> &spread, double share) {
            if (stored && wanted) stored->load();
            if (!wanted) {
                EXPECT_TRUE(got.same_memory(untouched) && (!stored || stored->unchanged())) << name << " was written";
                return;
            }
            expect_close(name, got, value, spread, share, stored ? dtype : f32);
            EXPECT_TRUE(got.gaps_intact() && (!stored || stored->gaps_intact()))
                << name << ": memory between the rows was written";
        };
        expect("dx", all.want_dx, dx, before[4], &sdx, want.dx, want.dx_spread, tolerance::of_norm_gradient(c.V));
        expect("dgate", all.want_dgate, dgate, before[5], &sdg, want.dgate, want.dgate_spread,
               tolerance::of_norm_gradient(c.V));
        expect("dweight", all.want_dweight, dweight, before[6], nullptr, want.dweight, want.dweight_spread,
               tolerance::of_norm_weight_gradient(c.V, c.B * c.T * (all.shared ? c.H : 1)));
        EXPECT_TRUE(x.same_memory(before[0]) && sx.unchanged()) << "x was written";
        EXPECT_TRUE(gate.same_memory(before[1]) && sg.unchanged()) << "gate was written";
        EXPECT_TRUE(weight.same_memory(before[2])) << "weight was written";
        EXPECT_TRUE(dout.same_memory(before[3]) && so.unchanged()) << "dout was written";
    }

private:
    const NormBackwardCase all;
    const NormCase c;
    const Dtype dtype;
    Random random;
    Array x, gate, dout, dx, dgate, weight, dweight;

    Array array() const { return Array({c.B, c.T, c.H, c.V}, c.layout); }
    Array weights(int64_t heads) const { return Array({heads, c.V}, strides({heads, c.V}, c.layout)); }
};

}  // namespace test
