// Power retention and normalised outputs through the public API: every form, degree, layout of states and number of threads
// against the reference, and the numbers that the project holds for them.
#include "../power.h"

#include <tuple>

namespace {
using namespace test;

struct Case {
    int degree;
    bool normalize;
    int64_t K, V;
};
void PrintTo(const Case &c, std::ostream *s) { *s << "degree " << c.degree << ", normalize " << c.normalize << ", K " << c.K; }

std::vector<std::string> cpu_targets() {
    std::vector<std::string> names;
    for (const std::string &target : targets(true))
        if (backend_of(target) == "cpu" && variant_for(target, {5, 7}, f32, "power")) names.push_back(target);
    return names;
}

class PowerForms : public testing::TestWithParam<std::tuple<std::string, Case>> {
protected:
    const Case c = std::get<1>(GetParam());
    Context context{std::get<0>(GetParam())};
};

TEST_P(PowerForms, MatchReferenceCutAndContinued) {
    const auto [degree, normalize, K, V] = c;
    std::optional<reference::PowerResult> want;  // the same of every form
    for (holdfast_form form : {HOLDFAST_FORM_AUTO, HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_RECURRENT, HOLDFAST_FORM_PARALLEL}) {
        SCOPED_TRACE(form);
        PowerProblem p{2, 70, 1, 2, K, V, degree, normalize};
        p.form = form;
        p.initial = false;
        for (const auto &[from, to] : std::vector<std::pair<int64_t, int64_t>>{{0, 33}, {33, 33}, {33, 70}})
            ASSERT_EQ(p.run(context, from, to), HOLDFAST_OK) << context.error();
        if (!want) want = p.want();
        expect_right(p, *want);
    }
}

TEST_P(PowerForms, StepsAreTheSame) {
    const auto [degree, normalize, K, V] = c;
    PowerProblem p{2, 9, 2, 3, K, V, degree, normalize};
    p.initial = false;
    ASSERT_EQ(p.run(context, 0, 4), HOLDFAST_OK) << context.error();
    for (int64_t t = 4; t < p.T; t++) ASSERT_EQ(p.step(context, t), HOLDFAST_OK) << context.error();
    expect_right(p, p.want());
}

INSTANTIATE_TEST_SUITE_P(, PowerForms,
                         testing::Combine(testing::ValuesIn(cpu_targets()),
                                          testing::Values(Case{1, true, 5, 7}, Case{1, true, 64, 64}, Case{2, true, 64, 64},
                                                          Case{2, false, 64, 64}, Case{2, true, 6, 5}, Case{3, true, 7, 9},
                                                          Case{3, false, 16, 64}, Case{4, true, 6, 33})),
                         [](const auto &info) {
                             const Case &c = std::get<1>(info.param);
                             return std::get<0>(info.param) + "__degree" + std::to_string(c.degree) +
                                    (c.normalize ? "_normalized_K" : "_K") + std::to_string(c.K);
                         });

TEST(Power, StatesInEveryLayout) {
    for (bool value_major : {false, true})
        for (holdfast_expansion expansion : {HOLDFAST_EXPANSION_TIGHT, HOLDFAST_EXPANSION_TILED})
            for (holdfast_form form : {HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_RECURRENT, HOLDFAST_FORM_PARALLEL}) {
                SCOPED_TRACE(testing::Message()
                             << "value_major " << value_major << ", expansion " << expansion << ", form " << form);
                Context context;
                PowerProblem p{1, 20, 2, 1, 32, 32};
                p.form = form, p.expansion = expansion, p.value_major = value_major;
                p.D = holdfast_state_size(p.K, 2, expansion);
                p.state = Array(p.states_shape()).fill(0), p.keys = Array(Index{1, 2, p.D}).fill(0), p.initial = false;
                ASSERT_EQ(p.run(context, 0, 8), HOLDFAST_OK) << context.error();
                ASSERT_EQ(p.run(context, 8, 15), HOLDFAST_OK) << context.error();
                for (int64_t t = 15; t < p.T; t++) ASSERT_EQ(p.step(context, t), HOLDFAST_OK) << context.error();
                expect_right(p, p.want());
            }
}

TEST(Power, TiledStateIsThePublishedOne) {
    // By its formula: for Y, o, i the feature x[o] x[16 Y + i], on the side of keys times 2 where o < 16 Y.
    Context context;
    PowerProblem p{1, 40, 1, 1, 48, 3};
    p.expansion = HOLDFAST_EXPANSION_TILED, p.initial = false, p.form = HOLDFAST_FORM_CHUNKWISE, p.gates = Gates::none;
    p.log_decay.fill(0);
    p.D = holdfast_state_size(48, 2, p.expansion);
    ASSERT_EQ(p.D, 48 * 16 * 2);
    p.state = Array(p.states_shape()).fill(0), p.keys = Array(Index{1, 1, p.D}).fill(0);
    ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
    int64_t f = 0;
    for (int64_t Y = 0; Y < 3; Y++)
        for (int64_t o = 0; o < 16 * (Y + 1); o++)
            for (int64_t i = 0; i < 16; i++, f++) {
                double sum = 0, of_v = 0;
                for (int64_t t = 0; t < p.T; t++) {
                    const double feature = (double)p.k({0, t, 0, o}) * p.k({0, t, 0, 16 * Y + i}) * (o < 16 * Y ? 2 : 1);
                    sum += feature, of_v += feature * p.v({0, t, 0, 1});
                }
                ASSERT_NEAR(p.keys({0, 0, f}), sum, 1e-4) << f;
                ASSERT_NEAR(p.state({0, 0, f, 1}), of_v, 1e-4) << f;
            }
    ASSERT_EQ(f, p.D);

    // And back: the same tight state, to rounding.
    Array tight(Index{1, 1, holdfast_state_size(48, 2, HOLDFAST_EXPANSION_TIGHT), 3}), again(p.state.shape);
    Tensor from(p.state), to(tight), back(again);
    DLTensor dl_from = from.dl(), dl_to = to.dl(), dl_back = back.dl();
    ASSERT_EQ(holdfast_convert_state(context, 48, &dl_from, HOLDFAST_EXPANSION_TILED, &dl_to, HOLDFAST_EXPANSION_TIGHT),
              HOLDFAST_OK)
        << context.error();
    const reference::PowerResult want = p.want();
    expect_close("tight", tight, want.state, want.state_spread, p.share());
    ASSERT_EQ(holdfast_convert_state(context, 48, &dl_to, HOLDFAST_EXPANSION_TIGHT, &dl_back, HOLDFAST_EXPANSION_TILED),
              HOLDFAST_OK);
    EXPECT_LE(relative_rms(again.values(), p.state.values()), 1e-7);
}

TEST(Power, StatesWithoutQueries) {
    Context context;
    for (const auto &[degree, normalize] : {std::make_pair(1, false), {1, true}, {2, true}})
        for (holdfast_form form :
             {HOLDFAST_FORM_AUTO, HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_RECURRENT, HOLDFAST_FORM_PARALLEL})
            for (int64_t T : {1, 70}) {
                SCOPED_TRACE(testing::Message() << "degree " << degree << ", form " << form << ", T " << T);
                PowerProblem p{2, T, 2, 0, 5, 7, degree, normalize};
                p.initial = false, p.form = form;
                ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
                expect_right(p, p.want());
            }
}

TEST(Power, PackedSequencesAreCallsOfTheirOwn) {
    Context context;
    for (holdfast_form form : {HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_RECURRENT, HOLDFAST_FORM_PARALLEL}) {
        SCOPED_TRACE(form);
        PowerProblem p{1, 90, 2, 1, 32, 32};
        p.starts = {0, 0, 70, 71, 71, 90}, p.initial = false, p.form = form;
        p.state = Array(p.states_shape()).fill(0), p.keys = Array(Index{5, 2, p.D}).fill(0);
        ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
        for (size_t s = 0; s + 1 < p.starts.size(); s++) {
            if (p.starts[s] == p.starts[s + 1]) continue;
            PowerProblem one{1, 90, 2, 1, 32, 32};
            one.initial = false, one.form = p.form;
            ASSERT_EQ(one.run(context, p.starts[s], p.starts[s + 1]), HOLDFAST_OK) << context.error();
            for (int64_t t = p.starts[s]; t < p.starts[s + 1]; t++)
                for (int64_t h = 0; h < 2; h++) {
                    ASSERT_EQ(one.out({0, t, h, 5}), p.out({0, t, h, 5}));
                    ASSERT_EQ(one.state({0, h, 17, 5}), p.state({(int64_t)s, h, 17, 5}));
                }
        }
    }
}

TEST(Power, SameBitsForAnyNumberOfThreads) {
    // Fewer heads than threads, which share columns of values and tokens; and states in place.
    for (const std::string &target : cpu_targets())
        for (const Case &c : {Case{2, true, 64, 64}, {2, true, 32, 32}, {1, true, 64, 48}, {3, false, 16, 64}})
            for (const std::vector<int32_t> &starts :
                 {std::vector<int32_t>{}, {0, 0, 70, 71, 530}, {0, 0, 530}, {0, 1, 530}, {0, 40}}) {
                const bool chunks = starts.empty() || starts.back() == 530;  // or token by token
                // Columns of a step whose kernel is of their number are shared where there is one of half as many.
                const auto step = variant_for(target, {c.K, c.V}, f32, "power_step"),
                           half = variant_for(target, {c.K, c.V / 2}, f32, "power_step");
                const bool shares = chunks || !step->value_size || half->value_size == c.V / 2;
                std::optional<PowerProblem> one;
                for (int threads : {1, 2, 5, 8}) {
                    Context context(target, threads);
                    PowerProblem p{1, chunks ? 530 : 40, 1, 2, c.K, c.V, c.degree, c.normalize};
                    p.form = chunks ? HOLDFAST_FORM_CHUNKWISE : HOLDFAST_FORM_RECURRENT, p.starts = starts;
                    p.state = Array(p.states_shape()).fill(p.random, 0, 1);
                    p.keys = Array(Index{p.sequences(), 1, p.D}).fill(p.random, 1, 2);
                    p.initial_state = p.state, p.initial_keys = p.keys;
                    PowerProblem in_place = p;
                    in_place.in_place = true;
                    SCOPED_TRACE(testing::Message() << target << ", " << testing::PrintToString(c) << ", " << threads
                                                    << " threads, " << p.sequences() << " sequences");
                    ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
                    if (threads > 1 && c.degree > 1) {
                        const std::string &message = context.messages.back();
                        EXPECT_EQ(message.find(", 1 threads") == std::string::npos, shares) << message;
                        // The long one's: pieces alone may be of those without tokens.
                        const bool parts =
                            message.find(" spans") != std::string::npos || message.find("_k64_v32_") != std::string::npos;
                        EXPECT_TRUE(parts || !chunks) << message;
                    }
                    const std::string shared = context.messages.back();
                    ASSERT_EQ(in_place.run(context), HOLDFAST_OK) << context.error();
                    EXPECT_EQ(context.messages.back(), shared) << "in place";
                    if (!one) one = p;
                    for (const PowerProblem *other : {&p, &in_place})
                        EXPECT_TRUE(same_bits(other->out, one->out) && same_bits(other->state, one->state) &&
                                    same_bits(other->keys, one->keys));
                }
            }
}

// Which form is the fastest was measured on AVX-512 and AVX2, and these are not where two of them meet: runtime/src/dispatch.cpp.
TEST(Power, AutoTakesTheFastestForm) {
    enum States { none, final_alone, given };
    struct Of {
        int degree;
        int64_t K, V, G, T;
        States states;
        const char *kernel;
    };
    const std::vector<Of> all = {{2, 64, 64, 1, 2000, none, "parallel"},
                                 {2, 64, 64, 1, 5000, none, "power"},
                                 {2, 64, 64, 4, 1500, none, "parallel"},
                                 {2, 64, 64, 4, 3500, none, "power"},
                                 {2, 64, 64, 1, 9, final_alone, "power_step"},
                                 {2, 64, 64, 1, 16, final_alone, "parallel"},
                                 {2, 64, 64, 1, 512, final_alone, "parallel"},
                                 {2, 64, 64, 1, 2500, final_alone, "power"},
                                 {2, 64, 64, 4, 3, final_alone, "power_step"},
                                 {2, 64, 64, 4, 16, final_alone, "parallel"},
                                 {2, 64, 64, 4, 128, final_alone, "parallel"},
                                 {2, 64, 64, 4, 1024, final_alone, "parallel"},
                                 {2, 64, 64, 1, 14, given, "power_step"},
                                 {2, 64, 64, 1, 32, given, "power"},
                                 {2, 64, 64, 4, 32, given, "power"},
                                 {2, 64, 64, 1, 512, given, "power"},
                                 {2, 48, 48, 1, 1900, none, "parallel"},
                                 {2, 80, 80, 1, 5200, none, "parallel"},
                                 {3, 8, 8, 1, 300, none, "parallel"},
                                 {2, 5, 7, 1, 600, none, "parallel"},
                                 {2, 48, 48, 1, 16, final_alone, "power_step"},
                                 {2, 48, 48, 1, 64, final_alone, "parallel"},
                                 {2, 48, 48, 1, 16, given, "power_step"},
                                 {2, 48, 48, 1, 320, given, "power"}};
    bool ran = false;
    for (const std::string target : {"avx512", "avx2"}) {
        const auto tuned = variant_for(target, {64, 64}, f32, "power");
        if (!tuned || !tuned->runs_here || !tuned->key_size) continue;
        ran = true;
        Context context(target, 1);
        for (const Of &c : all) {
            SCOPED_TRACE(testing::Message() << target << ", degree " << c.degree << ", K " << c.K << ", groups of " << c.G
                                            << ", T " << c.T << ", states " << c.states);
            PowerProblem p{1, c.T, 1, c.G, c.K, c.V, c.degree};
            p.initial = c.states == given, p.final = c.states != none;
            context.messages.clear();
            ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
            const std::string &message = context.messages.at(0), start = std::string("forward: ") + c.kernel;
            EXPECT_TRUE(message.find(start + "_p" + std::to_string(c.degree) + "_f32_") == 0 ||
                        message.find(start + "_f32_") == 0)
                << message;
        }
    }
    if (!ran) GTEST_SKIP() << "no kernel of this build for K = V = 64 runs here";
}

// T x T is more than 32 bits count.
TEST(Power, ParallelFormOfLongSequences) {
    PowerProblem chunks{1, 46400, 1, 1, 1, 1, 3};
    chunks.initial = false, chunks.form = HOLDFAST_FORM_CHUNKWISE;
    PowerProblem one = chunks;
    one.form = HOLDFAST_FORM_PARALLEL;
    Context context("", 1);  // more would have fewer rows each
    ASSERT_EQ(chunks.run(context), HOLDFAST_OK) << context.error();
    ASSERT_EQ(one.run(context), HOLDFAST_OK) << context.error();
    EXPECT_LE(relative_rms(one.out.values(), chunks.out.values()), tolerance::relative_rms_between_forms);
}

// States of up to 2^28 numbers.
TEST(Power, LargeStates) {
    Context context;
    PowerProblem p{1, 5, 1, 1, 32, 650, 4};
    ASSERT_GT(p.D * p.V, 1 << 25);
    p.initial = false, p.form = HOLDFAST_FORM_CHUNKWISE, p.in_place = true;
    const reference::PowerResult want = p.want(false);
    ASSERT_EQ(p.run(context, 0, 4), HOLDFAST_OK) << context.error();
    ASSERT_EQ(p.step(context, 4), HOLDFAST_OK) << context.error();
    expect_close("out", p.out, want.out, want.out_spread, p.share());
}

// Token by token a buffer counts a state for each query that shares it.
TEST(Power, ManyQueriesOfALargeState) {
    Context context;
    Problem p{1, 2, 8, 64, 129000};
    Tensor rows[] = {p.q, Tensor(p.k).part(2, 0, 1), Tensor(p.v).part(2, 0, 1), p.out};
    DLTensor q = rows[0].dl(), k = rows[1].dl(), v = rows[2].dl(), out = rows[3].dl();
    holdfast_forward_args args = forward_args(&q, &k, &v, nullptr, nullptr, &out, nullptr);
    args.degree = 2, args.form = HOLDFAST_FORM_RECURRENT;
    EXPECT_EQ(holdfast_forward(context, &args), HOLDFAST_UNSUPPORTED);
    EXPECT_NE(context.error().find("H / Hk is 8 and D V 268320000"), std::string::npos) << context.error();
}

// Of any size where there are none.
TEST(Power, NoStates) {
    Context context;
    Problem p{1, 5, 1, 256, 8};
    ASSERT_GT(holdfast_state_size(256, 4, HOLDFAST_EXPANSION_TIGHT) * p.V, 1 << 28);
    Tensor rows[] = {p.q, p.k, p.v, p.out, p.log_decay};
    DLTensor q = rows[0].dl(), k = rows[1].dl(), v = rows[2].dl(), out = rows[3].dl(), log_decay = rows[4].dl();
    holdfast_forward_args args = forward_args(&q, &k, &v, &log_decay, nullptr, &out, nullptr);
    args.degree = 4;
    for (holdfast_form form : {HOLDFAST_FORM_AUTO, HOLDFAST_FORM_PARALLEL}) {
        args.form = form;
        ASSERT_EQ(holdfast_forward(context, &args), HOLDFAST_OK) << context.error();
        EXPECT_NE(context.messages.back().find("parallel form"), std::string::npos) << context.messages.back();
    }
    args.chunk_size = 4, args.form = HOLDFAST_FORM_AUTO;
    EXPECT_EQ(holdfast_forward(context, &args), HOLDFAST_UNSUPPORTED);
    EXPECT_NE(context.error().find("of at most 268435456"), std::string::npos) << context.error();
}

// What a single token, and heads without a group, have for strides does not matter.
TEST(Power, StridesOfSingleElements) {
    Context context;
    for (int degree : {1, 2})
        for (holdfast_form form : {HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_PARALLEL, HOLDFAST_FORM_RECURRENT}) {
            SCOPED_TRACE(testing::Message() << "degree " << degree << ", form " << form);
            PowerProblem near{2, 1, 1, 1, 5, 7, degree, degree > 1};
            near.form = form;
            PowerProblem far = near;
            for (Array *x : {&far.q, &far.k, &far.v, &far.out, &far.log_decay}) x->stride[1] = (int64_t)1 << 31;
            for (Array *x : {&far.q, &far.k, &far.v, &far.out}) x->stride[2] = (int64_t)1 << 30;
            ASSERT_EQ(near.run(context), HOLDFAST_OK) << context.error();
            ASSERT_EQ(far.run(context), HOLDFAST_OK) << context.error();
            EXPECT_TRUE(same_bits(near.out, far.out) && same_bits(near.state, far.state));
        }
}

TEST(Power, QueriesOfAnySize) {
    // Of three heads that share a state one is of the usual size, one faint, and one, where nothing is divided by its weights, 0.
    for (const std::string &target : cpu_targets())
        for (const Dtype &dtype : all_dtypes)
            for (const Case &c : {Case{1, true, 64, 64},
                                  {2, true, 64, 64},
                                  {2, false, 64, 64},
                                  {2, false, 5, 7},
                                  {3, false, 16, 64},
                                  {3, true, 16, 64},
                                  {4, true, 6, 33},
                                  {4, false, 6, 33}})
                for (holdfast_form form : {HOLDFAST_FORM_RECURRENT, HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_PARALLEL}) {
                    if (!variant_for(target, {c.K, c.V}, dtype, "power_step")) continue;  // COSTLY in cmake/kernels.cmake
                    SCOPED_TRACE(testing::Message()
                                 << target << ", " << dtype.name << ", " << testing::PrintToString(c) << ", form " << form);
                    Context context(target);
                    PowerProblem p{1, 9, 1, 3, c.K, c.V, c.degree, c.normalize};
                    p.dtype = dtype, p.form = form, p.initial = false;
                    const float faint = dtype == f16 ? 6e-7f : 1e-22f;
                    each(p.q.shape, [&](const Index &i) {
                        p.q(i) *= i[2] == 0 ? 1 : i[2] == 1 ? faint : c.normalize ? -1 : 0;
                    });
                    ASSERT_EQ(p.run(context, 0, 5), HOLDFAST_OK) << context.error();
                    ASSERT_EQ(p.run(context, 5, 9), HOLDFAST_OK) << context.error();
                    expect_right(p, p.want());
                }
}

TEST(Power, NotANumberStaysInItsHead) {
    enum { steps = -1 };
    for (int form : {(int)steps, (int)HOLDFAST_FORM_CHUNKWISE, (int)HOLDFAST_FORM_RECURRENT, (int)HOLDFAST_FORM_PARALLEL}) {
        SCOPED_TRACE(form);
        Context context;
        PowerProblem clean{2, form == HOLDFAST_FORM_CHUNKWISE ? 70 : 6, 3, 2, 32, 32};
        clean.initial = false;
        if (form != steps) clean.form = (holdfast_form)form;
        PowerProblem p = clean;
        const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
        p.k({0, 2, 0, 5}) = nan, p.k({0, 3, 1, 5}) = infinity, p.v({1, 3, 2, 5}) = infinity;
        p.q({1, 4, 0, 1}) = nan, p.q({1, 4, 1, 1}) = infinity;
        for (PowerProblem *problem : {&clean, &p})
            if (form != steps)
                ASSERT_EQ(problem->run(context), HOLDFAST_OK) << context.error();
            else
                for (int64_t t = 0; t < p.T; t++) ASSERT_EQ(problem->step(context, t), HOLDFAST_OK) << context.error();
        // Of heads of queries, two to each of keys.
        auto poisoned = [](int64_t b, int64_t h) { return b == 0 ? h < 4 : h < 2 || h > 3; };
        each(p.out.shape, [&](const Index &i) { EXPECT_TRUE(poisoned(i[0], i[2]) || p.out(i) == clean.out(i)) << text(i); });
        auto poisoned_state = [](int64_t b, int64_t h) { return b == 0 ? h < 2 : h == 2; };
        each(p.state.shape,
             [&](const Index &i) { EXPECT_TRUE(poisoned_state(i[0], i[1]) || p.state(i) == clean.state(i)) << text(i); });
        each(p.keys.shape,
             [&](const Index &i) { EXPECT_TRUE((i[0] == 0 && i[1] < 2) || p.keys(i) == clean.keys(i)) << text(i); });
        for (int64_t h : {0, 1, 2, 3}) EXPECT_FALSE(std::isfinite(p.out({0, p.T - 1, h, 7}))) << h;
        for (const Index &i : {Index{1, 4, 0, 7}, {1, 4, 1, 7}, {1, p.T - 1, 4, 5}, {1, p.T - 1, 5, 5}})
            EXPECT_FALSE(std::isfinite(p.out(i))) << text(i);
    }
}

// Relative RMS at K = V = 64, at gates from weak to strong, in every form; q and k of any size; types of 16 bits. On every target. At
// gates of -20 an output is one or two tokens, and wrong by as much as their q.k: positive, these are good to fp32.
TEST(Power, Numbers) {
    constexpr double bound = tolerance::relative_rms_of_power;
    struct Numbers {
        const char *what;
        float gate;
        double size = 1;
        Dtype dtype = f32;
        double bound = tolerance::relative_rms_of_power;
        bool positive = false;
    };
    for (const Numbers &c : {Numbers{"none", 0},
                             {"weak", -1e-3f},
                             {"strong", -6},
                             {"strongest", -20, 1, f32, bound, true},
                             {"tiny", -1e-2f, 1e-15},
                             {"huge", -1e-2f, 1e8},
                             {"f16", -1e-2f, 1, f16, tolerance::relative_rms_f16},
                             {"bf16", -1e-2f, 1, bf16, tolerance::relative_rms_bf16}}) {
        const int64_t T = 1024;
        PowerProblem p{1, T, 1, 1, 64, 64};
        p.dtype = c.dtype;
        p.log_decay = Array(Index{1, T, 1}).fill(p.random, c.gate, 0);
        for (Array *x : {&p.q, &p.k})
            each(x->shape, [&](const Index &i) { (*x)(i) = (float)c.size * (c.positive ? std::abs((*x)(i)) : (*x)(i)); });
        for (Array *x : {&p.q, &p.k, &p.v}) round_to(c.dtype, *x);
        const std::vector<double> want = p.want(false).out;
        for (const std::string &target : cpu_targets()) {
            if (!variant_for(target, {64, 64}, c.dtype, "power")) continue;  // COSTLY in cmake/kernels.cmake
            Context context(target);
            for (holdfast_form form : {HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_PARALLEL, HOLDFAST_FORM_RECURRENT}) {
                SCOPED_TRACE(testing::Message() << target << ", " << c.what << ", form " << form);
                p.initial = false, p.form = form, p.out.forget();
                ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
                EXPECT_LE(relative_rms(p.out.values(), want), c.bound);
            }
        }
    }
}

TEST(Power, AllOnesInFp16) {
    // 65,536 tokens of ones: out is the decayed mean of v, for gates from none to strong.
    const int64_t T = 65536;
    int tried = 0;
    for (const auto &[K, V, gate] :
         {std::tuple<int64_t, int64_t, float>{32, 32, 0}, {32, 32, -1e-4f}, {32, 32, -1}, {64, 64, -1e-4f}}) {
        PowerProblem p{1, T, 1, 1, K, V};
        p.dtype = f16, p.q.fill(1), p.k.fill(1), p.log_decay = Array(Index{1, T, 1}).fill(gate);
        round_to(f16, p.v);
        const double decay = std::exp((double)gate);
        std::vector<double> want, sums(V);
        double weight = 0;
        for (int64_t t = 0; t < T; t++) {
            weight = decay * weight + 1;
            for (int64_t e = 0; e < V; e++) {
                sums[e] = decay * sums[e] + p.v({0, t, 0, e});
                want.push_back(sums[e] / weight);
            }
        }
        for (const std::string &target : cpu_targets()) {
            if (!variant_for(target, {K, V}, f16, "power")) continue;  // COSTLY in cmake/kernels.cmake
            SCOPED_TRACE(testing::Message() << target << ", K " << K << ", gate " << gate);
            Context context(target);
            p.initial = false, p.out.forget();
            ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
            EXPECT_LE(relative_rms(p.out.values(), want), tolerance::relative_rms_f16);
            tried++;
        }
    }
    if (!tried) GTEST_SKIP() << "no target of this build has the type";
}

}  // namespace
