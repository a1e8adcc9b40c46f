// Calls of a chunkwise kernel by its own C signature, against the reference: for kernels compiled ahead of time or just in
// time.
#pragma once
#include "../runtime/src/chunk_table.h"
#include "check.h"
#include "reference/retention.h"
#include "shapes.h"
#include "stored.h"
#include "view.h"

#include <algorithm>
#include <string>
#include <utility>

namespace test {

using holdfast::ChunkTable;

/// A call: sequences of these lengths, one after the other in the time axis of each batch entry.
struct KernelCase {
    std::string name;
    Index lengths;
    int64_t B, H;  // H heads of keys and values
    Layout layout;
    Gates gates;
    int64_t longest_chunk;      // 0: the kernel's
    int64_t group = 1;          // heads of queries for each
    bool states_alone = false;  // no queries: nothing is written but states
};

/// Everything that a kernel with chunks of C tokens may meet.
inline std::vector<KernelCase> kernel_cases(int C) {
    std::vector<KernelCase> cases;
    for (int64_t T : lengths(C))
        if (T > 0) cases.push_back({"T" + std::to_string(T), {T}, 1, 2, Layout::compact, Gates::weak, 0});
    for (Gates gates : all_gates)
        cases.push_back({std::string("gates_") + name(gates), {2 * C + C / 2 + 1}, 2, 3, Layout::padded, gates, 0});
    for (Layout layout : layouts)
        cases.push_back({std::string("layout_") + name(layout), {C + 1, 2}, 2, 2, layout, Gates::strong, 0});
    cases.push_back({"packed", lengths(C), 1, 2, Layout::compact, Gates::weak, 0});
    cases.push_back({"packed_other_way", {3 * C + 2, C + 1, C, C - 1, 1, 0}, 2, 1, Layout::swapped, Gates::resets, 0});
    cases.push_back({"packed_gaps", {0, 0, C, 0, 1, 0}, 2, 2, Layout::compact, Gates::per_head, 0});
    for (int64_t chunk : {1, C / 2 + 1, C - 1}) {
        const int64_t T = chunk == 1 ? 5 : C + 2;
        cases.push_back({"chunks_of_" + std::to_string(chunk), {T, 0, 3}, 2, 2, Layout::compact, Gates::resets, chunk});
    }
    cases.push_back({"groups", {C + 2, 0, 3}, 2, 2, Layout::padded, Gates::resets, 0, 3});
    cases.push_back({"one_group", {2 * C + 1}, 1, 1, Layout::swapped, Gates::per_head, 0, 4});
    cases.push_back({"states_alone", {C + 2, 0, 3}, 2, 2, Layout::padded, Gates::resets, 0, 1, true});
    return cases;
}

/// What a variant's row of the table says of its operands.
struct Operands {
    int row_alignment = 1;  // elements
    bool rounded = false;
};

/// What a call of the case `c` reads.
class KernelTensors {
protected:
    using Buffer = Halide::Runtime::Buffer<void>;
    const KernelCase c;
    const Dtype dtype;
    const Operands operands;
    const int64_t K, V, chunk;
    const Index starts;
    ChunkTable table;
    const int64_t T, N;
    Random random;
    Array q, k, v, log_decay, state_in;
    const float scale = 0.25f;

    KernelTensors(const KernelCase &c, int C, Size size, const Dtype &dtype, const Operands &operands)
        : c(c), dtype(dtype), operands(operands), K(size.K), V(size.V), chunk(c.longest_chunk ? c.longest_chunk : C),
          starts(starts_of(c.lengths)), table(starts, chunk), T(starts.back()), N((int64_t)c.lengths.size()),
          q(rows_of(c.group, K)), k(rows_of(1, K)), v(rows_of(1, V)),
          log_decay(log_decays(c.gates, c.B, T, c.H, c.layout, random)), state_in(states()) {
        for (Array *x : {&q, &k, &v}) round_to(dtype, *x);
    }

    reference::Inputs inputs(int64_t s) {
        reference::Inputs in{c.B, c.lengths[s], c.H * c.group, K, V, c.group};
        in.q = rows(q, starts[s]), in.k = rows(k, starts[s]), in.v = rows(v, starts[s]);
        in.log_decay = rows(log_decay, starts[s]);
        in.initial_state = states(state_in, s);
        in.scale = scale;
        return in;
    }

    Array rows_of(int64_t group, int64_t size) {
        return Array({c.B, T, c.H * group, size}, c.layout, 3 * operands.row_alignment).fill(random);
    }
    Array states() { return Array({c.B, N, c.H, K, V}, c.layout).fill(random); }

    Buffer rows(Stored &stored, const Array &a) const { return view(stored.data(), dtype, a, {3, 1, 2, 0}); }
    static Buffer gates(Array &a) { return view(a.data(), f32, a, {1, 2, 0}); }
    static Buffer states(Array &a) { return view(a.data(), f32, a, {4, 3, 1, 2, 0}); }
    Halide::Runtime::Buffer<int32_t> chunks() {
        return Halide::Runtime::Buffer<int32_t>(table.columns.data(), ChunkTable::fields, table.slots);
    }

    static reference::Strided rows(const Array &a, int64_t from) {
        const Index &s = a.stride;
        return {a.data() + from * s[1], {s[0], s[1], s[2], s.size() > 3 ? s[3] : 0}};
    }
    static reference::Strided states(const Array &a, int64_t sequence) {
        const Index &s = a.stride;
        return {a.data() + sequence * s[1], {s[0], s[2], s[3], s[4]}};
    }

private:
    static Index starts_of(const Index &lengths) {
        Index starts = {0};
        for (int64_t length : lengths) starts.push_back(starts.back() + length);
        return starts;
    }
};

class KernelCall : KernelTensors {
    Array out, state_out;

public:
    KernelCall(const KernelCase &c, int C, Size size, const Dtype &dtype = f32, const Operands &operands = {})
        : KernelTensors(c, C, size, dtype, operands), out(rows_of(c.group, V)), state_out(states()) {
        out.forget(), state_out.forget();
    }

    /// kernel(q, k, v, log_decay, state_in, chunks, count, scale, out, state_out) returns 0 and what the reference does.
    template<class Kernel>
    void expect_reference(const Kernel &kernel) {
        SCOPED_TRACE(c.name);
        run(kernel);
        const tolerance::OfCall allowed = tolerance::of_call(K, chunk, table.count, dtype, operands.rounded);
        for (int64_t s = 0; s < N; s++) {
            SCOPED_TRACE("sequence " + std::to_string(s));
            const reference::Inputs in = inputs(s);
            const reference::Result want = reference::retention(in), spread = reference::spread(in);
            if (!c.states_alone)
                expect_close("out", slice(out, 1, starts[s], c.lengths[s]), want.out, spread.out, allowed.out, dtype,
                             allowed.absolute);
            expect_close("state", slice(state_out, 1, s, 1), want.state, spread.state, allowed.state, f32, allowed.absolute);
        }
    }

    /// The root mean square errors of out and of the states, relative to their values; of one sequence.
    template<class Kernel>
    std::pair<double, double> relative_errors(const Kernel &kernel) {
        run(kernel);
        const reference::Result want = reference::retention(inputs(0));
        return {relative_rms(out.values(), want.out), relative_rms(state_out.values(), want.state)};
    }

private:
    template<class Kernel>
    void run(const Kernel &kernel) {
        Stored sq(dtype, q), sk(dtype, k), sv(dtype, v), so(dtype, out);
        Buffer bq = in_groups(rows(sq, q), 2, c.group), bk = rows(sk, k), bv = rows(sv, v), bg = gates(log_decay);
        Buffer bs = states(state_in), bo = in_groups(rows(so, out), 2, c.group), bz = states(state_out);
        Halide::Runtime::Buffer<int32_t> chunks = this->chunks();
        if (c.states_alone)
            for (Buffer *rows : {&bq, &bo}) rows->raw_buffer()->dim[2].extent = 0;
        const Array before[] = {q, k, v, log_decay, state_in};
        // A GPU's kernel copies what it reads, and all of an output: what it does not write there stays as it is.
        for (Buffer *buffer : {&bq, &bk, &bv, &bg, &bs, &bo, &bz}) buffer->set_host_dirty();
        chunks.set_host_dirty();
        ASSERT_EQ(kernel(bq, bk, bv, bg, bs, chunks, (int32_t)table.count, scale, bo, bz), 0);
        for (Buffer *buffer : {&bo, &bz}) ASSERT_EQ(buffer->copy_to_host(), 0);
        if (c.states_alone)
            EXPECT_TRUE(so.unchanged() && out.same_memory(Array(out).forget())) << "out was written";
        else
            so.load();
        EXPECT_TRUE(out.gaps_intact() && so.gaps_intact() && state_out.gaps_intact()) << "memory between the rows was written";
        const Array *after[] = {&q, &k, &v, &log_decay, &state_in};
        for (int n = 0; n < 5; n++) EXPECT_TRUE(after[n]->same_memory(before[n])) << "input " << n << " was written";
        const Stored *stored[] = {&sq, &sk, &sv};
        for (int n = 0; n < 3; n++) EXPECT_TRUE(stored[n]->unchanged()) << "input " << n << " was written";
    }
};

}  // namespace test
