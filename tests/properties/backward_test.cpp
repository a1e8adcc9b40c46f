// What holdfast_backward promises of its numbers, for every target of the CPU that runs here and for tuned and odd sizes: against
// the closed forms in double, which finite differences of the forward's reference confirm.
#include "../backward.h"
#include "../required.h"

#include <functional>
#include <tuple>

namespace {
using namespace test;

// ---- The reference -----------------------------------------------------------------------------------------------------

/// <out, dout> + <final states, dfinal> of the forward's reference: what the gradients are of.
double loss(const Backward &p) {
    if (!p.starts.empty()) {
        double sum = 0;
        for (int64_t s = 0; s < p.N; s++) {
            Backward one = p.tokens(p.starts[s], p.starts[s + 1]);
            for (Array Backward::*state :
                 {&Backward::initial_state, &Backward::initial_keys, &Backward::dfinal_state, &Backward::dfinal_keys})
                one.*state = slice(p.*state, 0, s, 1);
            sum += loss(one);
        }
        return sum;
    }
    static const float zero = 0;
    double sum = 0;
    auto add = [&](const std::vector<double> &x, const Array &gradient) {
        size_t n = 0;
        each(gradient.shape, [&](const Index &i) { sum += x[n++] * gradient(i); });
    };
    const double scale = p.scale != 0 ? p.scale : 1 / std::sqrt((double)p.K);
    if (p.is_power()) {
        reference::PowerInputs in{p.B, p.T, p.H, p.G, p.K, p.V, p.degree, p.normalize};
        in.q = Backward::strided(p.q), in.k = Backward::strided(p.k), in.v = Backward::strided(p.v);
        in.log_decay = Backward::strided(p.log_decay), in.scale = scale;
        in.initial_state = in.initial_keys = {&zero, {}};
        if (p.initial)
            in.initial_state = Backward::strided(p.initial_state), in.initial_keys = Backward::strided(p.initial_keys);
        const reference::PowerResult r = reference::power(in);
        add(r.out, p.dout);
        if (p.final) add(r.state, p.dfinal_state);
        if (p.final && p.normalize) add(r.keys, p.dfinal_keys);
    } else {
        reference::Inputs in{p.B, p.T, p.H * p.G, p.K, p.V, p.G};
        in.q = Backward::strided(p.q), in.k = Backward::strided(p.k), in.v = Backward::strided(p.v);
        in.log_decay = Backward::strided(p.log_decay), in.scale = scale;
        in.initial_state = {&zero, {}};
        if (p.initial) in.initial_state = Backward::strided(p.initial_state);
        const reference::Result r = reference::retention(in);
        add(r.out, p.dout);
        if (p.final) add(r.state, p.dfinal_state);
    }
    return sum;
}

/// The derivative of loss(p) where all elements of `inputs` move by `step(array, index)` floats at once, of fourth order; and how
/// far they moved.
struct Moved {
    double difference;                            // of the loss
    std::vector<std::vector<double>> directions;  // of each array, row-major: the difference of the elements
};
Moved move(const Backward &p, const std::vector<Array Backward::*> &inputs,
           const std::function<double(size_t, const Index &)> &step) {
    auto loss_at = [&](double factor, Backward &moved) {
        moved = p;
        for (size_t n = 0; n < inputs.size(); n++)
            each((p.*inputs[n]).shape,
                 [&](const Index &i) { (moved.*inputs[n])(i) = (float)((p.*inputs[n])(i) + factor * step(n, i)); });
        return loss(moved);
    };
    Backward forth = p, back = p, far = p, far_back = p;
    const double near = loss_at(1, forth) - loss_at(-1, back), wide = loss_at(2, far) - loss_at(-2, far_back);
    Moved result{(8 * near - wide) / 6, {}};
    for (Array Backward::*input : inputs) {
        std::vector<double> &direction = result.directions.emplace_back();
        each((p.*input).shape, [&](const Index &i) {
            const double by = (double)(forth.*input)(i) - (back.*input)(i);
            const double by_twice = (double)(far.*input)(i) - (far_back.*input)(i);
            direction.push_back((8 * by - by_twice) / 6);
        });
    }
    return result;
}

struct Case {
    int degree;
    bool normalize;
    int64_t K, V;
};
void PrintTo(const Case &c, std::ostream *s) { *s << "degree " << c.degree << ", normalize " << c.normalize << ", K " << c.K; }

/// The reference wants an out where it is normalized: nothing here runs the library.
void put_out(Backward &p) {
    reference::PowerInputs in{p.B, p.T, p.H, p.G, p.K, p.V, p.degree, p.normalize};
    in.q = Backward::strided(p.q), in.k = Backward::strided(p.k), in.v = Backward::strided(p.v);
    in.log_decay = Backward::strided(p.log_decay), in.scale = p.scale != 0 ? p.scale : 1 / std::sqrt((double)p.K);
    in.initial_state = Backward::strided(p.initial_state), in.initial_keys = Backward::strided(p.initial_keys);
    const reference::PowerResult r = reference::power(in);
    size_t n = 0;
    each(p.out.shape, [&](const Index &i) { p.out(i) = (float)r.out[n++]; });
}

class BackwardReferences : public testing::TestWithParam<Case> {};

TEST_P(BackwardReferences, AreDerivativesOfTheForward) {
    const auto [degree, normalize, K, V] = GetParam();
    Backward p{1, 9, 1, 2, K, V, degree, normalize};
    p.scale = 0.7f;
    p.log_decay.fill(p.random, -0.5, -0.1);
    if (normalize) put_out(p);
    const BackwardReference want = p.reference(0);
    const std::vector<std::pair<Array Backward::*, const BackwardReference::Values *>> all = {
        {&Backward::q, &want.q},
        {&Backward::k, &want.k},
        {&Backward::v, &want.v},
        {&Backward::log_decay, &want.log_decay},
        {&Backward::initial_state, &want.state},
        {&Backward::initial_keys, &want.keys}};
    for (size_t which = 0; which < all.size() - !normalize; which++) {
        SCOPED_TRACE(which);
        const auto &[input, values] = all[which];
        int64_t n = 0;
        each((p.*input).shape, [&, &input = input, &values = values](const Index &i) {
            const int64_t at = n++;
            if (at % 7 && at > 20) return;  // these, and every seventh
            const Moved moved = move(p, {input}, [&](size_t, const Index &j) { return i == j ? 1e-3 : 0; });
            const double got = moved.difference / moved.directions[0][at];
            // What is left of fourth order, and of an out in fp32 where there is one.
            EXPECT_NEAR(got, values->value[at], 1e-6 * values->spread[at] + 1e-9) << text(i);
        });
    }
}

TEST_P(BackwardReferences, OfDecayPerHeadAreSums) {
    const auto [degree, normalize, K, V] = GetParam();
    Backward p{2, 5, 2, 1, K, V, degree, normalize, Gates::per_head};
    if (normalize) put_out(p);
    const BackwardReference want = p.reference(0);
    for (int64_t h = 0; h < p.H; h++) {
        // All tokens of a head have one element in common.
        const Moved moved = move(p, {&Backward::log_decay}, [&](size_t, const Index &i) { return i[2] == h ? 1e-3 : 0; });
        EXPECT_NEAR(moved.difference / moved.directions[0][h], want.log_decay.value[h], 1e-6 * want.log_decay.spread[h] + 1e-9)
            << h;
    }
}

INSTANTIATE_TEST_SUITE_P(, BackwardReferences,
                         testing::Values(Case{1, false, 3, 2}, Case{1, true, 3, 2}, Case{2, false, 3, 2}, Case{2, true, 3, 2},
                                         Case{3, true, 2, 3}, Case{3, false, 2, 3}, Case{4, true, 2, 2}, Case{4, false, 2, 3}));

/// What `some` wants are the bits of `all`, and nothing else is written.
void expect_only_wanted(Backward &some, Backward &all) {
    const std::string order = "qkvgsz";
    for (size_t n = 0; n < order.size(); n++) {
        const Array &got = *some.gradients()[n];
        EXPECT_TRUE(same_bits(got, some.wants(order[n]) ? *all.gradients()[n] : Array(got).forget())) << order[n];
    }
}

/// The gradients of tokens are those of `clean`, where nothing has poisoned(b, t, head of keys).
void expect_same_elsewhere(const Backward &p, const Backward &clean,
                           const std::function<bool(int64_t b, int64_t t, int64_t h)> &poisoned) {
    for (Array Backward::*gradient : {&Backward::dq, &Backward::dk, &Backward::dv, &Backward::dlog_decay}) {
        const Array &got = p.*gradient, &want = clean.*gradient;
        each(got.shape, [&](const Index &i) {
            const int64_t h = got.shape[2] == p.H ? i[2] : i[2] / p.G;
            EXPECT_TRUE(poisoned(i[0], i[1], h) || got(i) == want(i)) << text(i);
        });
    }
}

// ---- Degree 1 ----------------------------------------------------------------------------------------------------------

class BackwardTest : public testing::TestWithParam<Instance> {
protected:
    const int64_t K = GetParam().size.K, V = GetParam().size.V, C = GetParam().chunk;
    const Dtype dtype = GetParam().dtype;
    const bool large = K * V > 1000;  // what takes the reference seconds is for smaller ones
    std::optional<Context> context;

    void SetUp() override {
        if (!GetParam().missing.empty()) {
            EXPECT_FALSE(required(backend_of(GetParam().target))) << "HOLDFAST_REQUIRED_BACKENDS has its backend";
            GTEST_SKIP() << "missing here: " << GetParam().missing;
        }
        context.emplace(GetParam().target);
    }
    Backward problem(int64_t B, int64_t T, int64_t H, int64_t G = 1, Gates gates = Gates::weak,
                     Layout layout = Layout::compact) const {
        return {B, T, H, G, K, V, 1, false, gates, dtype, layout};
    }
    void run(Backward &p) {
        p.rounds_operands = GetParam().rounds_operands;
        ASSERT_EQ(p.run(*context), HOLDFAST_OK) << context->error();
    }
    void expect_right(Backward &p) {
        run(p);
        p.expect_reference(C);
    }
};

TEST_P(BackwardTest, MatchesReference) {
    Index all = lengths(C);
    all.push_back(20 * C + 9);  // several segments
    for (int64_t T : all)
        for (Gates gates : all_gates)
            for (bool initial : {false, true})
                for (bool final : {false, true}) {
                    SCOPED_TRACE("T " + std::to_string(T) + ", gates " + name(gates) + (initial ? ", initial state" : "") +
                                 (final ? ", gradient of the final one" : ""));
                    if ((T > 4 * C || large) && initial != final) continue;
                    if (T > 2 * C && large && gates != Gates::weak) continue;
                    if (T > 4 * C && gates != Gates::weak && gates != Gates::resets) continue;
                    Backward p{large ? 1 : 2, T, 2, 1, K, V, 1, false, gates, dtype, Layout::compact, initial, final};
                    expect_right(p);
                }
}

TEST_P(BackwardTest, EveryForm) {
    for (holdfast_form form : {HOLDFAST_FORM_AUTO, HOLDFAST_FORM_PARALLEL, HOLDFAST_FORM_RECURRENT}) {
        SCOPED_TRACE(form);
        Backward p = problem(1, C + 3, 2);
        p.form = form;
        expect_right(p);
    }
}

TEST_P(BackwardTest, HeadsInGroupsAndAnyStrides) {
    for (Layout layout : layouts)
        for (Gates gates : {Gates::per_head, Gates::resets}) {
            SCOPED_TRACE(std::string(name(layout)) + ", gates " + name(gates));
            Backward p = {2,
                          2 * C + 5,
                          2,
                          3,
                          K,
                          V,
                          1,
                          false,
                          gates,
                          dtype,
                          layout,
                          true,
                          true,
                          {},
                          HOLDFAST_FORM_CHUNKWISE,
                          HOLDFAST_EXPANSION_TIGHT,
                          layout != Layout::compact};
            expect_right(p);
        }
}

TEST_P(BackwardTest, GroupsAreRepeatedKeys) {
    Backward groups = problem(1, C + 5, 2, 2, Gates::weak), repeated = problem(1, C + 5, 4, 1, Gates::weak);
    auto repeat = [](const Array &from, Array &to, int axis) {
        each(to.shape, [&](Index i) {
            float &element = to(i);
            i[axis] /= 2;
            element = from(i);
        });
    };
    repeated.q = groups.q, repeated.dout = groups.dout;
    repeat(groups.k, repeated.k, 2), repeat(groups.v, repeated.v, 2), repeat(groups.log_decay, repeated.log_decay, 2);
    repeat(groups.initial_state, repeated.initial_state, 1);
    // What a state has twice, its gradients share.
    repeat(groups.dfinal_state, repeated.dfinal_state, 1);
    each(repeated.dfinal_state.shape, [&](const Index &i) { repeated.dfinal_state(i) /= 2; });
    run(groups), run(repeated);
    const double share_of_state = 2 * groups.share(C);
    const double share = share_of_state + (groups.rounds_operands ? 2 * tolerance::of_rounded_gradients(dtype) : 0);
    const BackwardReference want = groups.reference(C);
    expect_close("dq", repeated.dq, want.q.value, want.q.spread, share, dtype);
    auto expect_sums = [&](const char *what, const Array &parts, const Array &whole, int axis,
                           const BackwardReference::Values &of, const Dtype &type, double share) {
        std::vector<double> sums;
        each(whole.shape, [&](Index i) {
            i[axis] *= 2;
            double sum = parts(i);
            i[axis]++;
            sums.push_back(sum + parts(i));
        });
        expect_close(what, whole, sums, of.spread, share + (type == f32 ? 0 : 4 * std::ldexp(1, -type.digits)), type);
    };
    expect_sums("dk", repeated.dk, groups.dk, 2, want.k, dtype, share);
    expect_sums("dv", repeated.dv, groups.dv, 2, want.v, dtype, share);
    expect_sums("dlog_decay", repeated.dlog_decay, groups.dlog_decay, 2, want.log_decay, f32, share);
    expect_sums("dinitial_state", repeated.dinitial_state, groups.dinitial_state, 1, want.state, f32, share_of_state);
}

TEST_P(BackwardTest, PackedSequences) {
    const Index starts = {0, 0, C + 2, C + 3, C + 3, 4 * C + 9, 4 * C + 9};
    for (Gates gates : {Gates::per_head, Gates::resets, Gates::none}) {
        SCOPED_TRACE(name(gates));
        Backward p{1, starts.back(), 2, 2, K, V, 1, false, gates, dtype, Layout::padded, true, true, starts};
        expect_right(p);
    }
}

TEST_P(BackwardTest, StatesThatTheForwardKept) {
    const Index packed = {0, 0, C + 2, C + 3, C + 3, 4 * C + 9};
    for (int64_t interval : {(int64_t)7, C, 2 * C, 5 * C, 24 * C, 24 * C + 1})
        for (bool value_major : {false, true})
            for (const Index &starts : {Index(), packed}) {
                if ((large || interval < C) && (value_major || !starts.empty())) continue;
                SCOPED_TRACE("every " + std::to_string(interval) + (value_major ? ", value-major" : "") + text(starts));
                const int64_t T = !starts.empty() ? starts.back() : interval > 5 * C && !large ? 25 * C + 3 : 6 * C + 3;
                Backward p{1,
                           T,
                           1,
                           2,
                           K,
                           V,
                           1,
                           false,
                           Gates::weak,
                           dtype,
                           Layout::padded,
                           true,
                           true,
                           starts,
                           HOLDFAST_FORM_CHUNKWISE,
                           HOLDFAST_EXPANSION_TIGHT,
                           value_major,
                           0,
                           0,
                           interval};
                expect_right(p);
            }
}

TEST_P(BackwardTest, StatesThatTheForwardKeptAreNotComputed) {
    const int64_t several = 24 * C;  // more than a call of the kernel has
    for (int64_t interval : {C, several, several + 1}) {
        SCOPED_TRACE(interval);
        Backward p = problem(1, several + C, 1);
        p.state_interval = interval, p.kept = p.kept_states();
        run(p);
        Backward other = p;
        other.kept.forget();  // not a number
        ASSERT_EQ(other.backward(*context), HOLDFAST_OK) << context->error();
        EXPECT_TRUE(same_bits(p.dk, other.dk) && same_bits(p.dv, other.dv)) << "they need no states";
        const bool looked_at = interval % C == 0;
        EXPECT_EQ(same_bits(p.dq, other.dq) && same_bits(p.dlog_decay, other.dlog_decay), !looked_at);
    }
}

TEST_P(BackwardTest, ScaleAndChunkSize) {
    for (const auto &[scale, chunk_size] : std::vector<std::pair<float, int64_t>>{
             {1.0f, 0}, {-0.3f, 1}, {1e-20f, 7}, {0, 33}, {0, 1000}, {0, (int64_t)1 << 30}}) {
        SCOPED_TRACE(testing::Message() << "scale " << scale << ", chunk_size " << chunk_size);
        Backward p = problem(1, 3 * C + 2, 2, 1, Gates::resets);
        p.scale = dtype == f16 && scale == 1e-20f ? 1e-2f : scale, p.chunk_size = chunk_size;
        run(p);
        p.expect_reference(chunk_size ? std::min(chunk_size, C) : C);
    }
}

TEST_P(BackwardTest, DecayPerHeadIsTheSumOverTokens) {
    Backward per_head = problem(3, 9 * C + 5, 2, 1, Gates::per_head), per_token = problem(3, 9 * C + 5, 2, 1, Gates::per_head);
    run(per_head);
    per_token.log_decay = Array({3, 9 * C + 5, 2});
    each(per_token.log_decay.shape, [&](const Index &i) { per_token.log_decay(i) = per_head.log_decay(i); });
    per_token.gates = Gates::weak, per_token.dlog_decay = Array({3, 9 * C + 5, 2}).forget();
    run(per_token);
    EXPECT_TRUE(same_bits(per_head.dq, per_token.dq) && same_bits(per_head.dk, per_token.dk));
    for (int64_t h = 0; h < 2; h++) {
        // The same numbers in the same order: batch entries one after the other, each from its last token.
        double sum = 0;
        for (int64_t b = 0; b < 3; b++) {
            double of_entry = 0;
            for (int64_t t = per_token.T; t-- > 0;) of_entry += per_token.dlog_decay({b, t, h});
            sum += of_entry;
        }
        EXPECT_EQ(per_head.dlog_decay({h}), (float)sum);
    }
}

TEST_P(BackwardTest, WhatIsNotWantedCostsTheOthersNothing) {
    Backward all = problem(2, 9 * C + 7, 2, 2, Gates::weak);
    run(all);
    for (const char *wanted : {"", "q", "k", "v", "g", "s", "kvgs", "qvgs", "qkgs", "qkvs", "qkvg", "kv"}) {
        SCOPED_TRACE(wanted);
        Backward some = problem(2, 9 * C + 7, 2, 2, Gates::weak);
        some.wanted = wanted;
        run(some);
        const std::string order = "qkvgs";
        expect_only_wanted(some, all);
    }
}

/// How many calls of kernels of gradients have been announced.
int64_t calls_of_kernels(const Context &context) {
    return std::count_if(context.messages.begin(), context.messages.end(),
                         [](const std::string &message) { return message.find("backward: ") == 0; });
}

/// Without a gradient of out: as of zeros, and queries are not looked at.
void expect_right_without_dout(Backward p, const std::function<void(Backward &)> &expect_right) {
    p.dout.fill(0), p.has_dout = false;
    expect_right(p);
    each(p.dq.shape, [&](const Index &i) { EXPECT_TRUE(!p.wants('q') || p.dq(i) == 0) << text(i); });
    Backward other = p;
    other.q.fill(std::numeric_limits<float>::quiet_NaN());
    Context context(p.target);
    ASSERT_EQ(other.backward(context), HOLDFAST_OK) << context.error();
    for (size_t n = 0; n < 6; n++) EXPECT_TRUE(same_bits(*p.gradients()[n], *other.gradients()[n])) << n;
}

TEST_P(BackwardTest, WithoutGradientOfOut) {
    for (bool final : {false, true}) {
        SCOPED_TRACE(final);
        Backward p{2, 9 * C + 7, 2, 2, K, V, 1, false, Gates::weak, dtype, Layout::padded, true, final};
        p.target = GetParam().target;
        expect_right_without_dout(p, [&](Backward &p) { expect_right(p); });
    }
    Backward p = problem(1, 5, 1);
    p.dout.fill(0), p.has_dout = false, p.wanted = "q";
    expect_right(p);
}

TEST_P(BackwardTest, SplitSequencesHandStatesOver) {
    const int64_t T = 11 * C + 9;
    for (Gates gates : {Gates::weak, Gates::resets})
        for (int64_t cut : {(int64_t)1, C - 1, C, C + 1, 8 * C, T - 1, T}) {
            if ((gates == Gates::resets || large) && cut != C + 1) continue;
            SCOPED_TRACE(std::string(name(gates)) + ", cut at " + std::to_string(cut));
            Backward whole = problem(2, T, 2, 1, gates);
            for (Array *x : {&whole.q, &whole.k, &whole.v, &whole.dout}) round_to(dtype, *x);
            Backward head = whole.tokens(0, cut), tail = whole.tokens(cut, T);
            ASSERT_EQ(head.forward(*context), HOLDFAST_OK) << context->error();
            tail.initial_state = head.final_state;
            run(tail);
            head.dfinal_state = tail.dinitial_state;
            run(head);
            // Its gradients, put together, are those of the whole.
            auto join = [&](Array Backward::*gradient) {
                each((whole.*gradient).shape, [&](Index i) {
                    float &element = (whole.*gradient)(i);
                    const bool first = i[1] < cut;
                    if (!first) i[1] -= cut;
                    element = ((first ? head : tail).*gradient)(i);
                });
            };
            for (Array Backward::*gradient : {&Backward::dq, &Backward::dk, &Backward::dv, &Backward::dlog_decay})
                join(gradient);
            whole.dinitial_state = head.dinitial_state;
            whole.rounds_operands = GetParam().rounds_operands;
            whole.expect_reference(C);
        }
}

TEST_P(BackwardTest, InfiniteDecayForgetsAllBefore) {
    const int64_t T = 2 * C + 5;
    for (int64_t reset : {(int64_t)0, C / 2, C - 1, C, T - 1}) {
        SCOPED_TRACE(reset);
        Backward p = problem(1, T, 2);
        for (int64_t h = 0; h < 2; h++) p.log_decay({0, reset, h}) = -std::numeric_limits<float>::infinity();
        run(p);
        p.expect_reference(C);
        // Nothing that comes after is seen before.
        Backward other = problem(1, T, 2);
        other.log_decay = p.log_decay;
        each(p.q.shape, [&](const Index &i) {
            if (i[1] >= reset) other.dout({i[0], i[1], i[2], 0}) += 1;
        });
        other.dfinal_state.fill(3);
        run(other);
        EXPECT_TRUE(same_bits(p.dinitial_state, other.dinitial_state));
        each(p.dk.shape, [&](const Index &i) { EXPECT_TRUE(i[1] >= reset || p.dk(i) == other.dk(i)) << text(i); });
    }
}

TEST_P(BackwardTest, GradientsOfStatesInPlace) {
    Backward apart = problem(2, 2 * C + 7, 2), p = problem(2, 2 * C + 7, 2);
    run(apart);
    Arguments a(dtype);
    for (Array *x : {&p.q, &p.k, &p.v, &p.dout}) round_to(dtype, *x);
    holdfast_backward_args args = {};
    args.struct_size = sizeof args;
    args.q = a.rows(p.q), args.k = a.rows(p.k), args.v = a.rows(p.v), args.dout = a.rows(p.dout);
    args.log_decay = a.floats(p.log_decay), args.initial_state = a.floats(p.initial_state);
    DLTensor *gradient = a.floats(p.dfinal_state);
    args.dfinal_state = args.dinitial_state = gradient;
    ASSERT_EQ(holdfast_backward(*context, &args), HOLDFAST_OK) << context->error();
    EXPECT_TRUE(same_bits(p.dfinal_state, apart.dinitial_state));
}

TEST_P(BackwardTest, HeadsAndBatchEntriesAreIndependent) {
    Backward clean = problem(2, C + 9, 2, 2), p = problem(2, C + 9, 2, 2);
    run(clean);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    p.k({1, 5, 0, 0}) = nan, p.dout({0, 7, 3, 0}) = nan;
    run(p);
    auto poisoned = [](int64_t b, int64_t h) { return b == 1 ? h == 0 : h == 1; };
    each(p.dk.shape, [&](const Index &i) { EXPECT_TRUE(poisoned(i[0], i[2]) || p.dk(i) == clean.dk(i)) << text(i); });
    each(p.dq.shape, [&](const Index &i) { EXPECT_TRUE(poisoned(i[0], i[2] / 2) || p.dq(i) == clean.dq(i)) << text(i); });
    each(p.dinitial_state.shape, [&](const Index &i) {
        EXPECT_TRUE(poisoned(i[0], i[1]) || p.dinitial_state(i) == clean.dinitial_state(i)) << text(i);
    });
    EXPECT_TRUE(std::isnan(p.dq({1, C + 8, 1, 0})) && std::isnan(p.dk({0, 0, 1, 0})));
}

TEST_P(BackwardTest, PackedSequencesAreIndependent) {
    const Index starts = {0, C + 2, C + 9, 2 * C + 9};
    Backward clean{1, starts.back(), 2, 2, K, V, 1, false, Gates::weak, dtype, Layout::compact, true, true, starts}, p = clean;
    run(clean);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    p.k({0, C + 4, 0, 0}) = nan, p.dout({0, C + 5, 3, 0}) = nan, p.dfinal_state({1, 0, 0, 0}) = nan;
    run(p);
    expect_same_elsewhere(p, clean, [&](int64_t, int64_t t, int64_t) { return t >= starts[1] && t < starts[2]; });
    each(p.dinitial_state.shape,
         [&](const Index &i) { EXPECT_TRUE(i[0] == 1 || p.dinitial_state(i) == clean.dinitial_state(i)) << text(i); });
    EXPECT_TRUE(std::isnan(p.dq({0, C + 8, 1, 0})) && std::isnan(p.dk({0, C + 2, 1, 0})));
}

TEST_P(BackwardTest, SameBitsInEveryRunForAnyNumberOfThreads) {
    for (Gates gates : {Gates::per_head, Gates::resets}) {
        SCOPED_TRACE(name(gates));
        Backward first = problem(2, 18 * C + 13, 3, 1, gates);
        run(first);
        for (int threads : {0, 1, 2, 3, 7, 256}) {
            SCOPED_TRACE(threads);
            ASSERT_EQ(holdfast_context_set_threads(*context, threads), HOLDFAST_OK);
            Backward again = problem(2, 18 * C + 13, 3, 1, gates);
            run(again);
            for (size_t n = 0; n < 5; n++) EXPECT_TRUE(same_bits(*first.gradients()[n], *again.gradients()[n])) << n;
        }
    }
}

TEST_P(BackwardTest, NothingToDo) {
    for (const auto &[B, T, H, G] :
         {std::array<int64_t, 4>{0, 5, 2, 1}, {2, 0, 2, 1}, {2, 5, 0, 1}, {0, 0, 0, 1}, {2, 5, 2, 0}})
        for (Gates gates : all_gates)
            for (bool states : {false, true}) {
                SCOPED_TRACE(text({B, T, H, G}) + ", gates " + name(gates));
                Backward p{B, T, H, G, K, V, 1, false, gates, dtype, Layout::compact, states, states};
                expect_right(p);
            }
}

std::vector<Instance> backward_instances() {
    return instances({{64, 64}, {1, 1}, {3, 5}, {33, 17}}, {{64, 64}, {33, 17}}, "chunkwise_backward");
}
INSTANTIATE_TEST_SUITE_P(, BackwardTest, testing::ValuesIn(on_cpu(backward_instances())),
                         [](const auto &info) { return name(info.param); });

// Variants whose operands are rounded: chosen where they are the best that runs, with the states that their forward kernel makes,
// over several calls of a kernel.
class RoundedBackward : public testing::TestWithParam<holdfast_variant> {};

TEST_P(RoundedBackward, MatchesReference) {
    const holdfast_variant &v = GetParam();
    if (!v.runs_here) GTEST_SKIP() << "this CPU lacks " << v.missing;
    Context context(v.target), any;
    const Dtype dtype = *std::find_if(std::begin(all_dtypes), std::end(all_dtypes),
                                      [&](const Dtype &d) { return v.dtype == std::string(d.name); });
    const int64_t C = v.chunk, K = v.key_size, V = v.value_size;
    auto expect_right = [&](Backward &&p, Context &context) {
        p.rounds_operands = true;
        ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
        EXPECT_NE(context.messages.back().find(v.name), std::string::npos) << context.messages.back();
        p.expect_reference(C);
    };
    for (Gates gates : all_gates) {
        SCOPED_TRACE(name(gates));
        expect_right({1, 10 * C + 9, 1, 1, K, V, 1, false, gates, dtype}, context);
        expect_right({2, C + 5, 2, 3, K, V, 1, false, gates, dtype, Layout::padded}, context);
    }
    expect_right({1,
                  2 * C + 9,
                  2,
                  1,
                  K,
                  V,
                  1,
                  false,
                  Gates::resets,
                  dtype,
                  Layout::swapped,
                  true,
                  true,
                  {0, 0, C + 2, 2 * C + 9},
                  HOLDFAST_FORM_CHUNKWISE,
                  HOLDFAST_EXPANSION_TIGHT,
                  true},
                 context);
    Backward all{1, C + 5, 2, 1, K, V, 1, false, Gates::weak, dtype};
    ASSERT_EQ(all.run(context), HOLDFAST_OK) << context.error();
    for (const char *wanted : {"q", "kv", "g", "s", "qkv"}) {
        SCOPED_TRACE(wanted);
        Backward some{1, C + 5, 2, 1, K, V, 1, false, Gates::weak, dtype};
        some.wanted = wanted;
        ASSERT_EQ(some.run(context), HOLDFAST_OK) << context.error();
        expect_only_wanted(some, all);
    }
    for (const std::string &target : targets()) {
        const auto best = variant_for(target, {K, V}, dtype, "chunkwise_backward");
        if (!best || !best->runs_here || backend_of(target) != "cpu") continue;
        if (best->name == std::string(v.name)) expect_right({1, C + 5, 2, 1, K, V, 1, false, Gates::weak, dtype}, any);
        break;
    }
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(RoundedBackward);
INSTANTIATE_TEST_SUITE_P(, RoundedBackward, testing::ValuesIn([] {
                             std::vector<holdfast_variant> list;
                             for (const holdfast_variant &v : variants())
                                 if (v.kernel == std::string("chunkwise_backward") && v.round_operands) list.push_back(v);
                             return list;
                         }()),
                         [](const auto &info) { return std::string(info.param.name); });

// What a GPU's calls add to the kernel: copies, one launch for packed sequences and all heads, what is not given or not wanted, and
// decays per head, which are summed there.
class BackwardOnGpu : public BackwardTest {};

TEST_P(BackwardOnGpu, MatchesReference) {
    for (int64_t T : {(int64_t)0, (int64_t)1, C, 2 * C + 5})
        for (Gates gates : all_gates) {
            if (T < C && gates != Gates::per_head) continue;
            SCOPED_TRACE("T " + std::to_string(T) + ", gates " + name(gates));
            Backward p = problem(2, T, 2, 2, gates, Layout::padded);
            expect_right(p);
        }
}

TEST_P(BackwardOnGpu, PackedSequences) {
    const Index starts = {0, 0, C + 2, C + 3, C + 3, 2 * C + 9, 2 * C + 9};
    for (Gates gates : {Gates::per_head, Gates::weak}) {
        SCOPED_TRACE(name(gates));
        Backward p{1, starts.back(), 2, 1, K, V, 1, false, gates, dtype, Layout::padded, true, true, starts};
        expect_right(p);
    }
}

TEST_P(BackwardOnGpu, WhatIsNotGivenOrNotWanted) {
    Backward without{1, C + 5, 2, 1, K, V, 1, false, Gates::weak, dtype, Layout::compact, false, false};
    without.value_major = true;
    expect_right(without);
    Backward no_queries = problem(1, 5, 2, 0), no_entries = problem(0, 5, 2, 1, Gates::per_head);
    expect_right(no_queries), expect_right(no_entries);
    Backward no_dout = problem(1, C + 5, 2, 2);
    no_dout.dout.fill(0), no_dout.has_dout = false;
    expect_right(no_dout);
    Backward all = problem(1, C + 5, 2);
    run(all);
    for (const char *wanted : {"q", "k", "v", "g", "s"}) {
        SCOPED_TRACE(wanted);
        Backward some = problem(1, C + 5, 2);
        some.wanted = wanted;
        run(some);
        const std::string order = "qkvgs";
        expect_only_wanted(some, all);
    }
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(BackwardOnGpu);
INSTANTIATE_TEST_SUITE_P(, BackwardOnGpu, testing::ValuesIn([] {
                             std::vector<Instance> list;
                             for (const Instance &i : backward_instances())
                                 if (backend_of(i.target) != "cpu" && i.size.K != 1 && i.size.K != 64) list.push_back(i);
                             return list;
                         }()),
                         [](const auto &info) { return name(info.param); });

// ---- Any degree, normalized or not -------------------------------------------------------------------------------------

/// Of degree 2, K 32, whose states there are in every layout and order.
Backward with_states(int64_t T, int64_t H, int64_t V, bool normalize, holdfast_expansion expansion, bool value_major) {
    return {1,
            T,
            H,
            1,
            32,
            V,
            2,
            normalize,
            Gates::weak,
            f32,
            Layout::padded,
            true,
            true,
            {},
            HOLDFAST_FORM_CHUNKWISE,
            expansion,
            value_major};
}

class PowerBackward : public testing::TestWithParam<std::tuple<std::string, Case>> {
protected:
    const Case c = std::get<1>(GetParam());
    Context context{std::get<0>(GetParam())};

    Backward problem(int64_t B, int64_t T, int64_t H, int64_t G = 1, Gates gates = Gates::weak) const {
        return {B, T, H, G, c.K, c.V, c.degree, c.normalize, gates};
    }
    int64_t chunk() const { return variant_for(std::get<0>(GetParam()), {c.K, c.V}, f32, "power_backward")->chunk; }
    void expect_right(Backward &p, const std::string &kernel = "power_backward") {
        ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
        EXPECT_NE(context.messages.back().find("backward: " + kernel), std::string::npos) << context.messages.back();
        p.expect_reference(kernel == "power_backward" ? chunk() : p.T);
    }
};

TEST_P(PowerBackward, MatchesReference) {
    for (int64_t T : {(int64_t)0, (int64_t)1, chunk() - 1, chunk(), chunk() + 1, 3 * chunk() + 2})
        for (Gates gates : all_gates) {
            if (T > chunk() && gates != Gates::weak && gates != Gates::resets) continue;
            SCOPED_TRACE("T " + std::to_string(T) + ", gates " + name(gates));
            Backward p = problem(1, T, 1, 2, gates);
            expect_right(p);
        }
}

TEST_P(PowerBackward, StatesThatAreNotGiven) {
    for (bool initial : {false, true}) {
        SCOPED_TRACE(initial);
        Backward p{2,   2 * chunk() + 3, 1,       1,       c.K, c.V, c.degree, c.normalize, Gates::per_head,
                   f32, Layout::padded,  initial, !initial};
        expect_right(p);
    }
}

TEST_P(PowerBackward, ParallelFormWithoutStates) {
    for (Gates gates : {Gates::weak, Gates::resets, Gates::per_head})
        for (holdfast_form form : {HOLDFAST_FORM_PARALLEL, HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_RECURRENT}) {
            SCOPED_TRACE(std::string(name(gates)) + ", form " + std::to_string(form));
            Backward p{2, chunk() + 9, 2, 2, c.K, c.V, c.degree, c.normalize, gates, f32, Layout::padded, false, false};
            p.form = form;
            expect_right(p, form == HOLDFAST_FORM_PARALLEL ? "parallel_backward" : "power_backward");
            // What keeps nothing has no gradient at all.
            if (gates == Gates::resets)
                each(p.dlog_decay.shape, [&](const Index &i) {
                    EXPECT_TRUE(std::isfinite(p.log_decay(i)) || p.dlog_decay(i) == 0) << text(i) << ": " << p.dlog_decay(i);
                });
        }
    // With one it is computed in chunks.
    Backward p = problem(1, 9, 1);
    p.form = HOLDFAST_FORM_PARALLEL;
    expect_right(p);
}

TEST_P(PowerBackward, PackedSequences) {
    for (bool states : {false, true}) {
        SCOPED_TRACE(states);
        const Index starts = {0, 0, chunk() + 2, chunk() + 3, chunk() + 3, 2 * chunk()};
        Backward p{1,   starts.back(),   2,      1,      c.K,   c.V, c.degree, c.normalize, Gates::weak,
                   f32, Layout::compact, states, states, starts};
        if (!states) p.form = HOLDFAST_FORM_PARALLEL;
        expect_right(p, states ? "power_backward" : "parallel_backward");
    }
}

TEST_P(PowerBackward, WhatIsNotWantedCostsTheOthersNothing) {
    for (holdfast_form form : {HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_PARALLEL}) {
        const bool states = form == HOLDFAST_FORM_CHUNKWISE;
        auto make = [&] {
            Backward p{1,   chunk() + 7,     2,      2,     c.K, c.V, c.degree, c.normalize, Gates::weak,
                       f32, Layout::compact, states, states};
            p.form = form;
            return p;
        };
        Backward all = make();
        ASSERT_EQ(all.run(context), HOLDFAST_OK) << context.error();
        for (const std::string wanted : {"", "q", "k", "v", "g", "s", "z", "kvgsz", "qvgsz", "qkgsz", "qkvsz"}) {
            SCOPED_TRACE("form " + std::to_string(form) + ", " + wanted);
            Backward some = make();
            some.wanted = "";
            for (char what : wanted)
                if (all.wants(what)) some.wanted += what;
            ASSERT_EQ(some.run(context), HOLDFAST_OK) << context.error();
            expect_only_wanted(some, all);
        }
    }
}

TEST_P(PowerBackward, HeadsAndBatchEntriesAreIndependent) {
    for (bool states : {false, true}) {
        SCOPED_TRACE(states);
        const int64_t T = chunk() + 7;
        Backward clean{2, T, 2, 2, c.K, c.V, c.degree, c.normalize, Gates::weak, f32, Layout::compact, states, states};
        if (!states) clean.form = HOLDFAST_FORM_PARALLEL;
        Backward p = clean;
        ASSERT_EQ(clean.run(context), HOLDFAST_OK) << context.error();
        const float nan = std::numeric_limits<float>::quiet_NaN();
        p.k({1, 5, 0, 0}) = nan, p.dout({0, 7, 3, 0}) = nan;
        ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
        auto poisoned = [](int64_t b, int64_t h) { return b == 1 ? h == 0 : h == 1; };
        expect_same_elsewhere(p, clean, [&](int64_t b, int64_t, int64_t h) { return poisoned(b, h); });
        each(p.dinitial_state.shape, [&](const Index &i) {
            EXPECT_TRUE(!states || poisoned(i[0], i[1]) || p.dinitial_state(i) == clean.dinitial_state(i)) << text(i);
        });
        EXPECT_TRUE(std::isnan(p.dq({1, T - 1, 1, 0})) && std::isnan(p.dk({0, 0, 1, 0})));
    }
}

TEST_P(PowerBackward, WithoutGradientOfOut) {
    for (bool states : {false, true}) {
        SCOPED_TRACE(states);
        Backward p{1, chunk() + 7, 2, 2, c.K, c.V, c.degree, c.normalize, Gates::weak, f32, Layout::padded, states, states};
        p.target = std::get<0>(GetParam());
        if (!states) p.form = HOLDFAST_FORM_PARALLEL;
        expect_right_without_dout(p, [&](Backward &p) {
            if (states) return expect_right(p);
            const int64_t before = calls_of_kernels(context);
            ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
            EXPECT_EQ(calls_of_kernels(context), before) << "all is zero";
            p.expect_reference(p.T);
        });
    }
}

TEST_P(PowerBackward, SplitSequencesHandStatesOver) {
    const int64_t T = 2 * chunk() + 9;
    for (int64_t cut : {(int64_t)1, chunk(), chunk() + 5}) {
        SCOPED_TRACE(cut);
        Backward whole = problem(1, T, 1);
        Backward head = whole.tokens(0, cut), tail = whole.tokens(cut, T);
        ASSERT_EQ(head.forward(context), HOLDFAST_OK) << context.error();
        ASSERT_EQ(whole.forward(context), HOLDFAST_OK) << context.error();
        tail.initial_state = head.final_state, tail.initial_keys = head.final_keys;
        ASSERT_EQ(tail.run(context), HOLDFAST_OK) << context.error();
        head.dfinal_state = tail.dinitial_state, head.dfinal_keys = tail.dinitial_keys;
        ASSERT_EQ(head.run(context), HOLDFAST_OK) << context.error();
        for (Array Backward::*gradient : {&Backward::dq, &Backward::dk, &Backward::dv, &Backward::dlog_decay})
            each((whole.*gradient).shape, [&](Index i) {
                float &element = (whole.*gradient)(i);
                const bool first = i[1] < cut;
                if (!first) i[1] -= cut;
                element = ((first ? head : tail).*gradient)(i);
            });
        whole.dinitial_state = head.dinitial_state, whole.dinitial_keys = head.dinitial_keys;
        whole.expect_reference(chunk());
    }
}

std::vector<std::string> targets_of(const std::string &kernel) {
    std::vector<std::string> names;
    for (const std::string &target : targets(true))
        if (backend_of(target) == "cpu" && variant_for(target, {5, 7}, f32, kernel)) names.push_back(target);
    return names;
}
INSTANTIATE_TEST_SUITE_P(, PowerBackward,
                         testing::Combine(testing::ValuesIn(targets_of("power_backward")),
                                          testing::Values(Case{1, true, 5, 7}, Case{2, true, 6, 5}, Case{2, false, 16, 9},
                                                          Case{3, true, 5, 9}, Case{4, false, 4, 3}, Case{2, true, 64, 64})),
                         [](const auto &info) {
                             const Case &c = std::get<1>(info.param);
                             return std::get<0>(info.param) + "__degree" + std::to_string(c.degree) +
                                    (c.normalize ? "_normalized_K" : "_K") + std::to_string(c.K);
                         });

// What a GPU's calls add to that kernel: a walk over the chunks of all heads at once, and states in every order.
class PowerBackwardOnGpu : public testing::TestWithParam<std::string> {
protected:
    Context context{GetParam()};
    static constexpr int64_t chunk = 8;  // several are slow on stand-ins

    void expect_right(Backward p, int64_t of = chunk) {
        p.chunk_size = of;
        ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
        EXPECT_NE(context.messages.back().find("backward: power_backward"), std::string::npos) << context.messages.back();
        p.expect_reference(of);
    }
};

TEST_P(PowerBackwardOnGpu, MatchesReference) {
    const Gates gates[] = {Gates::per_head, Gates::weak, Gates::resets, Gates::none, Gates::per_head};
    int n = 0;
    for (const auto &[degree, normalize] : {std::make_pair(1, true), {2, true}, {2, false}, {3, true}, {4, false}}) {
        const int64_t B = 1 + n % 2, H = 2 - n % 2;
        SCOPED_TRACE(testing::Message() << "degree " << degree << ", normalize " << normalize << ", gates " << name(gates[n]));
        expect_right({B, chunk + 3, H, 2, 5, 7, degree, normalize, gates[n], f32, Layout::padded, n != 1, n != 2});
        n++;
    }
}

TEST_P(PowerBackwardOnGpu, PackedSequencesAndNoTokens) {
    const Index starts = {0, 0, chunk + 2, chunk + 3, chunk + 3};
    for (Gates gates : {Gates::per_head, Gates::weak})
        expect_right({1, starts.back(), 2, 1, 5, 7, 2, gates == Gates::weak, gates, f32, Layout::padded, true, true, starts});
    for (bool final : {false, true}) {
        Backward p{2, 0, 2, 1, 5, 7, 2, true, Gates::per_head, f32, Layout::compact, true, final};
        p.wanted = "gsz";
        expect_right(p);
    }
    expect_right({2, 5, 2, 0, 5, 7, 3, false, Gates::weak});  // nor queries
    expect_right({1, chunk + 3, 2, 0, 5, 7, 2, true, Gates::weak, f32, Layout::padded});
    expect_right({1, 3, 1, 0, 5, 7, 1, true, Gates::none, f32, Layout::compact, true, true, {0, 0, 3}});
    expect_right({0, 5, 2, 1, 5, 7, 2, true, Gates::per_head});  // nor batch entries
}

TEST_P(PowerBackwardOnGpu, WhatIsTooLargeIsKnownBeforeAnythingIsWritten) {
    Backward p{1, 40100, 1, 1, 1, 1, 2, false, Gates::none, f32, Layout::compact, false, false, {0, 100, 40100}};
    p.form = HOLDFAST_FORM_PARALLEL;
    EXPECT_EQ(p.run(context), HOLDFAST_UNSUPPORTED);
    EXPECT_NE(context.error().find("T = 40000 tokens"), std::string::npos) << context.error();
    EXPECT_TRUE(same_bits(p.dq, Array(p.dq).forget()));
}

TEST_P(PowerBackwardOnGpu, StatesInEveryOrderAndKeptInPart) {
    Backward no_dout{1, chunk + 3, 1, 2, 5, 7, 2, true};
    no_dout.dout.fill(0), no_dout.has_dout = false;
    expect_right(no_dout);
    no_dout.wanted = "kvgsz", no_dout.dq.forget();
    expect_right(no_dout);
    // Of five chunks the states of the first and the fourth are kept.
    expect_right(with_states(9, 1, 3, true, HOLDFAST_EXPANSION_TILED, true), 2);
    for (const char *alone : {"s", "z"}) {
        SCOPED_TRACE(alone);
        Backward p{1, chunk + 3, 1, 2, 5, 7, 2, true};
        p.wanted = alone;
        expect_right(p);
    }
}

TEST_P(PowerBackwardOnGpu, WhatIsNotWantedCostsTheOthersNothing) {
    auto run = [&](const std::string &wanted) {
        Backward p{1, chunk + 1, 1, 2, 5, 7, 2, false};  // where states may not be needed
        p.chunk_size = chunk, p.wanted = wanted;
        EXPECT_EQ(p.run(context), HOLDFAST_OK) << context.error();
        return p;
    };
    Backward all = run("qkvgs");
    all.expect_reference(chunk);
    for (const char *wanted : {"q", "k", "v", "g", "s", "qg"}) {
        SCOPED_TRACE(wanted);
        Backward some = run(wanted);
        expect_only_wanted(some, all);
    }
    // A chunk of the longest, by default.
    Backward longest{1, 65, 1, 1, 5, 7, 2, true};
    ASSERT_EQ(longest.run(context), HOLDFAST_OK) << context.error();
    longest.expect_reference(64);
}

TEST_P(PowerBackwardOnGpu, TypesAreRoundedOnce) {
    for (const Dtype &dtype : {f16, bf16})
        if (variant_for(GetParam(), {5, 7}, dtype, "power_backward"))
            expect_right({1, chunk + 3, 1, 2, 5, 7, 2, true, Gates::weak, dtype, Layout::padded});
}

TEST_P(PowerBackwardOnGpu, ParallelFormWithoutStates) {
    auto expect_right = [&](Backward p) {
        p.form = HOLDFAST_FORM_PARALLEL;
        ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
        EXPECT_NE(context.messages.back().find("backward: parallel_backward"), std::string::npos) << context.messages.back();
        p.expect_reference(p.T);
    };
    expect_right({2, 67, 1, 2, 5, 7, 2, true, Gates::weak, f32, Layout::padded, false, false});
    expect_right({1, 5, 2, 1, 5, 7, 3, false, Gates::none, f32, Layout::compact, false, false});
    Backward no_dout{1, 5, 1, 2, 5, 7, 2, true, Gates::weak, f32, Layout::compact, false, false};
    no_dout.form = HOLDFAST_FORM_PARALLEL, no_dout.dout.fill(0), no_dout.has_dout = false;
    const int64_t before = calls_of_kernels(context);
    ASSERT_EQ(no_dout.run(context), HOLDFAST_OK) << context.error();
    EXPECT_EQ(calls_of_kernels(context), before) << "all is zero";
    no_dout.expect_reference(no_dout.T);
    expect_right({0, 5, 2, 1, 5, 7, 1, true, Gates::per_head, f32, Layout::compact, false, false});
    expect_right({1, 40, 2, 1, 5, 7, 1, true, Gates::per_head, f32, Layout::padded, false, false, {0, 0, 3, 37, 40}});
    const Dtype dtype = variant_for(GetParam(), {5, 7}, bf16, "parallel_backward") ? bf16 : f32;
    Backward some{1, 35, 1, 2, 5, 7, 2, false, Gates::weak, dtype, Layout::compact, false, false};
    for (const char *wanted : {"qv", "kg", "g"}) {
        some.wanted = wanted;
        some.dq.forget(), some.dk.forget(), some.dv.forget(), some.dlog_decay.forget();
        expect_right(some);
    }
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(PowerBackwardOnGpu);
INSTANTIATE_TEST_SUITE_P(, PowerBackwardOnGpu, testing::ValuesIn([] {
                             std::vector<std::string> names;
                             for (const std::string &target : targets(true))
                                 if (backend_of(target) != "cpu" && variant_for(target, {5, 7}, f32, "power_backward"))
                                     names.push_back(target);
                             return names;
                         }()),
                         [](const auto &info) { return info.param; });

TEST(PowerBackwardStates, GoThroughWithoutQueries) {
    Context context;
    for (int degree : {2, 3}) {
        SCOPED_TRACE(degree);
        Backward p{2, 70, 1, 0, 5, 7, degree, false};
        ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
        p.expect_reference(64);
    }
    // Normalized ones hand the gradient of the sum of keys on as well.
    for (int degree : {1, 2}) {
        SCOPED_TRACE(degree);
        Backward p{2, 70, 2, 0, 5, 7, degree, true};
        ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
        p.expect_reference(64);
    }
}

TEST(PowerBackwardStates, OneGradientOfTheFinalOnesIsEnough) {
    Context context;
    for (int degree : {1, 2})
        for (bool of_states : {false, true}) {
            SCOPED_TRACE(testing::Message() << "degree " << degree << (of_states ? ", of states" : ", of sums of keys"));
            Backward p{2, 70, 1, 2, 5, 7, degree, true};
            (of_states ? p.has_dsum : p.has_dstate) = false;
            ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
            p.expect_reference(64);
        }
}

TEST(PowerBackwardStates, KeptInPartGiveTheSameBits) {
    // More threads, each with all of its states, would take too much: some are then computed again.
    for (const auto &[V, kept] : {std::make_pair(9, "8"), {64, "4"}}) {
        SCOPED_TRACE(V);
        Context context;
        Backward one{1, 643, 8, 1, 16, V, 2}, many = one;
        one.wanted = many.wanted = "qg";
        ASSERT_EQ(holdfast_context_set_threads(context, 1), HOLDFAST_OK);
        ASSERT_EQ(one.run(context), HOLDFAST_OK) << context.error();
        EXPECT_NE(context.messages.back().find("all states kept"), std::string::npos) << context.messages.back();
        ASSERT_EQ(holdfast_context_set_threads(context, 8), HOLDFAST_OK);
        ASSERT_EQ(many.run(context), HOLDFAST_OK) << context.error();
        EXPECT_NE(context.messages.back().find(std::string("states kept of ") + kept + " of 11"), std::string::npos)
            << context.messages.back();
        EXPECT_TRUE(same_bits(one.dq, many.dq) && same_bits(one.dlog_decay, many.dlog_decay));
        if (V == 9) one.expect_reference(64);
    }
    // Any number of chunks, of which so few are kept as can be.
    Context context;
    ASSERT_EQ(holdfast_context_set_threads(context, 1), HOLDFAST_OK);
    for (int64_t T = 1; T < 40; T++) {
        SCOPED_TRACE(T);
        Backward p{1, T, 1, 1, 6, 2, 2};
        p.chunk_size = 1, p.wanted = "qg";
        ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
        p.expect_reference(1);
    }
    EXPECT_NE(context.messages.back().find("states kept of 6 of 39"), std::string::npos) << context.messages.back();
}

TEST(PowerBackwardForms, AutoIsParallelWhereThatIsLess) {
    Context context;
    auto kernel_of = [&](Backward p) {
        p.form = HOLDFAST_FORM_AUTO;
        EXPECT_EQ(p.run(context), HOLDFAST_OK) << context.error();
        p.expect_reference(64);
        return context.messages.back().substr(0, context.messages.back().find('_'));
    };
    Backward p{1, 70, 1, 1, 32, 32, 2, true, Gates::weak, f32, Layout::compact, false, false};
    EXPECT_EQ(kernel_of(p), "backward: parallel");
    Backward in_chunks = p, of_a_state = p, final_one = p, first_wanted = p;
    in_chunks.chunk_size = 16, of_a_state.initial = true, final_one.final = true, first_wanted.wanted += "s";
    for (const Backward &other : {in_chunks, of_a_state, final_one, first_wanted})
        EXPECT_EQ(kernel_of(other), "backward: power");
    Backward few_features{1, 70, 1, 1, 5, 5, 1, true, Gates::weak, f32, Layout::compact, false, false};
    EXPECT_EQ(kernel_of(few_features), "backward: power");
    Backward no_size_of_ours{1, 250, 1, 1, 8, 8, 3, true, Gates::weak, f32, Layout::compact, false, false};
    EXPECT_EQ(kernel_of(no_size_of_ours), "backward: parallel");
}

TEST(PowerBackwardStates, EveryLayoutAndOrder) {
    Context context;
    for (bool value_major : {false, true})
        for (holdfast_expansion expansion : {HOLDFAST_EXPANSION_TIGHT, HOLDFAST_EXPANSION_TILED})
            for (bool normalize : {false, true}) {
                SCOPED_TRACE(testing::Message()
                             << "value_major " << value_major << ", expansion " << expansion << ", normalize " << normalize);
                Backward p = with_states(20, 2, 5, normalize, expansion, value_major);
                ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
                p.expect_reference(64);
            }
}

TEST(PowerBackwardTypes, RoundOnce) {
    Context context;
    for (const Dtype &dtype : {f16, bf16})
        for (const auto &[degree, normalize, states] :
             {std::make_tuple(1, true, true), {2, true, true}, {2, false, false}, {3, false, true}}) {
            if (!has_type("power_backward", dtype)) continue;
            SCOPED_TRACE(testing::Message() << dtype.name << ", degree " << degree);
            Backward p{1, 70, 1, 2, 8, 9, degree, normalize, Gates::weak, dtype, Layout::padded, states, states};
            if (!states) p.form = HOLDFAST_FORM_PARALLEL;
            ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
            p.expect_reference(64);
        }
}

// ---- Of the whole ------------------------------------------------------------------------------------------------------

TEST(BackwardDirections, AreThoseOfTheLoss) {
    // Along random directions of all inputs at once the loss changes by the gradients' products with them.
    Context context;
    auto expect = [&](int degree, bool normalize, const Index &starts) {
        for (int round = 0; round < 3; round++) {
            SCOPED_TRACE(testing::Message() << "degree " << degree << ", normalize " << normalize << ", round " << round
                                            << ", sequences " << starts.size());
            Backward p{starts.empty() ? 2 : 1, 40,   2,    2,     6, 7, degree, normalize, Gates::weak, f32,
                       Layout::compact,        true, true, starts};
            for (int n = 0; n < round * 1000; n++) p.random(0, 1);
            p.log_decay.fill(p.random, -0.3, -0.01);
            // Of degree 4, and without a long past, sums of weights come near 0, where a difference sees more than the gradient.
            if (normalize && (degree == 4 || !starts.empty())) p.q.fill(p.random, 0.2), p.k.fill(p.random, 0.2);
            ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
            std::vector<Array Backward::*> inputs = {&Backward::q, &Backward::k, &Backward::v, &Backward::log_decay,
                                                     &Backward::initial_state};
            if (normalize) inputs.push_back(&Backward::initial_keys);
            const Moved moved = move(p, inputs, [&](size_t, const Index &) { return p.random(-1e-4, 1e-4); });
            const BackwardReference want = p.reference(64);
            const BackwardReference::Values *of[] = {&want.q, &want.k, &want.v, &want.log_decay, &want.state, &want.keys};
            const double share = p.share(64);
            double sum = 0, allowed = 0;
            for (size_t n = 0; n < inputs.size(); n++) {
                size_t at = 0;
                each(p.gradients()[n]->shape, [&](const Index &i) {
                    sum += (*p.gradients()[n])(i)*moved.directions[n][at];
                    allowed += share * of[n]->spread[at] * std::abs(moved.directions[n][at]);
                    at++;
                });
            }
            EXPECT_NEAR(sum, moved.difference, allowed);
            EXPECT_LT(allowed, 1e-2 * std::abs(moved.difference)) << "nothing would be seen";
        }
    };
    for (const auto &[degree, normalize] :
         {std::make_pair(1, false), {1, true}, {2, false}, {2, true}, {3, true}, {4, false}, {4, true}})
        expect(degree, normalize, {});
    for (const auto &[degree, normalize] : {std::make_pair(1, false), {2, true}}) expect(degree, normalize, {0, 13, 13, 40});
}

// What the project holds of gradients, with weak gates, as variants/chunkwise_backward_test.cpp has it of degree 1.
TEST(PowerBackwardAccuracy, RelativeErrors) {
    struct Problem {
        Case c;
        int64_t T;
        bool states, best = false;  // where the reference takes long, for the best target alone
        Gates gates = Gates::weak;
    };
    for (const std::string &target : targets_of("power_backward")) {
        Context context(target);
        for (const auto &[c, T, states, best, gates] : {Problem{{2, true, 8, 8}, 512, true},
                                                        {{2, false, 8, 8}, 512, true},
                                                        {{2, true, 8, 8}, 512, false},
                                                        {{2, true, 64, 64}, 256, true, true},
                                                        {{3, true, 16, 64}, 128, true, true},
                                                        {{4, true, 4, 3}, 512, true},
                                                        {{2, true, 2, 2}, 2048, false, true},
                                                        // The gradient of a decay per head is the sum of all tokens' errors.
                                                        {{2, true, 16, 16}, 3072, false, true, Gates::per_head},
                                                        {{2, true, 8, 8}, 4096, false, true, Gates::per_head},
                                                        {{1, false, 64, 64}, 4096, false, true, Gates::per_head},
                                                        {{1, false, 64, 64}, 4096, false, true, Gates::weak}}) {
            if (best && target != targets_of("power_backward").front()) continue;
            Backward p{1, T, 1, 1, c.K, c.V, c.degree, c.normalize, gates, f32, Layout::compact, states, states};
            if (!states) p.form = HOLDFAST_FORM_PARALLEL;
            ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
            SCOPED_TRACE(testing::Message() << context.messages.back() << ", T " << T << ", gates " << name(gates));
            const BackwardReference want = p.reference(64);
            const BackwardReference::Values *of[] = {&want.q, &want.k, &want.v, &want.log_decay, &want.state, &want.keys};
            for (size_t n = 0; n < p.wanted.size(); n++)
                EXPECT_LE(relative_rms(p.gradients()[n]->values(), of[n]->value), tolerance::relative_rms_of_gradient)
                    << p.wanted[n];
        }
    }
}

// What holdfast.h says of decays that forget at once: their gradients are far below the terms that they are made of, and the errors of
// a chunk's tokens, of one running sum, add up where the decay is a head's.
TEST(BackwardAccuracy, OfStrongDecays) {
    Context context;
    for (double g : {-0.5, -2.0, -8.0}) {
        SCOPED_TRACE(g);
        Backward p{1, 512, 8, 1, 64, 64, 1, false, Gates::weak, f32, Layout::compact, false, false};
        p.log_decay.fill((float)g);
        ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
        const std::vector<double> right = p.reference(64).log_decay.value;
        const std::vector<float> got = p.dlog_decay.values();
        double error = 0, square = 0, error_of_heads = 0, square_of_heads = 0;
        for (int64_t h = 0; h < p.H; h++) {
            double off = 0, sum = 0;
            for (int64_t n = h; n < (int64_t)right.size(); n += p.H) {
                off += got[n] - right[n], sum += right[n];
                error += (got[n] - right[n]) * (got[n] - right[n]), square += right[n] * right[n];
            }
            error_of_heads += off * off, square_of_heads += sum * sum;
        }
        constexpr double C = 32, some = 2;
        EXPECT_LE(std::sqrt(error / square), some * 1.5e-7 * std::sqrt(C) / std::exp(g));
        EXPECT_LE(std::sqrt(error_of_heads / square_of_heads), some * 2.5e-7 * C / std::exp(g));
    }
}

TEST(BackwardMemory, IsGivenBackAndUsedAgain) {
    struct Count {
        std::mutex mutex;
        int64_t blocks = 0, bytes = 0, most = 0, made = 0;
    } count;
    auto allocate = [](void *user, size_t bytes, size_t alignment) {
        Count &c = *(Count *)user;
        const std::lock_guard<std::mutex> lock(c.mutex);
        c.blocks++, c.made++, c.bytes += (int64_t)bytes, c.most = std::max(c.most, c.bytes);
        return std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    };
    auto deallocate = [](void *user, void *memory, size_t bytes) {
        Count &c = *(Count *)user;
        const std::lock_guard<std::mutex> lock(c.mutex);
        c.blocks--, c.bytes -= (int64_t)bytes;
        std::free(memory);
    };
    for (const auto &[degree, states] : {std::make_pair(1, true), {2, true}, {2, false}}) {
        int64_t of_one_thread = 0;
        for (int threads : {1, 2}) {
            SCOPED_TRACE(testing::Message() << "degree " << degree << ", threads " << threads);
            Context context("", threads);
            count.made = 0;
            ASSERT_EQ(holdfast_context_set_allocator(context, allocate, deallocate, &count), HOLDFAST_OK);
            Backward p{1, 300, 2, 1, 16, 16, degree, degree > 1, Gates::weak, f32, Layout::compact, states, states};
            if (!states) p.form = HOLDFAST_FORM_PARALLEL;
            ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
            EXPECT_GT(count.blocks, 0);
            if (threads == 1) of_one_thread = count.made;
            for (int n = 0; n < 10; n++) ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
            // Each thread's memory grows until it has met all pieces of the work, in whatever order it does.
            const int64_t most = threads == 1 ? of_one_thread : (threads + 1) * of_one_thread;
            EXPECT_LE(count.made, most) << "more is allocated by each call";
            EXPECT_EQ(count.made, count.blocks) << "something is given back between calls";
            context.destroy();
            EXPECT_EQ(count.blocks, 0);
            EXPECT_EQ(count.bytes, 0);
        }
    }
}

TEST(BackwardMemory, ShortMemoryIsAStatus) {
    auto nothing = [](void *, size_t, size_t) -> void * { return nullptr; };
    auto give_back = [](void *, void *, size_t) {};
    for (const auto &[degree, states] : {std::make_pair(1, true), {2, true}, {2, false}}) {
        Context context;
        ASSERT_EQ(holdfast_context_set_allocator(context, nothing, give_back, nullptr), HOLDFAST_OK);
        Backward p{1, 70, 1, 1, 5, 7, degree, false, Gates::weak, f32, Layout::compact, states, states};
        if (!states) p.form = HOLDFAST_FORM_PARALLEL;
        EXPECT_EQ(p.run(context), HOLDFAST_OUT_OF_MEMORY);
        EXPECT_NE(context.error().find("out of memory"), std::string::npos) << context.error();
    }
}

TEST(StateInterval, IsAnEighthOfTheTensors) {
    const DLDataType wide = {kDLFloat, 32, 1}, half = {kDLFloat, 16, 1}, brain = {kDLBfloat, 16, 1};
    for (const auto &[K, V, dtype, want] :
         std::vector<std::tuple<int64_t, int64_t, DLDataType, int64_t>>{{64, 64, wide, 256},
                                                                        {128, 128, wide, 128},
                                                                        {256, 256, wide, 256},
                                                                        {256, 512, wide, 512},
                                                                        {1, 1, wide, 256},
                                                                        {64, 128, wide, 256},
                                                                        {64, 129, wide, 128},
                                                                        {64, 64, half, 256},
                                                                        {128, 128, brain, 256},
                                                                        {0, 64, wide, 0},
                                                                        {64, -1, wide, 0},
                                                                        {64, 64, {kDLFloat, 64, 1}, 0},
                                                                        {64, 64, {kDLFloat, 32, 4}, 0},
                                                                        {64, 64, {kDLInt, 32, 1}, 0}})
        EXPECT_EQ(holdfast_state_interval(K, V, dtype), want) << K << ", " << V;
    EXPECT_EQ(holdfast_state_interval(INT64_MAX, INT64_MAX, wide), 0);
    EXPECT_EQ(holdfast_state_interval(INT32_MAX, INT32_MAX, wide), (int64_t)1 << 31);
}

TEST(BackwardMemory, IsAShareOfTheTensors) {
    // Of forward and backward, by two threads: of what goes in and out, as docs/autodiff.md says.
    struct Count {
        std::mutex mutex;
        int64_t bytes = 0, most = 0;
    };
    auto allocate = [](void *user, size_t bytes, size_t alignment) {
        Count &c = *(Count *)user;
        const std::lock_guard<std::mutex> lock(c.mutex);
        c.bytes += (int64_t)bytes, c.most = std::max(c.most, c.bytes);
        return std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    };
    auto deallocate = [](void *user, void *memory, size_t bytes) {
        Count &c = *(Count *)user;
        const std::lock_guard<std::mutex> lock(c.mutex);
        c.bytes -= (int64_t)bytes;
        std::free(memory);
    };
    struct Problem {
        int64_t T, H, size;
        int degree;
        holdfast_form form;
        double most;  // share
        Dtype dtype = f32;
    };
    constexpr holdfast_form chunks = HOLDFAST_FORM_CHUNKWISE, best = HOLDFAST_FORM_AUTO;  // from all weights, at these lengths
    for (const auto &[T, H, size, degree, form, most, dtype] : {Problem{4096, 8, 64, 1, chunks, 0.3},
                                                                {4096, 8, 128, 1, chunks, 0.3},
                                                                {1024, 4, 64, 2, chunks, 0.6},
                                                                {1024, 8, 64, 2, chunks, 0.3},
                                                                {2048, 8, 64, 2, chunks, 0.3},
                                                                {4096, 8, 64, 2, chunks, 0.3},
                                                                {2048, 8, 64, 2, chunks, 0.4, bf16},
                                                                {4096, 8, 64, 2, chunks, 0.3, bf16},
                                                                {1024, 8, 64, 2, best, 0.25},
                                                                {2048, 8, 64, 2, best, 0.25},
                                                                {4096, 8, 64, 2, best, 0.3},
                                                                {2048, 8, 64, 2, best, 0.3, bf16}}) {
        SCOPED_TRACE(testing::Message() << "T " << T << ", size " << size << ", degree " << degree << ", form " << form << ", "
                                        << dtype.name);
        if (!has_type("power_backward", dtype) || !has_type("parallel_backward", dtype)) continue;
        Count count;
        Context context("", 2);
        ASSERT_EQ(holdfast_context_set_allocator(context, allocate, deallocate, &count), HOLDFAST_OK);
        Backward p{1, T, H, 1, size, size, degree, degree > 1, Gates::weak, dtype, Layout::compact, false, false};
        p.form = form;
        const int64_t tensors = 8 * p.T * p.H * size * (dtype == f32 ? 4 : 2);
        for (bool kept : {false, true}) {
            if (kept && degree > 1) continue;
            if (kept) p.state_interval = holdfast_state_interval(size, size, {kDLFloat, 32, 1}), p.kept = p.kept_states();
            ASSERT_EQ(p.forward(context), HOLDFAST_OK) << context.error();
            ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
            const int64_t states = kept ? (int64_t)(p.kept.values().size() * sizeof(float)) : 0;
            const double share = (double)(count.most + states) / (double)tensors;
            const std::string what = "T" + std::to_string(T) + "_H" + std::to_string(H) + "_size" + std::to_string(size) +
                                     "_degree" + std::to_string(degree) + "_" + dtype.name;
            RecordProperty((kept ? "share_with_states_of_" : "share_of_") + what + (form == best ? "_auto" : ""),
                           std::to_string(share));
            EXPECT_EQ(context.messages.back().find("parallel_backward") != std::string::npos, form == best)
                << context.messages.back();
            EXPECT_LE(share, most) << context.messages.back();
            EXPECT_LE((double)states, (double)tensors / 7);
        }
    }
}

}  // namespace
