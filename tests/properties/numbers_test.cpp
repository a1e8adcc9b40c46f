// The numbers that the project holds, at length; and tensors beyond 2^31 bytes.
#include "../backward.h"
#include "../power.h"

#include <functional>

namespace {
using namespace test;

Problem retnet(const Dtype &dtype = f32) { return {1, 4096, 8, 64, 64, Gates::per_head, Layout::compact, false, dtype}; }

void run(Forward f, Context &context) { ASSERT_EQ(f.run(context), HOLDFAST_OK) << context.error(); }
void run_token_by_token(Forward f, Context &context) {
    for (int64_t t = 0; t < 4096; t++) {
        ASSERT_EQ(f.tokens(t, t + 1).run(context), HOLDFAST_OK) << context.error();
        f.initial_state = f.final_state;
    }
}

class Numbers : public testing::TestWithParam<Instance> {
protected:
    void SetUp() override {
        if (!GetParam().missing.empty()) GTEST_SKIP() << "this CPU lacks " << GetParam().missing;
    }
    bool on_cpu() const { return backend_of(GetParam().target) == "cpu"; }
    /// A call for each token, or, on a GPU, where each would copy the states, one of the recurrent form.
    void run_recurrent(Forward f, Context &context) const {
        if (on_cpu()) return run_token_by_token(f, context);
        f.form = HOLDFAST_FORM_RECURRENT;
        run(f, context);
    }
    /// Of one call; token by token nothing but out is rounded.
    double of_state() const {
        return GetParam().rounds_operands ? tolerance::relative_rms_of_state(GetParam().dtype) : tolerance::relative_rms;
    }
};

TEST_P(Numbers, RelativeErrorOf4096Tokens) {
    Context context(GetParam().target);
    const Dtype dtype = GetParam().dtype;
    const double of_out = tolerance::relative_rms_of_out(dtype);
    Problem whole = retnet(dtype), tokens = retnet(dtype);
    run(whole.forward(), context);
    const reference::Result want = reference::retention(whole.inputs());
    EXPECT_LE(relative_rms(whole.out.values(), want.out), of_out);
    EXPECT_LE(relative_rms(whole.final_state.values(), want.state), of_state());
    run_recurrent(tokens.forward(), context);
    EXPECT_LE(relative_rms(tokens.out.values(), want.out), of_out) << "token by token";
    EXPECT_LE(relative_rms(tokens.final_state.values(), want.state), tolerance::relative_rms) << "token by token";
}

TEST_P(Numbers, DecaysThatFp32CannotHoldDoNotDrift) {
    // RetNet's decays, 1 - 2^-n, are numbers of fp32. These are not: rounded, each would be off the same way at every token.
    for (bool token_by_token : {false, true}) {
        SCOPED_TRACE(token_by_token ? "token by token" : "one call");
        Context context(GetParam().target);
        // Products of 16-bit numbers, of few digits, have none where those of a large state end: what rounds its decay away does
        // so at every token.
        Problem p = retnet(GetParam().dtype);
        each({p.H}, [&](const Index &h) { p.log_decay({0, 0, h[0]}) = -1e-4f * (float)(1 + std::sqrt(h[0])); });
        if (token_by_token)
            run_recurrent(p.forward(), context);
        else
            run(p.forward(), context);
        const std::vector<double> want = reference::retention(p.inputs()).state;
        const std::vector<float> got = p.final_state.values();
        for (int64_t h = 0; h < p.H; h++) {
            const int64_t size = p.K * p.V;
            const std::vector<double> want_of_head(want.begin() + h * size, want.begin() + (h + 1) * size);
            const std::vector<float> got_of_head(got.begin() + h * size, got.begin() + (h + 1) * size);
            EXPECT_LE(relative_rms(got_of_head, want_of_head), token_by_token ? tolerance::relative_rms : of_state())
                << "head " << h;
        }
    }
}

TEST_P(Numbers, StrongGatesKeepTheDigitsOfWeakOnes) {
    // -64 and -3.7e-6 are numbers of fp32, their sum would be rounded by as much; in the chunk of the first token, and in a later
    // one.
    if (!(GetParam().dtype == f32)) return;
    for (auto [form, degree] :
         {std::pair{HOLDFAST_FORM_CHUNKWISE, 1}, {HOLDFAST_FORM_CHUNKWISE, 2}, {HOLDFAST_FORM_PARALLEL, 1}})
        for (int64_t T : {3, 67}) {
            SCOPED_TRACE(testing::Message() << "form " << form << ", degree " << degree << ", T " << T);
            Context context(GetParam().target);
            PowerProblem p{1, T, 1, 1, 64, 64, degree, false, Gates::weak, f32, form};
            p.initial = false, p.log_decay.fill(0);
            each(p.q.shape, [&](const Index &i) { p.q(i) *= i[1] == T - 1, p.k(i) *= i[1] == 0; });
            p.log_decay({0, T - 2, 0}) = -64, p.log_decay({0, T - 1, 0}) = -3.7e-6f;
            ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
            const reference::PowerResult want = p.want();
            EXPECT_LE(relative_rms(p.out.values(), want.out), tolerance::relative_rms);
            EXPECT_LE(relative_rms(p.state.values(), want.state), tolerance::relative_rms);
        }
}

TEST_P(Numbers, ManyOnesAreCountedExactly) {
    // Of each token q.k = 64 and v = 1: out is the number of tokens, the state too, and no sum is rounded. But where operands are,
    // out is within what the header says of it: twice the rounding of its type, once of the state and once of itself.
    const int64_t T = on_cpu() ? 65536 : 8192;  // minutes where a GPU is emulated
    const Dtype dtype = GetParam().dtype;
    for (holdfast_form form : {HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_RECURRENT}) {
        Context context(GetParam().target);
        Array ones({1, T, 1, 64}), out({1, T, 1, 64}), state({1, 1, 64, 64});
        ones.fill(1.0f);
        Forward f{ones, ones, ones, {}, {}, out, state};
        f.scale = 0x1p-22f, f.dtype = dtype, f.form = form;
        run(f, context);
        const bool exact = !GetParam().rounds_operands || form == HOLDFAST_FORM_RECURRENT;
        int64_t wrong = 0;
        each(out.shape, [&](const Index &i) {
            const double want = (i[1] + 1) * 0x1p-16;
            wrong += exact ? out(i) != dtype.round(want) : !(std::abs(out(i) - want) <= 2 * dtype.rounding_of(want));
        });
        EXPECT_EQ(wrong, 0);
        each(state.shape, [&](const Index &i) { wrong += state(i) != T; });
        EXPECT_EQ(wrong, 0) << "in the state";
    }
}

INSTANTIATE_TEST_SUITE_P(, Numbers, testing::ValuesIn(instances({{64, 64}}, {{64, 64}})),
                         [](const auto &info) { return name(info.param); });

TEST(Forms, AgreeOver4096Tokens) {
    // The recurrent form is of blocks of tokens, on targets that have a kernel for these; token by token a call is for each.
    for (const std::string &target : targets(true)) {
        if (backend_of(target) != "cpu" || !variant_for(target, {64, 64}, f32, "recurrent")) continue;
        Context context(target);
        Problem chunks = retnet(), blocks = retnet(), tokens = retnet();
        Forward in_chunks = chunks.forward(), in_blocks = blocks.forward();
        in_chunks.form = HOLDFAST_FORM_CHUNKWISE, in_blocks.form = HOLDFAST_FORM_RECURRENT;
        run(in_chunks, context);
        run(in_blocks, context);
        const std::string &message = context.messages.back();
        const bool any_size = variant_for(target, {64, 64}, f32, "recurrent")->key_size == 0;
        EXPECT_NE(message.find(any_size ? " recurrent_f32_k0_" : " recurrent_f32_c8_"), std::string::npos) << message;
        run_token_by_token(tokens.forward(), context);
        for (const auto &[form, p] : {std::pair("blocks of tokens", &blocks), {"token by token", &tokens}}) {
            SCOPED_TRACE(target + ", " + form);
            constexpr double bound = tolerance::relative_rms_between_forms;
            EXPECT_LE(relative_rms(p->out.values(), chunks.out.values()), bound);
            EXPECT_LE(relative_rms(p->final_state.values(), chunks.final_state.values()), bound);
        }
    }
}

/// Bytes that a context takes for them.
size_t workspace_of(const std::function<void(Context &)> &calls) {
    size_t bytes = 0;
    auto allocate = [](void *sum, size_t bytes, size_t alignment) {
        *(size_t *)sum += bytes;
        return std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    };
    Context context("", 1);
    EXPECT_EQ(holdfast_context_set_allocator(
                  context, allocate, [](void *, void *memory, size_t) { std::free(memory); }, &bytes),
              HOLDFAST_OK);
    calls(context);
    context.destroy();
    return bytes;
}

void expect_no_drift(Context &context, int64_t T, int64_t size, Gates gates, holdfast_form form) {
    Problem p{1, T, 1, size, size, gates};
    if (gates == Gates::per_head) p.log_decay.fill((float)std::log1p(-0x1p-12));  // RetNet's slowest of 8
    Forward f = p.forward();
    f.form = form;
    run(f, context);
    const reference::Result want = reference::retention(p.inputs());
    EXPECT_LE(relative_rms(p.out.values(), want.out), tolerance::relative_rms) << name(gates);
    EXPECT_LE(relative_rms(p.final_state.values(), want.state), tolerance::relative_rms) << name(gates);
}

// One call of a million tokens of one head: no drift, and workspace as for a thousand.
TEST(LongSequence, AMillionTokens) {
    auto workspace = [](int64_t T) {
        return workspace_of([&](Context &context) {
            for (Gates gates : {Gates::weak, Gates::per_head}) expect_no_drift(context, T, 8, gates, HOLDFAST_FORM_CHUNKWISE);
        });
    };
    EXPECT_EQ(workspace(1 << 20), workspace(1 << 10));
}

TEST(LongSequence, AMillionTokensOneAfterTheOther) {
    auto workspace = [](int64_t T) {
        return workspace_of(
            [&](Context &context) { expect_no_drift(context, T, 4, Gates::per_head, HOLDFAST_FORM_RECURRENT); });
    };
    EXPECT_EQ(workspace(1 << 20), workspace(1 << 10));
}

// The same at a size that is tuned. A token's row begins one element after that of the one before: a million take no memory but for
// out. Of what lies 2^17 tokens back, e^-32 is left: what the reference needs for the last ones.
TEST(LongSequence, AMillionTokensOfATunedSize) {
    const int64_t T = 1 << 20, near = 1 << 17, checked = 1 << 10, size = 64;
    Random random;
    Array q({T + size}), k = q, v = q, log_decay({1}), out({1, T, 1, size}), state({1, 1, size, size});
    for (Array *x : {&q, &k, &v}) x->fill(random);
    log_decay.fill((float)std::log1p(-0x1p-12));
    const Index stride = {0, 1, 0, 1};
    reference::Inputs in{1, near, 1, size, size};
    auto last = [&](const Array &x) { return reference::Strided{x.data() + T - near, {0, 1, 0, 1}}; };
    static const float zero = 0;
    in.q = last(q), in.k = last(k), in.v = last(v), in.log_decay = {log_decay.data(), {}}, in.initial_state = {&zero, {}};
    in.scale = 1 / std::sqrt((double)size);
    const reference::Result all = reference::retention(in);
    const std::vector<double> want(all.out.end() - checked * size, all.out.end());
    for (const std::string &target : targets(true))
        for (const auto &[form, kernel] : {std::make_pair(HOLDFAST_FORM_CHUNKWISE, std::string("chunkwise")),
                                           {HOLDFAST_FORM_RECURRENT, std::string("recurrent")}}) {
            const auto variant = variant_for(target, {size, size}, f32, kernel);
            if (backend_of(target) != "cpu" || !variant || variant->key_size == 0) continue;
            SCOPED_TRACE(variant->name);
            Context context(target);
            std::fill_n(out.data() + (T - checked) * size, checked * size, std::numeric_limits<float>::quiet_NaN());
            state.forget();
            auto rows = [&](Array &x) { return Tensor(x.data(), {1, T, 1, size}, stride); };
            Forward f{rows(q), rows(k), rows(v), log_decay, {}, out, state};
            f.form = form;
            run(f, context);
            const std::string &message = context.messages.back();  // of recurrent kernels blocks of tokens have their own
            for (const std::string &part : {" " + kernel + "_f32_", "_k64_v64_" + target + " ("})
                EXPECT_NE(message.find(part), std::string::npos) << message;
            const std::vector<float> got(out.data() + (T - checked) * size, out.data() + T * size);
            EXPECT_LE(relative_rms(got, want), tolerance::relative_rms);
            EXPECT_LE(relative_rms(state.values(), all.state), tolerance::relative_rms);
        }
}

TEST(LongSequence, HalfAMillionTokensOfPower) {
    auto workspace = [](int64_t T) {
        return workspace_of([&](Context &context) {
            PowerProblem p{1, T, 1, 1, 4, 2};
            p.form = HOLDFAST_FORM_CHUNKWISE, p.initial = false;
            p.log_decay.fill((float)std::log1p(-0x1p-12));
            ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
            // (q.k)^2 is the product of all pairs of elements: a state of K K rows, in double, is as good as the reference,
            // which would take all pairs of tokens.
            const double decay = std::exp((double)p.log_decay({0, 0, 0}));
            double state[4][4][3] = {};
            std::vector<double> want;
            for (int64_t t = 0; t < T; t++) {
                const float *q = p.q.data() + t * p.K, *k = p.k.data() + t * p.K, *v = p.v.data() + t * p.V;
                double out[3] = {};
                for (int a = 0; a < 4; a++)
                    for (int b = 0; b < 4; b++)
                        for (int e = 0; e < 3; e++) {  // the last is the sum of weights
                            double &s = state[a][b][e];
                            s = decay * s + (double)k[a] * k[b] * (e < 2 ? v[e] : 1);
                            out[e] += (double)q[a] * q[b] * s;
                        }
                want.push_back(out[0] / out[2]), want.push_back(out[1] / out[2]);
            }
            EXPECT_LE(relative_rms(p.out.values(), want), tolerance::relative_rms_of_power);
            std::vector<double> sums;  // of a <= b, b outermost; those that are there twice times the root of 2
            for (int b = 0; b < 4; b++)
                for (int a = 0; a <= b; a++) sums.push_back(state[a][b][2] * (a < b ? std::sqrt(2.0) : 1));
            EXPECT_LE(relative_rms(p.keys.values(), sums), tolerance::relative_rms);
        });
    };
    EXPECT_EQ(workspace(1 << 19), workspace(1 << 10));
}

/// Memory where elements of tensors lie as far apart as their strides say: gigabytes, of which only theirs are touched.
class FarApart {
public:
    /// The elements of an array at those strides. Without data where there is no address space.
    Tensor copy(const Array &a, const Index &stride) {
        Tensor x(nullptr, a.shape, stride);
        int64_t low = 0, high = 0;
        for (size_t axis = 0; axis < x.shape.size(); axis++) {
            const int64_t reach = (x.shape[axis] - 1) * x.stride[axis];
            (reach < 0 ? low : high) += reach;
        }
        memory.push_back(std::make_unique<Reserved>((high - low + 1) * sizeof(float)));
        if (!*memory.back()) {
            complete = false;
            return x;
        }
        x.data = memory.back()->floats() - low;
        each(x.shape, [&](const Index &i) { at(x, i) = a(i); });
        return x;
    }
    static float &at(const Tensor &x, const Index &i) {
        int64_t offset = 0;
        for (size_t axis = 0; axis < i.size(); axis++) offset += i[axis] * x.stride[axis];
        return x.data[offset];
    }
    static void expect_same(const char *what, const Tensor &got, const Array &want) {
        each(want.shape, [&](const Index &i) { ASSERT_EQ(at(got, i), want(i)) << what << text(i); });
    }
    bool complete = true;

private:
    std::vector<std::unique_ptr<Reserved>> memory;
};

// Nothing but a limit on address space is a reason to skip: a machine with less memory than tensors reach has enough.
#define SKIP_WITHOUT(memory) \
    if (!(memory).complete) { \
        ASSERT_NE(Reserved::limit(), "") << "no address space of gigabytes, and nothing limits it"; \
        GTEST_SKIP() << "no address space of gigabytes: " << Reserved::limit(); \
    }

// Every tensor of a problem moved to where `stride` spreads it over gigabytes, and called there: the same bits must come out.
void expect_same_far_apart(Problem p, const std::vector<Index> &strides) {
    Context context;
    Problem q = p;
    ASSERT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();

    FarApart memory;
    Forward f = q.forward();
    Tensor *tensors[] = {&f.q, &f.k, &f.v, &f.log_decay, &f.initial_state, &f.out, &f.final_state};
    const Array *arrays[] = {&q.q, &q.k, &q.v, &q.log_decay, &q.initial_state, &q.out, &q.final_state};
    for (int n = 0; n < 7; n++) *tensors[n] = memory.copy(*arrays[n], strides[n]);
    SKIP_WITHOUT(memory);
    ASSERT_EQ(f.run(context), HOLDFAST_OK) << context.error();
    memory.expect_same("out", f.out, p.out), memory.expect_same("final_state", f.final_state, p.final_state);
}

constexpr int64_t gigabyte = (1 << 30) / sizeof(float);  // in elements

TEST(LargeTensors, BatchEntriesAndHeadsGigabytesApart) {
    const Index rows = {3 * gigabyte, 64, -5 * gigabyte, 1}, states = {-5 * gigabyte, 3 * gigabyte, 64, 1};
    expect_same_far_apart({2, 70, 2, 64, 64}, {rows, rows, rows, {3 * gigabyte, -1, 5 * gigabyte}, states, rows, states});
}

TEST(LargeTensors, FewTokensOfHeadsGigabytesApart) {
    const Index rows = {12 * gigabyte, 2 * gigabyte, -5 * gigabyte, 1}, states = {-5 * gigabyte, 3 * gigabyte, 64, 1};
    for (int64_t T : {1, 3})
        expect_same_far_apart({2, T, 2, 64, 64}, {rows, rows, rows, {3 * gigabyte, -1, 5 * gigabyte}, states, rows, states});
}

TEST(LargeTensors, TokensGigabytesApartInSum) {
    const int64_t T = 400, step = 3 * gigabyte / T;
    const Index rows = {1, step, 64, 1}, states = {4096, 4096, 64, 1};
    expect_same_far_apart({1, T, 2, 64, 64}, {rows, rows, rows, {1, step, 1}, states, rows, states});
}

TEST(LargeTensors, PowerOfHeadsGigabytesApart) {
    // Heads that share keys are within 2^30 elements.
    const Index rows = {5 * gigabyte, 32, -3 * gigabyte, 1}, states = {-5 * gigabyte, 3 * gigabyte, 32, 1};
    const Index decays = {3 * gigabyte, -1, 5 * gigabyte}, sums = {-5 * gigabyte, 3 * gigabyte, 1};
    for (holdfast_form form : {HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_RECURRENT, HOLDFAST_FORM_PARALLEL}) {
        SCOPED_TRACE(form);
        Context context;
        PowerProblem p{2, form == HOLDFAST_FORM_RECURRENT ? 3 : 70, 2, 1, 32, 32};
        p.form = form;
        each(p.initial_state.shape, [&](const Index &i) { p.initial_state(i) = (float)p.random(0, 1); });
        each(p.initial_keys.shape, [&](const Index &i) { p.initial_keys(i) = (float)p.random(0, 1); });
        FarApart memory;
        Tensor q = memory.copy(p.q, rows), k = memory.copy(p.k, rows), v = memory.copy(p.v, rows);
        Tensor g = memory.copy(p.log_decay, decays), in = memory.copy(p.initial_state, states);
        Tensor keys_in = memory.copy(p.initial_keys, sums), out = memory.copy(p.out, rows);
        Tensor state = memory.copy(p.state, states), keys = memory.copy(p.keys, sums);
        SKIP_WITHOUT(memory);
        DLTensor dl_q = q.dl(), dl_k = k.dl(), dl_v = v.dl(), dl_g = g.dl(), dl_in = in.dl(), dl_keys_in = keys_in.dl();
        DLTensor dl_out = out.dl(), dl_state = state.dl(), dl_keys = keys.dl();
        holdfast_forward_args args = forward_args(&dl_q, &dl_k, &dl_v, &dl_g, &dl_in, &dl_out, &dl_state);
        args.initial_sum_of_keys = &dl_keys_in, args.final_sum_of_keys = &dl_keys;
        args.degree = p.degree, args.form = form, args.normalize = HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS;
        ASSERT_EQ(holdfast_forward(context, &args), HOLDFAST_OK) << context.error();
        ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
        memory.expect_same("out", out, p.out), memory.expect_same("final_state", state, p.state);
        memory.expect_same("final_sum_of_keys", keys, p.keys);
    }
}

// Of heads of queries that share keys a kernel reaches all: beyond its 32 bits they are refused, before anything is written.
TEST(LargeTensors, HeadsThatShareKeysGigabytesApart) {
    for (const auto &[degree, T] : {std::pair(1, 70), {1, 1}, {2, 70}, {2, 1}})
        for (const int64_t distance : {gigabyte, -gigabyte, 9 * gigabyte, -9 * gigabyte})
            for (bool of_out : {false, true}) {
                Context context;
                PowerProblem p{1, T, 1, 2, 32, 32, degree, degree > 1};
                p.initial = false;
                FarApart memory;
                Tensor q(p.q), out(p.out);
                (of_out ? out : q) = memory.copy(of_out ? p.out : p.q, {0, 32, distance, 1});
                SKIP_WITHOUT(memory);
                std::vector<holdfast_form> forms = {HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_RECURRENT, HOLDFAST_FORM_PARALLEL};
                if (T == 1) forms.push_back(HOLDFAST_FORM_AUTO);  // stands for a step
                for (holdfast_form form : forms) {
                    SCOPED_TRACE(testing::Message() << "degree " << degree << ", T " << T << ", distance " << distance
                                                    << ", of " << (of_out ? "out" : "q") << ", form " << form);
                    const bool step = form == HOLDFAST_FORM_AUTO;
                    p.form = step ? HOLDFAST_FORM_RECURRENT : form, p.initial = false;
                    each(p.out.shape, [&](const Index &i) { FarApart::at(out, i) = -7; });
                    Tensor k(p.k), v(p.v), g(p.log_decay), state(p.state), keys(p.keys);
                    p.state.fill(0), p.keys.fill(0);
                    auto views = [&](bool token) {
                        std::deque<DLTensor> list;
                        for (Tensor *x : {&q, &k, &v, &g, &out}) {
                            if (token) *x = x->without(1);
                            list.push_back(x->dl());
                        }
                        return list;
                    };
                    Tensor whole_q = q, whole_out = out;
                    std::deque<DLTensor> dl = views(step);
                    DLTensor dl_state = state.dl(), dl_keys = keys.dl();
                    holdfast_status status;
                    if (step) {
                        holdfast_step_args args = {};
                        args.struct_size = sizeof args, args.q = &dl[0], args.k = &dl[1], args.v = &dl[2],
                        args.log_decay = &dl[3];
                        args.out = &dl[4], args.state = &dl_state, args.degree = degree;
                        if (degree > 1) args.sum_of_keys = &dl_keys;
                        status = holdfast_step(context, &args);
                    } else {
                        holdfast_forward_args args = forward_args(&dl[0], &dl[1], &dl[2], &dl[3], nullptr, &dl[4], &dl_state);
                        args.degree = degree, args.form = form;
                        if (degree > 1) args.final_sum_of_keys = &dl_keys;
                        status = holdfast_forward(context, &args);
                    }
                    q = whole_q, out = whole_out;
                    if (std::abs(distance) > gigabyte) {
                        ASSERT_EQ(status, HOLDFAST_UNSUPPORTED);
                        const std::string name = of_out ? "out" : "q";
                        EXPECT_EQ(context.error().find(name + " has stride " + std::to_string(distance)), 0u)
                            << context.error();
                        EXPECT_NE(context.error().find("between heads that share keys"), std::string::npos) << context.error();
                        each(p.out.shape, [&](const Index &i) { ASSERT_EQ(FarApart::at(out, i), -7) << text(i); });
                        each(p.state.shape, [&](const Index &i) { ASSERT_EQ(p.state(i), 0) << text(i); });
                        continue;
                    }
                    ASSERT_EQ(status, HOLDFAST_OK) << context.error();
                    PowerProblem near = p;
                    near.state.fill(0), near.keys.fill(0), near.initial = false;
                    ASSERT_EQ(near.run(context), HOLDFAST_OK) << context.error();
                    FarApart::expect_same("out", out, near.out);
                    EXPECT_TRUE(same_bits(p.state, near.state));
                }
            }
}

TEST(LargeTensors, GradientsOfHeadsGigabytesApart) {
    const Index rows = {3 * gigabyte, 32, -5 * gigabyte, 1}, states = {-5 * gigabyte, 3 * gigabyte, 32, 1};
    const Index decays = {3 * gigabyte, -1, 5 * gigabyte}, sums = {-5 * gigabyte, 3 * gigabyte, 1};
    for (const auto &[degree, with_states] : {std::make_pair(1, true), {2, true}, {2, false}}) {
        SCOPED_TRACE(testing::Message() << "degree " << degree << ", states " << with_states);
        Context context;
        const bool normalize = degree > 1;
        Backward p{2, 70, 2, 1, 32, 32, degree, normalize, Gates::weak, f32, Layout::compact, with_states, with_states};
        p.form = with_states ? HOLDFAST_FORM_CHUNKWISE : HOLDFAST_FORM_PARALLEL;
        ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
        FarApart memory;
        std::deque<Tensor> tensors;
        std::deque<DLTensor> views;
        auto far = [&](const Array &a, const Index &stride) {
            tensors.push_back(memory.copy(a, stride)), views.push_back(tensors.back().dl());
            return &views.back();
        };
        holdfast_backward_args args = {};
        args.struct_size = sizeof args;
        args.q = far(p.q, rows), args.k = far(p.k, rows), args.v = far(p.v, rows), args.dout = far(p.dout, rows);
        args.log_decay = far(p.log_decay, decays);
        if (normalize) args.out = far(p.out, rows), args.normalize = HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS;
        if (with_states) args.initial_state = far(p.initial_state, states), args.dfinal_state = far(p.dfinal_state, states);
        if (with_states && normalize)
            args.initial_sum_of_keys = far(p.initial_keys, sums), args.dfinal_sum_of_keys = far(p.dfinal_keys, sums);
        args.degree = degree, args.form = p.form;
        const size_t inputs = tensors.size();
        std::vector<Array *> gradients = p.gradients();
        DLTensor **wanted[] = {
            &args.dq, &args.dk, &args.dv, &args.dlog_decay, &args.dinitial_state, &args.dinitial_sum_of_keys};
        gradients.resize(with_states ? normalize ? 6 : 5 : 4);
        for (size_t n = 0; n < gradients.size(); n++)
            *wanted[n] = far(Array(*gradients[n]).forget(), n < 3 ? rows : n == 3 ? decays : n == 4 ? states : sums);
        SKIP_WITHOUT(memory);
        ASSERT_EQ(holdfast_backward(context, &args), HOLDFAST_OK) << context.error();
        for (size_t n = 0; n < gradients.size(); n++)
            memory.expect_same(p.wanted.substr(n, 1).c_str(), tensors[inputs + n], *gradients[n]);
    }
}

}  // namespace
