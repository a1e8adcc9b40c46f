// What holdfast_step promises, for every target of the CPU that runs here and for tuned and odd sizes.
#include "../allocations.h"
#include "../power.h"
#include "../step.h"

#include <array>

namespace {
using namespace test;

class StepTest : public testing::TestWithParam<Instance> {
protected:
    const int64_t K = GetParam().size.K, V = GetParam().size.V;
    const Dtype dtype = GetParam().dtype;
    const holdfast_variant chunkwise = *variant_for(GetParam().target, GetParam().size, dtype);  // of calls of many tokens
    const int64_t C = chunkwise.chunk;
    std::optional<Context> context;

    void SetUp() override {
        if (!GetParam().missing.empty()) GTEST_SKIP() << "this CPU lacks " << GetParam().missing;
        context.emplace(GetParam().target);
    }
    Problem problem(int64_t B, int64_t T, int64_t H, Gates gates = Gates::weak) const {
        return {B, T, H, K, V, gates, Layout::compact, true, dtype};
    }
    void run(Forward f) { ASSERT_EQ(f.run(*context), HOLDFAST_OK) << context->error(); }
};

TEST_P(StepTest, MatchesReference) {
    int n = 0;
    for (Gates gates : all_gates)
        for (bool initial : {false, true}) {
            const Layout layout = layouts[n++ % std::size(layouts)];
            SCOPED_TRACE(std::string("gates ") + name(gates) + ", " + name(layout) + (initial ? ", initial state" : ""));
            Problem p{2, 50, 3, K, V, gates, layout, initial, dtype};
            p.forward();  // rounds to the type
            const Array inputs[] = {p.q, p.k, p.v, p.log_decay, p.initial_state};
            run_steps(p, *context);
            p.expect_reference(1, p.T);
            const Array *after[] = {&p.q, &p.k, &p.v, &p.log_decay, &p.initial_state};
            for (int i = 0; i < 5; i++) EXPECT_TRUE(after[i]->same_memory(inputs[i])) << "input " << i << " was written";
        }
}

TEST_P(StepTest, HeadsInGroupsAndValueMajorStates) {
    for (int64_t group : {1, 2, 6})
        for (bool value_major : {false, true}) {
            SCOPED_TRACE("groups of " + std::to_string(group) + (value_major ? ", value-major" : ""));
            Problem p{2, 9, 6, K, V, Gates::strong, Layout::padded, true, dtype, group, {}, value_major};
            run_steps(p, *context);
            p.expect_reference(1, p.T);
        }
}

TEST_P(StepTest, IsAForwardCallOfOneToken) {
    for (Gates gates : {Gates::per_head, Gates::resets}) {
        SCOPED_TRACE(name(gates));
        Problem steps = problem(2, 9, 3, gates), calls = problem(2, 9, 3, gates);
        run_steps(steps, *context);
        Forward f = calls.forward();
        for (int64_t t = 0; t < 9; t++) {
            run(f.tokens(t, t + 1));
            f.initial_state = f.final_state;
        }
        EXPECT_TRUE(same_bits(steps.out, calls.out));
        EXPECT_TRUE(same_bits(steps.final_state, calls.final_state));
    }
}

TEST_P(StepTest, IsWhatForwardDoesWithFewTokens) {
    for (int64_t T : {(int64_t)0, (int64_t)1, C / 4 - 1, C / 4}) {
        for (bool initial : {false, true}) {
            SCOPED_TRACE("T " + std::to_string(T) + (initial ? ", initial state" : ""));
            Problem steps = problem(2, T, 3), call = problem(2, T, 3);
            steps.initial = call.initial = initial;
            run_steps(steps, *context);
            run(call.forward());
            call.expect_reference(1, T);
            if (T >= C / 4) continue;  // blocks of tokens round decays together
            EXPECT_TRUE(same_bits(steps.out, call.out));
            EXPECT_TRUE(same_bits(steps.final_state, call.final_state));
        }
    }
}

TEST_P(StepTest, GoesOnFromAForwardCall) {
    const int64_t T = 3 * C + 2, cut = 2 * C + 1;
    for (holdfast_form form : {HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_RECURRENT})
        for (int64_t group : {1, 2}) {
            SCOPED_TRACE("form " + std::to_string(form) + ", groups of " + std::to_string(group));
            Problem p{2, T, 2, K, V, Gates::weak, Layout::compact, true, dtype, group, {}, group == 2};
            Forward f = p.forward();
            f.form = form;
            run(f.tokens(0, cut));
            for (int64_t t = cut; t < T; t++) ASSERT_EQ(step(f, t).run(*context), HOLDFAST_OK) << context->error();
            p.expect_reference(C, T, chunkwise.round_operands && form == HOLDFAST_FORM_CHUNKWISE);
        }
}

TEST_P(StepTest, ScaleMultipliesScores) {
    for (float scale : {1.0f, -0.3f, 1e-20f}) {
        SCOPED_TRACE(scale);
        Problem p = problem(1, 5, 2);
        p.scale = scale;
        run_steps(p, *context);
        p.expect_reference(1, 5);
    }
}

TEST_P(StepTest, ByteOffsetAndNullStrides) {
    Problem p = problem(2, 1, 3);
    p.final_state = p.initial_state;
    Step s = step(p.forward(), 0);
    DLTensor q = s.q.dl(), k = s.k.dl(), v = s.v.dl(), log_decay = s.log_decay.dl(), state = s.state.dl(), out = s.out.dl();
    Stored rows[] = {{dtype, p.q}, {dtype, p.k}, {dtype, p.v}, {dtype, p.out}};
    int n = 0;
    for (DLTensor *x : {&q, &k, &v, &out}) x->data = rows[n++].data(), x->dtype = dl_type(dtype);
    for (DLTensor *x : {&q, &k, &v, &log_decay, &state, &out}) {
        x->strides = nullptr;
        x->data = (char *)x->data - 64;
        x->byte_offset = 64;
    }
    const holdfast_step_args args = step_args(&q, &k, &v, &log_decay, &state, &out);
    ASSERT_EQ(holdfast_step(*context, &args), HOLDFAST_OK) << context->error();
    rows[3].load();
    p.expect_reference(1, 1);
}

TEST_P(StepTest, InputsMayBeOneTensor) {
    Problem p = problem(2, 1, 3);
    p.final_state = p.initial_state;
    Step s = step(p.forward(), 0);
    s.q = s.k = Tensor(p.q.data(), {2, 3, K}, {0, 0, 1});
    ASSERT_EQ(s.run(*context), HOLDFAST_OK) << context->error();
    each(p.q.shape, [&](const Index &i) { p.k(i) = p.q({0, 0, 0, i[3]}); });
    p.q = p.k;
    p.expect_reference(1, 1);
}

TEST_P(StepTest, HeadsAndBatchEntriesAreIndependent) {
    Problem whole = problem(3, 4, 2), apart = problem(3, 4, 2);
    run_steps(whole, *context);
    apart.final_state = apart.initial_state;
    for (int64_t b = 2; b >= 0; b--)
        for (int64_t h = 0; h < 2; h++)
            for (int64_t t = 0; t < 4; t++)
                ASSERT_EQ(step(apart.forward().head(b, h), t).run(*context), HOLDFAST_OK) << context->error();
    EXPECT_TRUE(same_bits(whole.out, apart.out));
    EXPECT_TRUE(same_bits(whole.final_state, apart.final_state));
}

TEST_P(StepTest, NotANumberStaysInItsHead) {
    Problem clean = problem(2, 3, 3), p = problem(2, 3, 3);
    run_steps(clean, *context);
    const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
    p.q({1, 1, 0, 0}) = nan, p.k({1, 1, 1, 0}) = nan, p.v({0, 1, 2, 0}) = infinity, p.initial_state({0, 1, 0, 0}) = nan;
    run_steps(p, *context);
    auto poisoned = [](int64_t b, int64_t h) { return b == 1 ? h < 2 : h > 0; };
    each(p.out.shape, [&](const Index &i) {
        EXPECT_TRUE(poisoned(i[0], i[2]) || p.out(i) == clean.out(i)) << text(i);
        EXPECT_TRUE(i[1] > 0 || (i[0] == 0 && i[2] == 1) || p.out(i) == clean.out(i)) << "before it came: " << text(i);
    });
    EXPECT_TRUE(std::isnan(p.out({1, 1, 0, 0})) && std::isnan(p.out({1, 2, 1, 0})) && std::isnan(p.out({0, 2, 1, 0})));
    EXPECT_FALSE(std::isfinite(p.out({0, 2, 2, 0})));
}

TEST_P(StepTest, InfiniteDecayForgetsAllBefore) {
    Problem p = problem(1, 3, 2);
    p.initial_state.fill(p.random, -1e30, 1e30);
    for (int64_t h = 0; h < 2; h++) p.log_decay({0, 1, h}) = -std::numeric_limits<float>::infinity();
    run_steps(p, *context);
    p.expect_reference(1, 3);
}

TEST_P(StepTest, SameBitsForAnyNumberOfThreads) {
    const int64_t H = 5 + ((int64_t)1 << 18) / (K * V);  // a megabyte in each batch entry
    Problem first = problem(2, 1, H, Gates::resets);
    run_steps(first, *context);
    for (int threads : {1, 2, 3, 7}) {
        SCOPED_TRACE(threads);
        ASSERT_EQ(holdfast_context_set_threads(*context, threads), HOLDFAST_OK);
        Problem again = problem(2, 1, H, Gates::resets);
        run_steps(again, *context);
        const std::string used = " " + std::to_string(std::min(threads, 5)) + " threads";
        EXPECT_NE(context->messages.back().find(used), std::string::npos) << context->messages.back();
        EXPECT_TRUE(same_bits(first.out, again.out));
        EXPECT_TRUE(same_bits(first.final_state, again.final_state));
    }
}

/// A step on the only token of a problem in fp32, whose arguments are made once.
struct OneToken {
    Tensor tensors[7];
    DLTensor dl[7];
    holdfast_step_args args;

    explicit OneToken(PowerProblem &p) {
        int n = 0;
        for (Array *x : {&p.q, &p.k, &p.v, &p.log_decay, &p.out}) tensors[n++] = Tensor(*x).without(1);
        tensors[n++] = p.state, tensors[n++] = p.keys;
        for (n = 0; n < 7; n++) dl[n] = tensors[n].dl();
        args = step_args(&dl[0], &dl[1], &dl[2], &dl[3], &dl[5], &dl[4]);
        args.degree = p.degree;
        if (p.normalize) args.normalize = HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS, args.sum_of_keys = &dl[6];
    }
    holdfast_status run(holdfast_context *context) const { return holdfast_step(context, &args); }
};

// Where they outnumber heads: sizes that the kernel was compiled for by strips that it was compiled for too, others by any.
TEST_P(StepTest, ThreadsShareColumnsOfAHead) {
    const bool tuned = variant_for(GetParam().target, {K, V}, dtype, "recurrent")->key_size > 0;
    const int64_t wide = tuned ? V : 100, T = ((int64_t)1 << 20) / (K * wide) + C + 5;
    auto strips = [&](int64_t n) {
        return !tuned || variant_for(GetParam().target, {K, V / n}, dtype, "recurrent")->value_size == V / n;
    };
    for (const Index &starts : {Index{}, Index{0, 0, T - 3, T}})
        for (int64_t group : {1, 2}) {
            std::optional<Problem> one;
            for (int threads : {1, 2, 4, 9}) {
                SCOPED_TRACE(testing::Message() << threads << " threads, groups of " << group << ", starts " << text(starts));
                ASSERT_EQ(holdfast_context_set_threads(*context, threads), HOLDFAST_OK);
                Problem p{1, T, group, K, wide, Gates::weak, Layout::padded, true, dtype, group, starts, group == 2};
                Problem in_place = p;
                Forward f = p.forward(), g = in_place.forward();
                f.form = g.form = HOLDFAST_FORM_RECURRENT, g.final_state = g.initial_state;
                for (Forward *call : {&f, &g}) {
                    run(*call);
                    const std::string &message = context->messages.back();
                    EXPECT_EQ(message.find(" strips") != std::string::npos, threads > 1 && strips(2)) << message;
                }
                if (!one) one = p;
                EXPECT_TRUE(same_bits(p.out, one->out) && same_bits(in_place.out, one->out));
                EXPECT_TRUE(same_bits(p.final_state, one->final_state));
                EXPECT_TRUE(same_bits(in_place.initial_state, one->final_state));
                EXPECT_TRUE(p.out.gaps_intact() && p.final_state.gaps_intact());
            }
        }
}

// Of a state that is worth it; nor is memory allocated again. Threads that run one after the other always do the same.
TEST_P(StepTest, ThreadsShareOneTokenOfALargeHead) {
    if (!(dtype == f32) || K > 3) GTEST_SKIP() << "once for each target, in fp32";
    const auto in_turn = [](void *, int tasks, void (*task)(void *, int), void *data) {
        for (int n = 0; n < tasks; n++) task(data, n);
        return 0;
    };
    for (int degree : {1, 2}) {
        if (degree == 2 && !variant_for(GetParam().target, {9, 9}, f32, "power")) continue;
        std::optional<PowerProblem> one;
        for (int threads : {1, 2, 5}) {
            SCOPED_TRACE(testing::Message() << threads << " threads, degree " << degree);
            ASSERT_EQ(holdfast_context_set_threads(*context, threads), HOLDFAST_OK);
            ASSERT_EQ(holdfast_context_set_thread_pool(*context, in_turn, nullptr), HOLDFAST_OK);
            PowerProblem p{1, 1, 1, 2, degree == 1 ? 1500 : 54, 1000, degree, degree == 2};
            p.state.fill(p.random, 0, 1), p.keys.fill(p.random, 1, 2);
            OneToken token(p);
            ASSERT_EQ(token.run(*context), HOLDFAST_OK) << context->error();
            const std::string strips = " in " + std::to_string(threads) + " strips", &message = context->messages.back();
            EXPECT_EQ(message.find(strips) != std::string::npos, threads > 1) << message;
            if (!one) one = p;
            EXPECT_TRUE(same_bits(p.out, one->out) && same_bits(p.state, one->state) && same_bits(p.keys, one->keys));
            ASSERT_EQ(holdfast_context_set_verbose(*context, nullptr, nullptr), HOLDFAST_OK);  // composes a text
            const int64_t before = allocations;
            ASSERT_EQ(token.run(*context), HOLDFAST_OK);
            EXPECT_EQ(allocations - before, 0);
            context.emplace(GetParam().target);
        }
    }
}

TEST_P(StepTest, SmallStatesAreLeftToOneThread) {
    Problem p = problem(1, 1, 2);
    run_steps(p, *context);
    EXPECT_NE(context->messages.back().find(" 1 threads"), std::string::npos) << context->messages.back();
}

TEST_P(StepTest, AllocatesNothingAfterTheFirstCall) {
    ASSERT_EQ(holdfast_context_set_verbose(*context, nullptr, nullptr), HOLDFAST_OK);  // composes a text
    Problem p = problem(2, 1, 3);
    p.final_state = p.initial_state;
    Step s = step(p.forward(), 0);
    Tensor *tensors[] = {&s.q, &s.k, &s.v, &s.log_decay, &s.state, &s.out};
    DLTensor dl[6];
    for (int n = 0; n < 6; n++) dl[n] = tensors[n]->dl();
    Stored rows[] = {{dtype, p.q}, {dtype, p.k}, {dtype, p.v}, {dtype, p.out}};
    int row = 0;
    for (int n : {0, 1, 2, 5}) dl[n].data = rows[row++].data(), dl[n].dtype = dl_type(dtype);
    const holdfast_step_args args = step_args(&dl[0], &dl[1], &dl[2], &dl[3], &dl[4], &dl[5]);
    ASSERT_EQ(holdfast_step(*context, &args), HOLDFAST_OK) << context->error();
    const int64_t before = allocations;
    for (int n = 0; n < 10; n++) holdfast_step(*context, &args);
    EXPECT_EQ(allocations - before, 0);
    EXPECT_GT(before, 0) << "allocations are not counted";
}

// Of degree 2, normalized, and of calls of a few tokens, which are steps. On one thread: where states are large, another may have its
// first turn, and get its workspace, in a later call.
TEST_P(StepTest, PowerAllocatesNothingAfterTheFirstCall) {
    if (!(dtype == f32)) GTEST_SKIP() << "in fp32";
    if (!variant_for(GetParam().target, {K, V}, f32, "power")) GTEST_SKIP() << "this build has none for the target";
    ASSERT_EQ(holdfast_context_set_verbose(*context, nullptr, nullptr), HOLDFAST_OK);
    ASSERT_EQ(holdfast_context_set_threads(*context, 1), HOLDFAST_OK);
    PowerProblem p{2, 1, 3, 2, K, V};
    const OneToken token(p);
    ASSERT_EQ(token.run(*context), HOLDFAST_OK) << context->error();
    const int64_t before = allocations;
    for (int n = 0; n < 10; n++) token.run(*context);
    EXPECT_EQ(allocations - before, 0);
}

TEST_P(StepTest, CallsOfFewTokensAllocateNothingAfterTheFirst) {
    if (!(dtype == f32)) GTEST_SKIP() << "in fp32";
    ASSERT_EQ(holdfast_context_set_verbose(*context, nullptr, nullptr), HOLDFAST_OK);
    ASSERT_EQ(holdfast_context_set_threads(*context, 1), HOLDFAST_OK);
    for (int64_t T : {2, 3, 4})
        for (int degree : {1, 2}) {
            if (degree == 2 && !variant_for(GetParam().target, {K, V}, f32, "power")) continue;
            SCOPED_TRACE(testing::Message() << "T " << T << ", degree " << degree);
            PowerProblem p{2, T, 3, 2, K, V, degree, degree > 1};
            Tensor tensors[] = {p.q, p.k, p.v, p.log_decay, p.initial_state, p.out, p.state, p.initial_keys, p.keys};
            DLTensor dl[9];
            for (int n = 0; n < 9; n++) dl[n] = tensors[n].dl();
            holdfast_forward_args args = forward_args(&dl[0], &dl[1], &dl[2], &dl[3], &dl[4], &dl[5], &dl[6]);
            args.degree = degree;
            if (degree > 1) args.normalize = HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS;
            if (degree > 1) args.initial_sum_of_keys = &dl[7], args.final_sum_of_keys = &dl[8];
            ASSERT_EQ(holdfast_forward(*context, &args), HOLDFAST_OK) << context->error();
            const int64_t before = allocations;
            for (int n = 0; n < 10; n++) holdfast_forward(*context, &args);
            EXPECT_EQ(allocations - before, 0);
        }
}

TEST_P(StepTest, NothingToDo) {
    for (const auto &[B, H] : {std::array<int64_t, 2>{0, 2}, {2, 0}, {0, 0}})
        for (Gates gates : all_gates) {
            SCOPED_TRACE(text({B, H}) + ", gates " + name(gates));
            Problem p{B, 1, H, K, V, gates, Layout::compact, true, dtype};
            EXPECT_EQ(step(p.forward(), 0).run(*context), HOLDFAST_OK) << context->error();
        }
}

TEST_P(StepTest, ForcedTargetRuns) {
    Problem p = problem(1, 1, 1);
    run_steps(p, *context);
    ASSERT_EQ(context->messages.size(), 1u);
    const std::string &message = context->messages[0];
    const std::string variant = variant_for(GetParam().target, GetParam().size, dtype, "recurrent")->name;
    EXPECT_EQ(message.find("step: " + variant + " "), 0u) << message;
    EXPECT_NE(message.find("forced by the context"), std::string::npos) << message;
}

INSTANTIATE_TEST_SUITE_P(
    , StepTest, testing::ValuesIn(on_cpu(instances({{64, 64}, {1, 1}, {3, 5}, {33, 17}}, {{64, 64}, {33, 17}}, "recurrent"))),
    [](const auto &info) { return name(info.param); });

}  // namespace
