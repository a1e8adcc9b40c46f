// The parallel form through the public API: it agrees with the other forms and with the reference, for every target in this
// build, for any number of threads, and its weights are what the values are multiplied by. On GPUs with tensors copied from the
// CPU: api/gpu_test.cpp has those that lie there.
#include "../forward.h"
#include "../reference/parallel.h"

namespace {
using namespace test;

/// A call: H heads of keys with `group` heads of queries each, states where they are wanted.
struct Call {
    int64_t B, T, H, K, V, group = 1;
    int degree = 1;
    bool normalized = false, states = true, weights = false;
    std::vector<int64_t> starts = {};  // of packed sequences, and T
    Dtype dtype = f32;
    Gates gates = Gates::weak;

    Random random{};
    int64_t N = starts.empty() ? B : (int64_t)starts.size() - 1;
    // Sums of weights stay away from 0: a quotient there is all rounding errors.
    const double least = normalized ? 0.25 : -1;
    Array q = array({B, T, H * group, K}, least), k = array({B, T, H, K}, least), v = array({B, T, H, V});
    Array log_decay = log_decays(gates, B, T, H, Layout::compact, random);
    int64_t D = states ? holdfast_state_size(K, degree, HOLDFAST_EXPANSION_TIGHT) : 1;
    Array state = array({N, H, D, V}), sum = array({N, H, D}, least);
    Array out{{B, T, H * group, V}}, final_state{{N, H, D, V}}, final_sum{{N, H, D}}, weights_out{{B, H * group, T, T}};
    holdfast_state_layout state_layout = HOLDFAST_STATE_KEY_MAJOR;
    holdfast_expansion expansion = HOLDFAST_EXPANSION_TIGHT;
    float scale = 0.25f;

    holdfast_status run(holdfast_context *context, holdfast_form form) {
        for (Array *x : {&q, &k, &v}) round_to(dtype, *x);
        Array *rows[] = {&q, &k, &v, &out, &weights_out};
        std::deque<Stored> stored;
        std::deque<Tensor> tensors;
        std::deque<DLTensor> views;
        auto view = [&](Array &a) {
            tensors.emplace_back(a);
            views.push_back(tensors.back().dl());
            return &views.back();
        };
        for (Array *x : rows) {
            stored.emplace_back(dtype, *x);
            view(*x)->data = stored.back().data(), views.back().dtype = dl_type(dtype);
        }
        holdfast_forward_args args =
            forward_args(&views[0], &views[1], &views[2], view(log_decay), nullptr, &views[3], nullptr);
        if (states) args.initial_state = view(state), args.final_state = view(final_state);
        if (states && normalized) args.initial_sum_of_keys = view(sum), args.final_sum_of_keys = view(final_sum);
        if (weights) args.weights = &views[4];
        int64_t bounds = (int64_t)starts.size();
        DLTensor cu_seqlens = {starts.data(), {kDLCPU, 0}, 1, {kDLInt, 64, 1}, &bounds, nullptr, 0};
        if (bounds) args.cu_seqlens = &cu_seqlens;
        args.scale = scale, args.form = form, args.degree = degree, args.state_layout = state_layout;
        args.expansion = expansion;
        args.normalize = normalized ? HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS : HOLDFAST_NORMALIZE_NONE;
        const holdfast_status status = holdfast_forward(context, &args);
        for (Stored &s : stored) s.load();
        return status;
    }
    void run(holdfast_context *context) {
        ASSERT_EQ(run(context, HOLDFAST_FORM_PARALLEL), HOLDFAST_OK) << holdfast_last_error(context);
    }

    reference::ParallelResult reference() const {
        reference::ParallelInputs in;
        static_cast<reference::Inputs &>(in) = {B, T, H * group, K, V, group};
        in.q = strided(q), in.k = strided(k), in.v = strided(v), in.log_decay = strided(log_decay), in.scale = scale;
        in.initial_state = strided(state), in.initial_keys = strided(sum);
        in.degree = degree, in.normalized = normalized, in.initial = states;
        return reference::parallel(in);
    }
    void expect_reference() const {
        const reference::ParallelResult want = reference();
        const double share = tolerance::of_power_spread(K, D, T, 0);
        expect_close("out", out, want.out, want.out_spread, share, dtype);
        if (weights) expect_close("weights", weights_out, want.weights, want.weights_spread, share, dtype);
    }

private:
    Array array(const Index &shape, double least = -1) { return Array(shape).fill(random, least, 1); }
    static reference::Strided strided(const Array &a) {
        reference::Strided x{a.data(), {}};
        std::copy(a.stride.begin(), a.stride.end(), x.stride.begin());
        return x;
    }
};

class Parallel : public testing::TestWithParam<Instance> {
protected:
    Context context{GetParam().missing.empty() ? GetParam().target : ""};
    Size size = GetParam().size;
    int64_t C = variant_for(GetParam().target, size, f32, "parallel")->chunk;
    void SetUp() override {
        if (!GetParam().missing.empty()) GTEST_SKIP() << "this machine lacks " << GetParam().missing;
    }
};

TEST_P(Parallel, AgreesWithChunkwise) {
    for (int64_t T : {(int64_t)0, (int64_t)1, (int64_t)7, C - 1, C, C + 1, 3 * C + 2})
        for (Gates gates : {Gates::none, Gates::resets}) {
            SCOPED_TRACE("T " + std::to_string(T) + ", gates " + name(gates));
            Call call{2, T, 2, size.K, size.V};
            call.gates = gates, call.log_decay = log_decays(gates, 2, T, 2, Layout::compact, call.random);
            call.run(context);
            call.expect_reference();
            const Array out = call.out, state = call.final_state;
            ASSERT_EQ(call.run(context, HOLDFAST_FORM_CHUNKWISE), HOLDFAST_OK) << context.error();
            if (T > 0) {
                EXPECT_LE(relative_rms(out.values(), call.out.values()), tolerance::relative_rms_between_forms);
            }
            EXPECT_LE(relative_rms(state.values(), call.final_state.values()), tolerance::relative_rms_between_forms);
        }
}

TEST_P(Parallel, DegreesAndTypes) {
    for (const Dtype &dtype : all_dtypes)
        for (int degree : {1, 2, 3, 4})
            for (bool normalized : {false, true}) {
                if (!variant_for(GetParam().target, size, dtype, "parallel")) continue;  // COSTLY in cmake/kernels.cmake
                SCOPED_TRACE(std::string(dtype.name) + ", degree " + std::to_string(degree) +
                             (normalized ? ", normalized" : ""));
                Call call{1, C + 3, 1, size.K, size.V, 2, degree, normalized, degree <= 2, true};
                call.dtype = dtype;
                call.run(context);
                call.expect_reference();
            }
}

/// Each of packed sequences as if it were alone; weights between sequences are 0.
void expect_sequences_apart(Context &context, int64_t C, Size size, const Dtype &dtype) {
    const std::vector<int64_t> starts = {0, 5, 5, C + 9, C + 10};
    Call packed{1, starts.back(), 1, size.K, size.V, 1, 1, false, true, true, starts, dtype};
    packed.run(context);
    for (size_t s = 0; s + 1 < starts.size(); s++) {
        SCOPED_TRACE("sequence " + std::to_string(s));
        const int64_t from = starts[s], T = starts[s + 1] - from;
        Call alone{1, T, 1, size.K, size.V};
        alone.dtype = dtype;
        auto rows = [&](Array &to, const Array &all) {
            each(to.shape, [&](const Index &i) {
                Index j = i;
                j[1] += from;
                to(i) = all(j);
            });
        };
        rows(alone.q, packed.q), rows(alone.k, packed.k), rows(alone.v, packed.v), rows(alone.log_decay, packed.log_decay);
        each(alone.state.shape, [&](const Index &i) { alone.state(i) = packed.state({(int64_t)s, i[1], i[2], i[3]}); });
        alone.weights = true;
        alone.run(context);
        each(alone.out.shape, [&](const Index &i) { ASSERT_EQ(packed.out({0, from + i[1], 0, i[3]}), alone.out(i)); });
        each(alone.final_state.shape,
             [&](const Index &i) { ASSERT_EQ(packed.final_state({(int64_t)s, 0, i[2], i[3]}), alone.final_state(i)); });
        each({T, packed.T}, [&](const Index &i) {
            const bool own = i[1] >= from && i[1] < from + T;
            ASSERT_EQ(packed.weights_out({0, 0, from + i[0], i[1]}), own ? alone.weights_out({0, 0, i[0], i[1] - from}) : 0);
        });
    }
}

// Rows in parts, and the state in place: the same bits as on one thread, which has one part of a head.
TEST_P(Parallel, SameBitsForAnyNumberOfThreads) {
    for (const std::vector<int64_t> &starts : {std::vector<int64_t>{}, {0, 0, 1000}, {0, 1, 1000}}) {
        Call one{1, 1000, 1, size.K, size.V, 2, 1, false, true, false, starts};
        ASSERT_EQ(holdfast_context_set_threads(context, 1), HOLDFAST_OK);
        one.run(context);
        for (int threads : {2, 3}) {
            Call many = one;
            ASSERT_EQ(holdfast_context_set_threads(context, threads), HOLDFAST_OK);
            many.run(context);
            const std::string &message = context.messages.back();
            EXPECT_NE(message.find(std::to_string(threads) + " parts"), std::string::npos) << message;
            EXPECT_TRUE(same_bits(one.out, many.out));
            EXPECT_TRUE(same_bits(one.final_state, many.final_state));
        }
    }
}

TEST_P(Parallel, PackedSequencesKeepApart) { expect_sequences_apart(context, C, size, f32); }

TEST_P(Parallel, ValueMajorStates) {
    Call key_major{1, 9, 2, size.K, size.V}, value_major = key_major;
    value_major.state_layout = HOLDFAST_STATE_VALUE_MAJOR;
    value_major.state = value_major.final_state = Array({1, 2, size.V, size.K});
    each(key_major.state.shape, [&](const Index &i) { value_major.state({i[0], i[1], i[3], i[2]}) = key_major.state(i); });
    key_major.run(context), value_major.run(context);
    EXPECT_TRUE(same_bits(key_major.out, value_major.out));
    each(key_major.state.shape,
         [&](const Index &i) { ASSERT_EQ(value_major.final_state({i[0], i[1], i[3], i[2]}), key_major.final_state(i)); });
}

TEST_P(Parallel, StateInPlace) {
    Call apart{1, 2 * C + 1, 1, size.K, size.V}, in_place = apart;
    apart.run(context);
    Forward f{in_place.q, in_place.k, in_place.v, in_place.log_decay, in_place.state, in_place.out, in_place.state};
    f.scale = in_place.scale;
    holdfast_forward_args args = {};
    DLTensor q = f.q.dl(), k = f.k.dl(), v = f.v.dl(), g = f.log_decay.dl(), s = f.initial_state.dl(), o = f.out.dl();
    args = forward_args(&q, &k, &v, &g, &s, &o, &s);
    args.scale = in_place.scale, args.form = HOLDFAST_FORM_PARALLEL;
    ASSERT_EQ(holdfast_forward(context, &args), HOLDFAST_OK) << context.error();
    EXPECT_TRUE(same_bits(apart.out, in_place.out));
    EXPECT_TRUE(same_bits(apart.final_state, in_place.state));
}

TEST_P(Parallel, NotANumberStaysInItsHead) {
    const int64_t T = C + 5;
    for (int degree : {1, 2}) {
        SCOPED_TRACE(degree);
        Call clean{2, T, 3, size.K, size.V, 2, degree, degree > 1}, p = clean;
        clean.run(context);
        const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
        p.q({1, 3, 0, 0}) = nan, p.q({1, 5, 5, 0}) = infinity;
        p.k({1, 3, 1, 0}) = infinity, p.v({0, 3, 2, 0}) = nan, p.state({0, 1, 0, 0}) = infinity;
        p.run(context);
        // Of heads of queries, and of those of keys: what is in a query alone stays in its own.
        auto poisoned = [](int64_t b, int64_t h) { return b == 1 ? h != 1 && h != 4 : h > 1; };
        auto poisoned_state = [](int64_t b, int64_t h) { return b == 1 ? h == 1 : h > 0; };
        each(p.out.shape, [&](const Index &i) { EXPECT_TRUE(poisoned(i[0], i[2]) || p.out(i) == clean.out(i)) << text(i); });
        each(p.final_state.shape, [&](const Index &i) {
            EXPECT_TRUE(poisoned_state(i[0], i[1]) || p.final_state(i) == clean.final_state(i)) << text(i);
        });
        each(p.final_sum.shape, [&](const Index &i) {
            EXPECT_TRUE(!p.normalized || (i[0] == 1 && i[1] == 1) || p.final_sum(i) == clean.final_sum(i)) << text(i);
        });
        for (const Index &i : {Index{1, 3, 0, 0}, {1, 5, 5, 0}, {1, T - 1, 2, 0}, {0, T - 1, 2, 0}, {0, T - 1, 4, 0}})
            EXPECT_FALSE(std::isfinite(p.out(i))) << text(i);
        EXPECT_FALSE(std::isfinite(p.final_state({0, 1, 0, 0})) || std::isfinite(p.final_state({1, 1, 0, 0})));
    }
}

/// Those of processors, or of GPUs.
std::vector<Instance> parallel_instances(const std::vector<Size> &sizes, bool gpu = false) {
    std::vector<Instance> list;
    for (const Instance &i : instances(sizes))
        if (variant_for(i.target, i.size, f32, "parallel") && (backend_of(i.target) != "cpu") == gpu) list.push_back(i);
    return list;
}
INSTANTIATE_TEST_SUITE_P(, Parallel, testing::ValuesIn(parallel_instances({{33, 17}})),
                         [](const auto &info) { return name(info.param); });

class ParallelOnGpu : public Parallel {};
TEST_P(ParallelOnGpu, MatchesReferenceAndTheCpu) {
    Context cpu;
    auto expect_close_to_cpu = [&](const char *what, const Array &got, const Array &want) {
        if (!got.values().empty()) {
            EXPECT_LE(relative_rms(got.values(), want.values()), tolerance::relative_rms_between_forms) << what;
        }
    };
    const auto [K, V] = size;
    for (Call call : {Call{2, C + 3, 2, K, V, 2, 1, false, true, true}, Call{1, C + 3, 1, K, V, 2, 2, true, true, true},
                      Call{1, 5, 1, K, V, 1, 1, true}, Call{1, 5, 2, K, V, 1, 3, false, false}, Call{1, 0, 1, K, V},
                      Call{1, 0, 1, K, V, 1, 2, true}, Call{1, C + 9, 1, K, V, 1, 1, false, true, false, {0, 5, 5, C + 9}},
                      Call{1, C + 9, 1, K, V, 1, 2, true, true, false, {0, 5, 5, C + 9}}}) {
        SCOPED_TRACE(testing::Message() << "T " << call.T << ", degree " << call.degree << ", sequences " << call.N);
        Call want = call;
        want.weights = false;
        ASSERT_EQ(want.run(cpu, HOLDFAST_FORM_AUTO), HOLDFAST_OK) << cpu.error();
        call.run(context);
        EXPECT_NE(context.messages.at(0).find("parallel_f32_c"), std::string::npos) << context.messages[0];
        if (call.starts.empty()) call.expect_reference();
        expect_close_to_cpu("out", call.out, want.out);
        if (call.states) expect_close_to_cpu("state", call.final_state, want.final_state);
        if (call.states && call.normalized) expect_close_to_cpu("sum of keys", call.final_sum, want.final_sum);
    }
}

TEST_P(ParallelOnGpu, TypesAreRoundedOnce) {
    for (const Dtype &dtype : {f16, bf16})
        if (variant_for(GetParam().target, size, dtype, "parallel"))  // COSTLY in cmake/kernels.cmake
            for (int degree : {1, 2}) {
                SCOPED_TRACE(std::string(dtype.name) + ", degree " + std::to_string(degree));
                Call call{1, C + 3, 1, size.K, size.V, 2, degree, degree > 1, true, true};
                call.dtype = dtype;
                call.run(context);
                call.expect_reference();
            }
}

TEST_P(ParallelOnGpu, PackedSequencesKeepApart) {
    for (const Dtype &dtype : {f32, bf16})
        if (variant_for(GetParam().target, size, dtype, "parallel")) expect_sequences_apart(context, C, size, dtype);
}

TEST_P(ParallelOnGpu, TakesTiledStates) {
    Call tiled{2, 40, 2, 16, size.V, 1, 2, true};
    Context cpu;
    tiled.expansion = HOLDFAST_EXPANSION_TILED;
    const int64_t D = holdfast_state_size(16, 2, HOLDFAST_EXPANSION_TILED);
    tiled.state = tiled.final_state = Array({2, 2, D, size.V}).fill(tiled.random);
    tiled.sum = tiled.final_sum = Array({2, 2, D}).fill(tiled.random, 5, 9);
    Call want = tiled;
    tiled.run(context), want.run(cpu);
    for (auto [got, expected] :
         {std::pair{&tiled.out, &want.out}, {&tiled.final_state, &want.final_state}, {&tiled.final_sum, &want.final_sum}})
        EXPECT_LE(relative_rms(got->values(), expected->values()), tolerance::relative_rms_between_forms);
}
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(ParallelOnGpu);
INSTANTIATE_TEST_SUITE_P(, ParallelOnGpu, testing::ValuesIn(parallel_instances({{5, 7}}, true)),
                         [](const auto &info) { return name(info.param); });

// What the project holds, with RetNet's decays: tolerance.h.
class ParallelNumbers : public Parallel {};
TEST_P(ParallelNumbers, LongSequence) {
    Problem p{1, 4096, 8, 64, 64, Gates::per_head, Layout::compact, false};
    Forward f = p.forward();
    DLTensor q = f.q.dl(), k = f.k.dl(), v = f.v.dl(), g = f.log_decay.dl(), o = f.out.dl(), s = f.final_state.dl();
    holdfast_forward_args args = forward_args(&q, &k, &v, &g, nullptr, &o, &s);
    args.form = HOLDFAST_FORM_PARALLEL;
    ASSERT_EQ(holdfast_forward(context, &args), HOLDFAST_OK) << context.error();
    const reference::Result want = reference::retention(p.inputs());
    const double out = relative_rms(p.out.values(), want.out), state = relative_rms(p.final_state.values(), want.state);
    RecordProperty("relative_rms", std::to_string(std::max(out, state)));
    EXPECT_LE(out, tolerance::relative_rms);
    EXPECT_LE(state, tolerance::relative_rms);
}
INSTANTIATE_TEST_SUITE_P(, ParallelNumbers, testing::ValuesIn(parallel_instances({{64, 64}})),
                         [](const auto &info) { return name(info.param); });

}  // namespace
