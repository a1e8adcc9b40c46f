// What holdfast_forward promises of its numbers, for every target that runs here and for tuned and odd sizes.
#include "../forward.h"
#include "../required.h"

namespace {
using namespace test;

class Retention : public testing::TestWithParam<Instance> {
protected:
    const int64_t K = GetParam().size.K, V = GetParam().size.V, C = GetParam().chunk;
    const Dtype dtype = GetParam().dtype;
    std::optional<Context> context;

    void SetUp() override {
        if (!GetParam().missing.empty()) {
            EXPECT_FALSE(required(backend_of(GetParam().target))) << "HOLDFAST_REQUIRED_BACKENDS has its backend";
            GTEST_SKIP() << "missing here: " << GetParam().missing;
        }
        context.emplace(GetParam().target);
    }
    Problem problem(int64_t B, int64_t T, int64_t H, Gates gates = Gates::weak) const {
        return {B, T, H, K, V, gates, Layout::compact, true, dtype};
    }
    void run(Forward f) {
        context->messages.clear();
        ASSERT_EQ(f.run(*context), HOLDFAST_OK) << context->error();
    }
    /// Whether the last call was by a variant that rounds operands: that of few tokens does not.
    bool rounded_operands() const {
        const std::vector<std::string> &messages = context->messages;
        return GetParam().rounds_operands && std::any_of(messages.begin(), messages.end(), [](const std::string &m) {
                   return m.find("forward: chunkwise_") != std::string::npos;
               });
    }
    /// The last call was by a variant of `kernel` for this target and type: for one token or for blocks, of recurrent ones.
    void expect_ran(const std::string &kernel) const {
        const std::string &message = context->messages.back();
        for (const std::string &part : {" " + kernel + "_" + dtype.name + "_", "_" + GetParam().target + " ("})
            EXPECT_NE(message.find(part), std::string::npos) << message;
    }
    void expect_reference(const Problem &p, int64_t chunk, int64_t decays) const {
        p.expect_reference(chunk, decays, rounded_operands());
    }
    /// Tokens up to each cut in a call of its own, the state carried from each to the next.
    void run_by(Forward f, const Index &cuts) {
        int64_t from = 0;
        for (int64_t to : cuts) {
            run(f.tokens(from, to));
            f.initial_state = f.final_state;
            from = to;
        }
    }
    bool on_cpu() const { return backend_of(GetParam().target) == "cpu"; }
    int64_t chunks(int64_t T) const { return (T + C - 1) / C; }
};

TEST_P(Retention, MatchesReference) {
    Index all = lengths(C);
    all.push_back(1000);
    for (int64_t T : all)
        for (Gates gates : all_gates)
            for (bool initial : {false, true}) {
                SCOPED_TRACE("T " + std::to_string(T) + ", gates " + name(gates) + (initial ? ", initial state" : ""));
                if (T == 1000 && (!initial || (!on_cpu() && gates != Gates::weak))) continue;
                Problem p{2, T, 3, K, V, gates, Layout::compact, initial, dtype};
                run(p.forward());
                expect_reference(p, C, chunks(T));
            }
}

TEST_P(Retention, RoundsOutOnceAndNothingElse) {
    if (GetParam().rounds_operands) GTEST_SKIP() << "it rounds operands of products too";
    // In 16 bits: what fp32 gives for the same numbers, in the same chunks, rounded at the end. Over several calls of a kernel.
    for (Gates gates : {Gates::weak, Gates::resets}) {
        SCOPED_TRACE(name(gates));
        Problem p = problem(2, 20 * C + 9, 2, gates);
        run(p.forward());
        Problem wide = p;
        wide.dtype = f32;
        Forward f = wide.forward();
        f.chunk_size = C;
        run(f);
        round_to(dtype, wide.out);
        EXPECT_TRUE(same_bits(p.out, wide.out));
        EXPECT_TRUE(same_bits(p.final_state, wide.final_state));
    }
}

TEST_P(Retention, ScaleMultipliesScores) {
    for (float scale : {1.0f, -0.3f, 1e-20f}) {
        SCOPED_TRACE(scale);
        Problem p = problem(1, C + 3, 2);
        p.scale = scale;
        run(p.forward());
        expect_reference(p, C, 2);
    }
}

TEST_P(Retention, TakesAnyStrides) {
    for (Layout layout : layouts)
        for (Gates gates : {Gates::per_head, Gates::resets}) {
            SCOPED_TRACE(std::string(name(layout)) + ", gates " + name(gates));
            Problem p{2, 2 * C + 5, 3, K, V, gates, layout, true, dtype};
            Forward f = p.forward();
            const Array inputs[] = {p.q, p.k, p.v, p.log_decay, p.initial_state};
            run(f);
            expect_reference(p, C, 3);
            const Array *after[] = {&p.q, &p.k, &p.v, &p.log_decay, &p.initial_state};
            for (int n = 0; n < 5; n++) EXPECT_TRUE(after[n]->same_memory(inputs[n])) << "input " << n << " was written";
        }
}

TEST_P(Retention, TakesOneTensorForManyArguments) {
    // q, k and v may be one array, with strides of 0 and all.
    Problem p = problem(2, C + 7, 3);
    Forward f = p.forward();
    const Tensor one(p.q.data(), {2, C + 7, 3, K}, {0, p.q.stride[1], 0, 1});
    f.q = f.k = one;
    run(f);
    for (int64_t b = 0; b < 2; b++)
        for (int64_t t = 0; t < C + 7; t++)
            for (int64_t h = 0; h < 3; h++)
                for (int64_t d = 0; d < K; d++) {
                    if (b || h) p.q({b, t, h, d}) = p.q({0, t, 0, d});
                    p.k({b, t, h, d}) = p.q({0, t, 0, d});
                }
    expect_reference(p, C, 2);
}

TEST_P(Retention, ByteOffsetAndNullStrides) {
    Problem p = problem(2, C + 7, 3);
    Forward f = p.forward();
    DLTensor q = f.q.dl(), k = f.k.dl(), v = f.v.dl(), log_decay = f.log_decay.dl(), out = f.out.dl();
    DLTensor initial = f.initial_state.dl(), final = f.final_state.dl();
    Stored rows[] = {{dtype, p.q}, {dtype, p.k}, {dtype, p.v}, {dtype, p.out}};
    int n = 0;
    for (DLTensor *x : {&q, &k, &v, &out}) x->data = rows[n++].data(), x->dtype = dl_type(dtype);
    for (DLTensor *x : {&q, &k, &v, &log_decay, &initial, &out, &final}) {
        x->strides = nullptr;
        x->data = (char *)x->data - 64;
        x->byte_offset = 64;
    }
    const holdfast_forward_args args = forward_args(&q, &k, &v, &log_decay, &initial, &out, &final);
    ASSERT_EQ(holdfast_forward(*context, &args), HOLDFAST_OK) << context->error();
    rows[3].load();
    expect_reference(p, C, 2);
}

TEST_P(Retention, StateMayBeLeftOut) {
    Problem whole = problem(2, C + 7, 2), p = problem(2, C + 7, 2);
    run(whole.forward());
    Forward f = p.forward();
    f.final_state = {};
    run(f);
    EXPECT_TRUE(same_bits(p.out, whole.out));
}

TEST_P(Retention, StateInPlace) {
    for (Layout layout : layouts) {
        SCOPED_TRACE(name(layout));
        Problem apart{2, 2 * C + 7, 3, K, V, Gates::weak, layout, true, dtype}, in_place = apart;
        run(apart.forward());
        Forward f = in_place.forward();
        f.final_state = f.initial_state;
        run(f);
        EXPECT_TRUE(same_bits(in_place.out, apart.out));
        EXPECT_TRUE(same_bits(in_place.initial_state, apart.final_state));
        EXPECT_TRUE(in_place.initial_state.gaps_intact());
    }
}

TEST_P(Retention, TokenByTokenAgrees) {
    for (Gates gates : all_gates) {
        if (!on_cpu() && gates != Gates::resets) continue;  // stand-ins are slow
        SCOPED_TRACE(name(gates));
        const int64_t T = 3 * C + 2;
        Problem p = problem(2, T, 2, gates);
        Index every;
        for (int64_t t = 1; t <= T; t++) every.push_back(t);
        run_by(p.forward(), every);
        expect_reference(p, 1, T);
    }
}

TEST_P(Retention, ContinuesWhereItWasCut) {
    const int64_t T = (on_cpu() ? 20 : 4) * C + 9;
    const std::vector<Index> all_cuts = {
        {1, T}, {C - 1, T}, {C, T}, {C + 1, T}, {2 * C, T}, {T - 1, T}, {3, 3, 2 * C, 2 * C + 1, T - C - 4, T}};
    for (const Index &cuts : all_cuts)
        for (Gates gates : {Gates::weak, Gates::resets}) {
            SCOPED_TRACE(text(cuts) + ", gates " + name(gates));
            Problem p = problem(2, T, 2, gates);
            run_by(p.forward(), cuts);
            p.expect_reference(C, chunks(T) + (int64_t)cuts.size(), GetParam().rounds_operands);  // some of the calls do
        }
}

TEST_P(Retention, ChunkSizeChangesNothing) {
    const int64_t T = 3 * C + 2;
    for (int64_t chunk_size : {1, 7, 33, 64, 128, 1000, 1 << 30}) {
        SCOPED_TRACE(chunk_size);
        Problem p = problem(1, T, 2, Gates::resets);
        Forward f = p.forward();
        f.chunk_size = chunk_size;
        run(f);
        const int64_t chunk = std::min(chunk_size, C);
        expect_reference(p, chunk, (T + chunk - 1) / chunk);
    }
}

TEST_P(Retention, IsCausal) {
    const int64_t T = 3 * C + 2;
    Problem p = problem(2, T, 2, Gates::weak);
    run(p.forward());
    const Array before = p.out;
    for (int64_t future : {(int64_t)1, C / 2, C, 2 * C + 1, T - 1}) {
        SCOPED_TRACE(future);
        Problem other = problem(2, T, 2, Gates::weak);
        other.q = p.q, other.k = p.k, other.v = p.v, other.log_decay = p.log_decay, other.initial_state = p.initial_state;
        for (Array *x : {&other.q, &other.k, &other.v})
            each(x->shape, [&](const Index &i) {
                if (i[1] >= future) (*x)(i) = (float)other.random(-1e3, 1e3);
            });
        each(other.log_decay.shape, [&](const Index &i) {
            if (i[1] >= future) other.log_decay(i) = (float)other.random(-3, 0);
        });
        run(other.forward());
        int64_t past = 0, present = 0;
        each(before.shape, [&](const Index &i) { (i[1] < future ? past : present) += other.out(i) != before(i); });
        EXPECT_EQ(past, 0) << "outputs before the change are not what they were";
        EXPECT_GT(present, 0) << "outputs after the change are what they were";
    }
}

TEST_P(Retention, NoDecayIsLogDecayOfZero) {
    Problem none = problem(2, 2 * C + 5, 3, Gates::none), zero = problem(2, 2 * C + 5, 3, Gates::none);
    run(none.forward());
    Forward f = zero.forward();
    f.log_decay = zero.log_decay;
    run(f);
    EXPECT_TRUE(same_bits(none.out, zero.out));
    EXPECT_TRUE(same_bits(none.final_state, zero.final_state));
}

TEST_P(Retention, DecayPerHeadIsTheSameForEveryToken) {
    Problem per_head = problem(2, 2 * C + 5, 3, Gates::per_head), per_token = problem(2, 2 * C + 5, 3, Gates::per_head);
    run(per_head.forward());
    Array log_decay({2, 2 * C + 5, 3});
    each(log_decay.shape, [&](const Index &i) { log_decay(i) = per_token.log_decay(i); });
    Forward f = per_token.forward();
    f.log_decay = log_decay;
    run(f);
    EXPECT_TRUE(same_bits(per_head.out, per_token.out));
    EXPECT_TRUE(same_bits(per_head.final_state, per_token.final_state));
}

TEST_P(Retention, InfiniteDecayForgetsAllBefore) {
    const int64_t T = 2 * C + 5;
    for (int64_t reset : {(int64_t)0, (int64_t)1, C / 2, C - 1, C, C + 1, T - 1}) {
        SCOPED_TRACE(reset);
        Problem p = problem(1, T, 2);
        p.initial_state.fill(p.random, -1e30, 1e30);
        for (Array *x : {&p.k, &p.v})
            each(x->shape, [&](const Index &i) {
                if (i[1] < reset) (*x)(i) *= dtype == f16 ? 1e4f : 1e15f;
            });
        for (int64_t h = 0; h < 2; h++) p.log_decay({0, reset, h}) = -std::numeric_limits<float>::infinity();
        run(p.forward());
        expect_reference(p, C, 3);  // whose spread, from the reset on, knows nothing of what was before
    }
}

TEST_P(Retention, SmallDecaysCountAfterALargeOne) {
    // A running sum of log decays in fp32 would lose them: next to 90, steps are of 2^-17.
    Problem p = problem(1, C, 2);
    p.log_decay.fill(p.random, -1e-5, 0);
    for (int64_t h = 0; h < 2; h++) p.log_decay({0, C / 4, h}) = -90;
    run(p.forward());
    expect_reference(p, C, 1);
}

TEST_P(Retention, IsLinearInValuesAndState) {
    // Twice the values and state, exactly twice the result; and the sum of two calls, up to rounding.
    const int64_t T = C + 9;
    Problem p = problem(1, T, 2);
    each(p.v.shape, [&](const Index &i) { p.v(i) = std::round(16 * p.v(i)) / 16; });  // so that every type has the sums too
    Problem twice = p, other = p;
    each(other.v.shape, [&](const Index &i) { other.v(i) = (float)std::round(p.random(-16, 16)) / 16; });
    each(other.initial_state.shape, [&](const Index &i) { other.initial_state(i) = (float)p.random(-1, 1); });
    Problem sum = p;
    each(p.v.shape, [&](const Index &i) { twice.v(i) *= 2, sum.v(i) += other.v(i); });
    each(p.initial_state.shape,
         [&](const Index &i) { twice.initial_state(i) *= 2, sum.initial_state(i) += other.initial_state(i); });
    for (Problem *x : {&p, &twice, &other, &sum}) run(x->forward());

    std::vector<double> doubled, added;
    each(p.out.shape, [&](const Index &i) {
        const bool denormal = std::abs(p.out(i)) < std::ldexp(1, dtype.least);  // with fewer digits than its double
        EXPECT_LE(std::abs(twice.out(i) - 2 * p.out(i)), denormal ? 2 * dtype.rounding_of(0) : 0) << text(i);
        added.push_back((double)p.out(i) + other.out(i));
    });
    each(p.final_state.shape, [&](const Index &i) { EXPECT_EQ(twice.final_state(i), 2 * p.final_state(i)) << text(i); });
    // Three results with errors of their own; in 16 bits, two of up to five spreads are rounded before they are added.
    const double rounding = dtype == f32 ? 0 : 10 * std::ldexp(1, -dtype.digits);
    const tolerance::OfCall each_has = tolerance::of_call(K, C, 2, dtype, rounded_operands());
    expect_close("out", sum.out, added, reference::spread(sum.inputs()).out, 3 * each_has.out + rounding, dtype,
                 3 * each_has.absolute);
}

TEST_P(Retention, HeadsAndBatchEntriesAreIndependent) {
    for (Gates gates : {Gates::per_head, Gates::weak}) {
        SCOPED_TRACE(name(gates));
        Problem whole = problem(3, 2 * C + 5, 2, gates), apart = problem(3, 2 * C + 5, 2, gates);
        run(whole.forward());
        for (int64_t b = 2; b >= 0; b--)
            for (int64_t h = 0; h < 2; h++) run(apart.forward().head(b, h));
        EXPECT_TRUE(same_bits(whole.out, apart.out));
        EXPECT_TRUE(same_bits(whole.final_state, apart.final_state));
    }
}

TEST_P(Retention, NotANumberStaysInItsHead) {
    Problem clean = problem(2, C + 9, 3), p = problem(2, C + 9, 3);
    run(clean.forward());
    const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
    p.q({1, 5, 0, 0}) = nan, p.k({1, 5, 1, 0}) = nan, p.v({0, 5, 2, 0}) = infinity, p.initial_state({0, 1, 0, 0}) = nan;
    run(p.forward());
    auto poisoned = [](int64_t b, int64_t h) { return b == 1 ? h < 2 : h > 0; };
    each(p.out.shape, [&](const Index &i) { EXPECT_TRUE(poisoned(i[0], i[2]) || p.out(i) == clean.out(i)) << text(i); });
    each(p.final_state.shape,
         [&](const Index &i) { EXPECT_TRUE(poisoned(i[0], i[1]) || p.final_state(i) == clean.final_state(i)) << text(i); });
    EXPECT_TRUE(std::isnan(p.out({1, 5, 0, 0})) && std::isnan(p.out({1, C + 8, 1, 0})) && std::isnan(p.out({0, C + 8, 1, 0})));
    EXPECT_FALSE(std::isfinite(p.out({0, C + 8, 2, 0})));
}

TEST_P(Retention, HeadsInGroups) {
    for (holdfast_form form : {HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_RECURRENT})
        for (int64_t group : {3, 6}) {
            SCOPED_TRACE("form " + std::to_string(form) + ", groups of " + std::to_string(group));
            if (form == HOLDFAST_FORM_RECURRENT && !on_cpu()) continue;
            Problem p{2, C + 5, 6, K, V, Gates::resets, Layout::padded, true, dtype, group};
            Forward f = p.forward();
            f.form = form;
            run(f);
            expect_reference(p, C, chunks(p.T));
        }
    Problem p{1, 2 * C + 1, 4, K, V, Gates::per_head, Layout::swapped, false, dtype, 2};
    run(p.forward());
    expect_reference(p, C, chunks(p.T));
}

TEST_P(Retention, GroupsAreRepeatedKeys) {
    if (!on_cpu()) GTEST_SKIP() << "slow where a GPU is emulated; HeadsInGroups runs there";
    Problem groups{2, C + 5, 4, K, V, Gates::weak, Layout::compact, true, dtype, 2}, repeated = groups;
    run(groups.forward());
    Forward f = repeated.forward();
    Array state({2, 4, K, V});
    auto repeat = [](Tensor x, int axis, Array &to) {
        each(to.shape, [&](const Index &i) {
            int64_t offset = 0;
            for (size_t n = 0; n < i.size(); n++) offset += ((int)n == axis ? i[n] / 2 : i[n]) * x.stride[n];
            to(i) = x.data[offset];
        });
        return Tensor(to);
    };
    Array k({2, C + 5, 4, K}), v({2, C + 5, 4, V}), log_decay({2, C + 5, 4}), initial({2, 4, K, V});
    f.k = repeat(f.k, 2, k), f.v = repeat(f.v, 2, v), f.log_decay = repeat(f.log_decay, 2, log_decay);
    f.initial_state = repeat(f.initial_state, 1, initial), f.final_state = state;
    run(f);
    EXPECT_TRUE(same_bits(groups.out, repeated.out));
    each(groups.final_state.shape,
         [&](const Index &i) { EXPECT_EQ(groups.final_state(i), state({i[0], 2 * i[1] + 1, i[2], i[3]})) << text(i); });
}

TEST_P(Retention, PackedSequences) {
    // The longest last: it is the one that is run where a GPU is emulated, after the one without tokens.
    std::vector<Index> all = {{0, 2, 2, 2 + C / 4}, {0, 3 * C}, {0, 0, 0}, {0, 0, C + 1, C + 1, C + 2, 2 * C + 4, 2 * C + 4}};
    if (!on_cpu()) all.erase(all.begin(), all.begin() + 2);
    for (const Index &starts : all)
        for (bool initial : {true, false}) {
            if (!initial && !on_cpu()) continue;
            SCOPED_TRACE(text(starts) + (initial ? ", initial states" : ""));
            Problem p{1, starts.back(), 4, K, V, Gates::resets, Layout::padded, initial, dtype, 2, starts};
            run(p.forward());
            expect_reference(p, C, chunks(p.T));
        }
}

TEST_P(Retention, PackedSequencesAreCallsOfTheirOwn) {
    if (!on_cpu()) GTEST_SKIP() << "slow where a GPU is emulated; PackedSequences runs there";
    const Index starts = {0, C + 3, C + 3, 3 * C + 5};
    Problem packed{1, starts.back(), 2, K, V, Gates::weak, Layout::compact, true, dtype, 1, starts}, apart = packed;
    run(packed.forward());
    for (int s : {2, 1, 0}) {
        Forward f = apart.forward().tokens(starts[s], starts[s + 1]);
        f.starts = {}, f.form = HOLDFAST_FORM_CHUNKWISE;
        f.initial_state = f.initial_state.part(0, s, s + 1), f.final_state = f.final_state.part(0, s, s + 1);
        run(f);
    }
    EXPECT_TRUE(same_bits(packed.out, apart.out));
    EXPECT_TRUE(same_bits(packed.final_state, apart.final_state));
}

TEST_P(Retention, StartsMayBeOf32Bits) {
    if (!on_cpu()) GTEST_SKIP() << "they are read on the CPU";
    Problem wide{1, C + 3, 2, K, V, Gates::weak, Layout::compact, true, dtype, 1, {0, 5, C + 3}}, narrow = wide;
    run(wide.forward());
    Forward f = narrow.forward();
    DLTensor q = f.q.dl(), k = f.k.dl(), v = f.v.dl(), log_decay = f.log_decay.dl(), out = f.out.dl();
    DLTensor initial = f.initial_state.dl(), final = f.final_state.dl();
    Stored rows[] = {{dtype, narrow.q}, {dtype, narrow.k}, {dtype, narrow.v}, {dtype, narrow.out}};
    int n = 0;
    for (DLTensor *x : {&q, &k, &v, &out}) x->data = rows[n++].data(), x->dtype = dl_type(dtype);
    int32_t starts[] = {0, -1, 5, -1, (int32_t)C + 3};
    int64_t extent = 3, stride = 2;
    const DLTensor cu_seqlens = {starts, {kDLCPU, 0}, 1, {kDLInt, 32, 1}, &extent, &stride, 0};
    holdfast_forward_args args = forward_args(&q, &k, &v, &log_decay, &initial, &out, &final);
    args.cu_seqlens = &cu_seqlens;
    ASSERT_EQ(holdfast_forward(*context, &args), HOLDFAST_OK) << context->error();
    rows[3].load();
    EXPECT_TRUE(same_bits(wide.out, narrow.out));
}

TEST_P(Retention, ValueMajorStates) {
    for (int64_t T : {(int64_t)0, C / 4, 2 * C + 1})
        for (bool in_place : {false, true}) {
            SCOPED_TRACE("T " + std::to_string(T) + (in_place ? ", in place" : ""));
            Problem p{2, T, 4, K, V, Gates::weak, Layout::padded, true, dtype, 2, {}, true};
            Forward f = p.forward();
            if (!in_place) {
                run(f);
                expect_reference(p, C, chunks(T) + T);
                continue;
            }
            Problem apart = p;
            run(apart.forward());
            f.final_state = f.initial_state;
            run(f);
            EXPECT_TRUE(same_bits(p.initial_state, apart.final_state) && p.initial_state.gaps_intact());
        }
}

TEST_P(Retention, StatesInside) {
    if (!on_cpu()) {
        Problem p = problem(1, 4, 1);
        Array states = Array({3, 1, K, V}).forget();
        Forward f = p.forward();
        f.states = states, f.state_interval = 2;
        EXPECT_EQ(f.run(*context), HOLDFAST_UNSUPPORTED);
        EXPECT_EQ(context->error(), "states is given and the call is computed by " + backend_of(GetParam().target) +
                                        "; expected the CPU, or NULL");
        EXPECT_TRUE(same_bits(states, Array(states).forget()));
        return;
    }
    const Index packed = {0, 0, C + 3, C + 4, 3 * C + 4};
    for (int64_t interval : {(int64_t)1, C / 2 + 1, C, 2 * C, 20 * C, (int64_t)1 << 40})
        for (bool value_major : {false, true})
            for (const Index &starts : {Index(), packed}) {
                SCOPED_TRACE("every " + std::to_string(interval) + (value_major ? ", value-major" : "") + text(starts));
                const int64_t T = starts.empty() ? interval == 1 ? 3 : 3 * C + 2 : starts.back();
                if (interval == 1 && !starts.empty()) continue;
                Problem p{starts.empty() ? 2 : 1, T, 2, K, V, Gates::weak, Layout::padded, true, dtype, 2, starts, value_major};
                Problem without = p;
                const int64_t M = p.states_inside(interval);
                const Index shape = value_major ? Index{M, 1, V, K} : Index{M, 1, K, V};
                Array states = Array(shape, Layout::padded).forget();
                Forward f = p.forward();
                f.states = states, f.state_interval = interval;
                run(f);
                expect_reference(p, C, chunks(T) + T);
                p.expect_states(states, interval, C, chunks(T) + T, rounded_operands());
                // A matter of memory alone, where chunks stay what they are.
                Forward same = without.forward();
                same.form = HOLDFAST_FORM_CHUNKWISE;
                run(same);
                if (interval % C == 0) {
                    EXPECT_TRUE(same_bits(p.out, without.out));
                }
            }
}

TEST_P(Retention, FormsThatAreForced) {
    const std::pair<holdfast_form, const char *> forms[] = {{HOLDFAST_FORM_CHUNKWISE, "chunkwise"},
                                                            {HOLDFAST_FORM_RECURRENT, "recurrent"}};
    for (const auto &[form, kernel] : forms)
        for (int64_t T : {(int64_t)1, 2 * C + 3}) {
            SCOPED_TRACE(std::string(kernel) + ", T " + std::to_string(T));
            Problem p{2, T, 2, K, V, Gates::resets, Layout::compact, true, dtype};
            Forward f = p.forward();
            f.form = form;
            run(f);
            expect_reference(p, C, chunks(T) + T);
            expect_ran(kernel);
        }
}

TEST_P(Retention, NotANumberStaysInItsGroupAndSequence) {
    const Index starts = {0, C + 2, 2 * C + 4};
    Problem clean{1, starts.back(), 4, K, V, Gates::weak, Layout::compact, true, dtype, 2, starts}, p = clean;
    run(clean.forward());
    const float nan = std::numeric_limits<float>::quiet_NaN();
    p.q({0, 3, 1, 0}) = nan, p.k({0, C + 7, 1, 0}) = nan;  // of head 1 in sequence 0; of heads 2 and 3 in sequence 1
    run(p.forward());
    auto poisoned = [&](int64_t t, int64_t h) { return t < C + 2 ? h == 1 : h > 1; };
    each(p.out.shape, [&](const Index &i) { EXPECT_TRUE(poisoned(i[1], i[2]) || p.out(i) == clean.out(i)) << text(i); });
    each(p.final_state.shape,
         [&](const Index &i) { EXPECT_TRUE((i[0] == 1 && i[1] == 1) || p.final_state(i) == clean.final_state(i)) << text(i); });
    EXPECT_TRUE(std::isnan(p.out({0, 3, 1, 0})) && std::isnan(p.out({0, 2 * C + 3, 2, 0})) &&
                std::isnan(p.out({0, 2 * C + 3, 3, 0})));
}

TEST_P(Retention, ThreadsShareAHead) {
    if (!on_cpu()) GTEST_SKIP() << "threads are the CPU's";
    // Fewer sequences and heads than threads: the same bits as from one. Long enough to be shared, but for the smallest sizes.
    const int64_t T = K * V < 256 ? 3 * C + 5 : (1 << 22) / (K * V) + C + 5;
    for (const Index &starts : {Index{}, Index{0, 0, T / 4, T / 4 + 1, T}, Index{0, 0, T}, Index{0, 1, T}}) {
        const bool beside_it = starts.size() == 3;  // the long one has little or nothing
        for (int64_t group : beside_it ? Index{1} : Index{1, 2}) {
            Problem one{1, T, group, K, V, Gates::resets, Layout::padded, true, dtype, group, starts};
            ASSERT_EQ(holdfast_context_set_threads(*context, 1), HOLDFAST_OK);
            run(one.forward());
            expect_reference(one, C, chunks(T));
            for (int threads : {2, 3, 4, 9}) {
                SCOPED_TRACE(testing::Message() << threads << " threads, groups of " << group << ", starts " << text(starts));
                ASSERT_EQ(holdfast_context_set_threads(*context, threads), HOLDFAST_OK);
                Problem many{1, T, group, K, V, Gates::resets, Layout::padded, true, dtype, group, starts}, in_place = many;
                run(many.forward());
                if (K * V >= 256 && threads >= (starts.size() <= 3 ? 2 : 3)) {
                    const std::string &message = context->messages.back();
                    EXPECT_TRUE(message.find(" spans") != std::string::npos || message.find(" columns") != std::string::npos)
                        << message;
                }
                Forward f = in_place.forward();
                f.final_state = f.initial_state;
                const std::string shared = context->messages.back();
                run(f);
                EXPECT_EQ(context->messages.back(), shared) << "in place";
                EXPECT_TRUE(same_bits(one.out, many.out) && same_bits(one.out, in_place.out));
                EXPECT_TRUE(same_bits(one.final_state, many.final_state));
                EXPECT_TRUE(same_bits(one.final_state, in_place.initial_state));
                EXPECT_TRUE(many.out.gaps_intact() && many.final_state.gaps_intact());
            }
        }
    }
}

TEST_P(Retention, SameBitsInEveryRunForAnyNumberOfThreads) {
    Problem first = problem(2, 4 * C + 13, 3, Gates::resets);
    run(first.forward());
    for (int threads : {0, 1, 2, 3, 7, 256}) {
        SCOPED_TRACE(threads);
        ASSERT_EQ(holdfast_context_set_threads(*context, threads), HOLDFAST_OK);
        Problem again = problem(2, 4 * C + 13, 3, Gates::resets);
        run(again.forward());
        EXPECT_TRUE(same_bits(first.out, again.out));
        EXPECT_TRUE(same_bits(first.final_state, again.final_state));
    }
}

TEST_P(Retention, NothingToDo) {
    for (const auto &[B, T, H] : {std::array<int64_t, 3>{0, 5, 2}, {2, 0, 2}, {2, 5, 0}, {0, 0, 0}})
        for (Gates gates : all_gates)
            for (bool initial : {false, true}) {
                SCOPED_TRACE(text({B, T, H}) + ", gates " + name(gates));
                Problem p{B, T, H, K, V, gates, Layout::compact, initial, dtype};
                run(p.forward());
                const std::vector<float> state = p.final_state.values(), expected = p.initial_state.values();
                for (size_t n = 0; n < state.size(); n++) EXPECT_EQ(state[n], initial ? expected[n] : 0);
            }
}

TEST_P(Retention, ForcedTargetRuns) {
    // Few tokens are done one by one on the CPU, unless the caller says otherwise.
    const char *of_few = backend_of(GetParam().target) == "cpu" ? "recurrent" : "chunkwise";
    const bool sized = variant_for(GetParam().target, {K, V}, dtype)->key_size > 0;
    const int64_t few = sized ? C / 4 * 3 : C / 4, few_of_groups = sized ? C / 2 : C / 4;
    struct {
        int64_t T, chunk_size;
        const char *kernel;
        int64_t group;
    } calls[] = {{C + 1, 0, "chunkwise", 1}, {few + 1, 0, "chunkwise", 1},           {few, 0, of_few, 1},
                 {few, C, "chunkwise", 1},   {few_of_groups + 1, 0, "chunkwise", 2}, {few_of_groups, 0, of_few, 2}};
    for (const auto &call : calls) {
        SCOPED_TRACE("T " + std::to_string(call.T) + ", groups of " + std::to_string(call.group));
        Problem p{1, call.T, call.group, K, V, Gates::weak, Layout::compact, true, dtype, call.group};
        Forward f = p.forward();
        f.chunk_size = call.chunk_size;
        run(f);
        ASSERT_EQ(context->messages.size(), 1u);
        const std::string &message = context->messages[0];
        const std::string variant = variant_for(GetParam().target, GetParam().size, dtype, call.kernel)->name;
        expect_ran(call.kernel);
        EXPECT_NE(message.find("forced by the context"), std::string::npos) << message;

        // And the listing, seen by the context, says the same.
        for (const holdfast_variant &v : variants(*context))
            EXPECT_TRUE(!v.selected || v.target == GetParam().target) << v.name;
        bool listed = false;
        for (const holdfast_variant &v : variants(*context)) listed |= v.selected && variant == v.name;
        EXPECT_TRUE(listed);
    }
}

std::vector<Instance> retention_instances() {
    std::vector<Instance> list = instances({{64, 64}, {1, 1}, {3, 5}, {33, 17}}, {{64, 64}, {33, 17}});
    for (const Instance &i : instances({}, {{128, 128}}))
        if (i.rounds_operands) list.push_back(i);
    return list;
}
INSTANTIATE_TEST_SUITE_P(, Retention, testing::ValuesIn(retention_instances()),
                         [](const auto &info) { return name(info.param); });

}  // namespace
