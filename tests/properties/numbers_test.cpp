// The numbers that the project holds, at length; and tensors beyond 2^31 bytes.
#include "../forward.h"

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
};

TEST_P(Numbers, RelativeErrorOf4096Tokens) {
    Context context(GetParam().target);
    const Dtype dtype = GetParam().dtype;
    const double of_out = tolerance::relative_rms_of_out(dtype);
    Problem whole = retnet(dtype), tokens = retnet(dtype);
    run(whole.forward(), context);
    const reference::Result want = reference::retention(whole.inputs());
    EXPECT_LE(relative_rms(whole.out.values(), want.out), of_out);
    EXPECT_LE(relative_rms(whole.final_state.values(), want.state), tolerance::relative_rms);
    if (backend_of(GetParam().target) != "cpu") return;  // 4096 calls that copy: minutes where a GPU is emulated
    run_token_by_token(tokens.forward(), context);
    EXPECT_LE(relative_rms(tokens.out.values(), want.out), of_out) << "token by token";
    EXPECT_LE(relative_rms(tokens.final_state.values(), want.state), tolerance::relative_rms) << "token by token";
}

TEST_P(Numbers, DecaysThatFp32CannotHoldDoNotDrift) {
    // RetNet's decays, 1 - 2^-n, are numbers of fp32. These are not: rounded, each would be off the same way at every token.
    for (bool token_by_token : {false, true}) {
        SCOPED_TRACE(token_by_token ? "token by token" : "one call");
        if (token_by_token && backend_of(GetParam().target) != "cpu") continue;  // as above
        Context context(GetParam().target);
        Problem p = retnet();
        each({p.H}, [&](const Index &h) { p.log_decay({0, 0, h[0]}) = -1e-4f * (float)(1 + std::sqrt(h[0])); });
        if (token_by_token)
            run_token_by_token(p.forward(), context);
        else
            run(p.forward(), context);
        const std::vector<double> want = reference::retention(p.inputs()).state;
        const std::vector<float> got = p.final_state.values();
        for (int64_t h = 0; h < p.H; h++) {
            const int64_t size = p.K * p.V;
            const std::vector<double> want_of_head(want.begin() + h * size, want.begin() + (h + 1) * size);
            const std::vector<float> got_of_head(got.begin() + h * size, got.begin() + (h + 1) * size);
            EXPECT_LE(relative_rms(got_of_head, want_of_head), tolerance::relative_rms) << "head " << h;
        }
    }
}

TEST_P(Numbers, ManyOnesAreCountedExactly) {
    // Of each token q.k = 64 and v = 1: out is the number of tokens, the state too, and no sum is rounded.
    const int64_t T = 65536;
    const Dtype dtype = GetParam().dtype;
    for (holdfast_form form : {HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_RECURRENT}) {
        if (backend_of(GetParam().target) != "cpu") continue;  // minutes where a GPU is emulated
        Context context(GetParam().target);
        Array ones({1, T, 1, 64}), out({1, T, 1, 64}), state({1, 1, 64, 64});
        ones.fill(1.0f);
        Forward f{ones, ones, ones, {}, {}, out, state};
        f.scale = 0x1p-22f, f.dtype = dtype, f.form = form;
        run(f, context);
        int64_t wrong = 0;
        each(out.shape, [&](const Index &i) { wrong += out(i) != dtype.round((i[1] + 1) * 0x1p-16); });
        EXPECT_EQ(wrong, 0);
        each(state.shape, [&](const Index &i) { wrong += state(i) != T; });
        EXPECT_EQ(wrong, 0) << "in the state";
    }
}

INSTANTIATE_TEST_SUITE_P(, Numbers, testing::ValuesIn(instances({{64, 64}}, {{64, 64}})),
                         [](const auto &info) { return name(info.param); });

TEST(Forms, AgreeOver4096Tokens) {
    Context context;
    Problem whole = retnet(), tokens = retnet();
    run(whole.forward(), context);
    run_token_by_token(tokens.forward(), context);
    EXPECT_LE(relative_rms(tokens.out.values(), whole.out.values()), tolerance::relative_rms_between_forms);
}

// One call of a million tokens of one head: no drift, and workspace as for a thousand.
TEST(LongSequence, AMillionTokens) {
    auto workspace_of = [](int64_t T) {
        size_t bytes = 0;
        auto allocate = [](void *sum, size_t bytes, size_t alignment) {
            *(size_t *)sum += bytes;
            return std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
        };
        Context context("", 1);
        EXPECT_EQ(holdfast_context_set_allocator(
                      context, allocate, [](void *, void *memory, size_t) { std::free(memory); }, &bytes),
                  HOLDFAST_OK);
        for (Gates gates : {Gates::weak, Gates::per_head}) {
            Problem p{1, T, 1, 8, 8, gates};
            if (gates == Gates::per_head) p.log_decay.fill((float)std::log1p(-0x1p-12));  // RetNet's slowest of 8
            run(p.forward(), context);
            const reference::Result want = reference::retention(p.inputs());
            EXPECT_LE(relative_rms(p.out.values(), want.out), tolerance::relative_rms) << name(gates);
            EXPECT_LE(relative_rms(p.final_state.values(), want.state), tolerance::relative_rms) << name(gates);
        }
        context.destroy();
        return bytes;
    };
    EXPECT_EQ(workspace_of(1 << 20), workspace_of(1 << 10));
}

// Every tensor of a problem moved to where `stride` spreads it over gigabytes, and called there: the same bits must come out.
void expect_same_far_apart(Problem p, const std::vector<Index> &strides) {
    Context context;
    ASSERT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();

    Problem q = p;
    Forward f = q.forward();
    Tensor *tensors[] = {&f.q, &f.k, &f.v, &f.log_decay, &f.initial_state, &f.out, &f.final_state};
    const Array *arrays[] = {&p.q, &p.k, &p.v, &p.log_decay, &p.initial_state, &p.out, &p.final_state};
    std::vector<std::unique_ptr<Reserved>> memory;
    for (int n = 0; n < 7; n++) {
        Tensor &x = *tensors[n];
        x.stride = strides[n];
        int64_t low = 0, high = 0;
        for (size_t axis = 0; axis < x.shape.size(); axis++) {
            const int64_t reach = (x.shape[axis] - 1) * x.stride[axis];
            (reach < 0 ? low : high) += reach;
        }
        memory.push_back(std::make_unique<Reserved>((high - low + 1) * sizeof(float)));
        if (!*memory.back()) GTEST_SKIP() << "no address space of " << (high - low + 1) * sizeof(float) << " bytes";
        x.data = memory.back()->floats() - low;
        each(x.shape, [&](const Index &i) {
            int64_t offset = 0;
            for (size_t axis = 0; axis < i.size(); axis++) offset += i[axis] * x.stride[axis];
            x.data[offset] = (*arrays[n])(i);
        });
    }
    ASSERT_EQ(f.run(context), HOLDFAST_OK) << context.error();
    for (int n : {5, 6})
        each(arrays[n]->shape, [&](const Index &i) {
            int64_t offset = 0;
            for (size_t axis = 0; axis < i.size(); axis++) offset += i[axis] * tensors[n]->stride[axis];
            ASSERT_EQ(tensors[n]->data[offset], (*arrays[n])(i)) << (n == 5 ? "out" : "final_state") << text(i);
        });
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

}  // namespace
