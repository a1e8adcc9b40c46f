// Backends by their names; and tensors in memory of OpenCL and Metal, used where they lie, on whatever devices this machine has.
#include "../../runtime/src/arena.h"
#include "../backward.h"
#include "../devices.h"
#include "../power.h"
#include "../tokens.h"

#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <regex>
#include <set>
#include <sstream>
#include <thread>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace {
using namespace test;

TEST(Backends, AreListed) {
    std::set<std::string> names, targets;
    for (int n = 0; n < holdfast_backend_count(); n++) {
        holdfast_backend b = {};
        b.struct_size = sizeof b;
        ASSERT_EQ(holdfast_backend_at(n, &b), HOLDFAST_OK);
        names.insert(b.name);
        EXPECT_EQ(b.available != 0, std::string(b.missing).empty()) << b.name;
        EXPECT_EQ(b.compiled != 0, !std::string(b.targets).empty()) << b.name;
        EXPECT_LE(b.available, b.compiled) << b.name;
        if (b.available) {
            EXPECT_GE(b.device_count, 1) << b.name;
        }
    }
    EXPECT_EQ(names, (std::set<std::string>{"cpu", "cuda", "metal", "opencl", "vulkan"}));
    EXPECT_EQ(backend("cpu").available, 1);
}

TEST(MissingBackend, IsSaidAndTheRestWorks) {
    const char *name = std::getenv("HOLDFAST_MISSING"), *expected = std::getenv("HOLDFAST_EXPECTED");
    if (!name || !expected) GTEST_SKIP() << "run by CTest, once for each way";
    const holdfast_backend b = backend(name);
    EXPECT_EQ(b.compiled, 1);
    EXPECT_EQ(b.available, 0);
    EXPECT_EQ(b.device_count, 0);
    // Where there is no loader either, it is that which is missing.
    if (std::string(b.missing).find("cannot be loaded") == std::string::npos) {
        EXPECT_STREQ(b.missing, expected);
    }
    Context context;
    for (auto *set : {holdfast_context_set_backend, holdfast_context_set_target}) {
        EXPECT_EQ(set(context, name), HOLDFAST_TARGET_UNAVAILABLE);
        EXPECT_NE(context.error().find(b.missing), std::string::npos) << context.error();
    }
    Problem p{1, 7, 2, 5, 3};
    EXPECT_EQ(p.forward().run(context), HOLDFAST_OK) << "tensors on the CPU are computed all the same: " << context.error();
    p.expect_reference(32, 7);
}

// stubs/vulkan.cpp stands before the Vulkan loader and keeps a record.
TEST(VulkanGrids, AreNoLargerThanDriversPromise) {
    void *library = dlopen("libvulkan.so.1", RTLD_NOW);
    auto *largest = library ? (unsigned (*)())dlsym(library, "stub_largest_grid") : nullptr;
    if (!largest) GTEST_SKIP() << "run by CTest, with the stub";
    if (!runs("vulkan")) GTEST_SKIP() << backend("vulkan").missing;
    auto expect_fits = [&](const char *what) {
        EXPECT_EQ(largest(), (1u << 16) - 1)
            << what << " has a grid that is not cut, or none that has to be";  // since the last time
    };
    const int64_t T = 300;  // chunks, which have 256 pieces of a state each, for a block each
    for (const bool packed : {false, true}) {
        SCOPED_TRACE(testing::Message() << "packed " << packed);
        Context context;
        ASSERT_EQ(holdfast_context_set_backend(context, "vulkan"), HOLDFAST_OK) << context.error();
        const Index starts = packed ? Index{0, 0, T} : Index{};
        Problem p{1, T, 1, 256, 256, Gates::weak, Layout::compact, true, f32, 1, starts};
        Forward f = p.forward();
        f.chunk_size = 1;
        largest();
        EXPECT_EQ(f.run(context), HOLDFAST_OK) << context.error();
        expect_fits("forward");
        Backward gradient{1, T, 1, 1, 256, 256, 1, false, Gates::weak, f32, Layout::compact, true, true, starts};
        gradient.chunk_size = 1;
        EXPECT_EQ(gradient.run(context), HOLDFAST_OK) << context.error();
        expect_fits("backward");
    }
    // States of 74,459 x 1 pieces: those of power retention, and their copies.
    Context context;
    ASSERT_EQ(holdfast_context_set_backend(context, "vulkan"), HOLDFAST_OK) << context.error();
    for (const int64_t tokens : {1, 0}) {
        PowerProblem p{1, tokens, 1, 1, 60, 1, 4, false};
        p.form = HOLDFAST_FORM_CHUNKWISE;
        EXPECT_EQ(p.run(context), HOLDFAST_OK) << context.error();
        expect_fits(tokens ? "power" : "convert_state");
    }
    Backward gradient{1, 1, 1, 1, 60, 1, 4, false};
    EXPECT_EQ(gradient.run(context), HOLDFAST_OK) << context.error();
    expect_fits("power_backward");
}

TEST(Backends, BadQuestions) {
    holdfast_backend b = {};
    b.struct_size = sizeof b;
    for (int index : {-1, holdfast_backend_count()}) {
        EXPECT_EQ(holdfast_backend_at(index, &b), HOLDFAST_INVALID_ARGUMENT);
        EXPECT_NE(std::string(holdfast_last_error(nullptr)).find("index is " + std::to_string(index)), std::string::npos);
    }
    EXPECT_EQ(holdfast_backend_at(0, nullptr), HOLDFAST_INVALID_ARGUMENT);
    b.struct_size = sizeof b - 1;
    EXPECT_EQ(holdfast_backend_at(0, &b), HOLDFAST_INVALID_ARGUMENT);
    for (auto *set : {+[](holdfast_context *c) { return holdfast_context_set_backend(c, "cpu"); },
                      +[](holdfast_context *c) { return holdfast_context_set_device(c, nullptr); },
                      +[](holdfast_context *c) { return holdfast_context_set_stream(c, nullptr); }})
        EXPECT_EQ(set(nullptr), HOLDFAST_INVALID_ARGUMENT);
}

TEST(Backends, ForcingOneThatCannotRunIsAnError) {
    for (const char *name : {"cuda", "metal", "opencl", "vulkan"}) {
        SCOPED_TRACE(name);
        const holdfast_backend b = backend(name);
        Context context;
        const holdfast_status status = holdfast_context_set_backend(context, name);
        EXPECT_EQ(status, b.available ? HOLDFAST_OK : HOLDFAST_TARGET_UNAVAILABLE);
        Problem p{1, 40, 2, 8, 8};
        if (status == HOLDFAST_OK) {
            ASSERT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();
            EXPECT_NE(context.messages.at(0).find("backend forced by the context"), std::string::npos) << context.messages[0];
            EXPECT_NE(context.messages.at(0).find("tensors copied from the CPU and back"), std::string::npos)
                << context.messages[0];
            p.expect_reference(32, 2);
        } else {
            EXPECT_NE(context.error().find(std::string("backend is '") + name + "', which cannot run here: " + b.missing),
                      std::string::npos)
                << context.error();
            ASSERT_EQ(p.forward().run(context), HOLDFAST_OK) << "the option has changed";
        }
    }
    Context context;
    for (const char *name : {"", "CUDA", "gpu"}) {
        EXPECT_EQ(holdfast_context_set_backend(context, name), HOLDFAST_TARGET_UNAVAILABLE);
        EXPECT_EQ(context.error(), std::string("backend is '") + name + "'; expected one of cpu, cuda, metal, opencl, vulkan");
    }
}

/// Of tensors on the CPU.
class Copies : public testing::TestWithParam<const char *> {
protected:
    void SetUp() override {
        if (!runs(GetParam())) GTEST_SKIP() << backend(GetParam()).missing;
    }
};

INSTANTIATE_TEST_SUITE_P(, Copies, testing::Values("metal", "opencl", "vulkan"),
                         [](const auto &info) { return std::string(info.param); });

TEST_P(Copies, StepsCopyWhatIsOnTheCpu) {
    const std::string name = GetParam();
    for (const Dtype &dtype : all_dtypes)
        for (Gates gates : {Gates::none, Gates::per_head, Gates::weak})
            for (Layout layout : {Layout::compact, Layout::reversed}) {
                SCOPED_TRACE(name + ", " + dtype.name + ", gates " + test::name(gates) + ", " + test::name(layout));
                Context context;
                ASSERT_EQ(holdfast_context_set_backend(context, name.c_str()), HOLDFAST_OK);
                Problem p{2, 3, 3, 5, 7, gates, layout, true, dtype};
                run_steps(p, context);
                p.expect_reference(1, 3);
                EXPECT_NE(context.messages.at(0).find("step: recurrent_"), std::string::npos) << context.messages[0];
                EXPECT_NE(context.messages.at(0).find("token by token, tensors copied from the CPU and back"),
                          std::string::npos)
                    << context.messages[0];
                Problem none{2, 1, 0, 5, 7, gates, layout, true, dtype};
                EXPECT_EQ(step(none.forward(), 0).run(context), HOLDFAST_OK) << context.error();
            }
}

/// What a call of holdfast_head_norm_gate computes, of all-ones weights where it has none.
void expect_normed(const Array &x, const Array &gate, const Array &weight, const Array &out, bool layer_norm, bool gated,
                   const Dtype &dtype) {
    const reference::NormedRow want = normed(x, gate, weight, layer_norm, gated, 1e-6f);
    expect_close("out", out, want.out, want.spread, tolerance::of_norm(x.shape[3]), dtype);
    EXPECT_TRUE(out.gaps_intact()) << "memory between the elements was written";
}

TEST_P(Copies, GradientsOfRotationsAndNormsCopyWhatIsOnTheCpu) {
    const std::string name = GetParam();
    for (const Dtype &dtype : all_dtypes)
        for (Layout layout : {Layout::compact, Layout::reversed}) {
            SCOPED_TRACE(name + ", " + dtype.name + ", " + test::name(layout));
            Context context;
            ASSERT_EQ(holdfast_context_set_backend(context, name.c_str()), HOLDFAST_OK);
            const bool all = layout == Layout::compact;
            Random random;
            const Index shape = {3, 2, 2, 10};
            Array x = Array(shape, layout).fill(random), gate(shape, layout), dout = Array(shape, layout).fill(random);
            Array dx = Array(shape, layout).forget(), dgate = dx, theta = thetas(5, random);
            Array weight = Array({2, 10}, layout).fill(random, -2, 2), dweight = Array({2, 10}, layout).forget();
            fill_gates(gate, random);
            for (Array *a : {&x, &gate, &dout}) round_to(dtype, *a);
            const int64_t offset = -((int64_t)1 << 32) - 1;
            ASSERT_EQ((Rotation{dout, theta, dx, offset, all, dtype, nullptr, true}).run(context), HOLDFAST_OK)
                << context.error();
            expect_rotated(dout, theta, dx, all, [&](int64_t, int64_t t) { return offset + t; }, dtype, true);
            EXPECT_EQ(context.messages.back().find("rotate_backward: rotate_"), 0u) << context.messages.back();

            HeadNormGateBackward call{x, {}, {}, dout, dx.forget(), {}, {}, all ? HOLDFAST_NORM_RMS : HOLDFAST_NORM_LAYER};
            call.dtype = dtype;
            if (all) call.gate = gate, call.weight = weight, call.dgate = dgate, call.dweight = dweight;
            ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
            if (!all) weight.fill(1);
            expect_gradients(x, gate, weight, dout, &dx, all ? &dgate : nullptr, all ? &dweight : nullptr, !all, all, 1e-6f,
                             dtype);
            EXPECT_TRUE(dx.gaps_intact() && dgate.gaps_intact() && dweight.gaps_intact());
            EXPECT_EQ(context.messages.back().find(std::string("head_norm_gate_backward: head_norm_gate_backward_") +
                                                   dtype.name + "_" + name + " (backend forced"),
                      0u)
                << context.messages.back();
            // Of no tokens: zeros.
            Array none({2, 0, 2, 10}), shared = Array({10}).fill(1), dshared = Array({10}).forget();
            HeadNormGateBackward of_none{none, {}, shared, none, none, {}, dshared, HOLDFAST_NORM_RMS, 0, dtype};
            EXPECT_EQ(of_none.run(context), HOLDFAST_OK) << context.error();
            for (float value : dshared.values()) EXPECT_EQ(value, 0);
        }
}

TEST_P(Copies, RotationsAndNormsCopyWhatIsOnTheCpu) {
    const std::string name = GetParam();
    for (const Dtype &dtype : all_dtypes)
        for (Layout layout : {Layout::compact, Layout::reversed}) {
            SCOPED_TRACE(name + ", " + dtype.name + ", " + test::name(layout));
            Context context;
            ASSERT_EQ(holdfast_context_set_backend(context, name.c_str()), HOLDFAST_OK);
            const bool all = layout == Layout::compact;
            Random random;
            const Index shape = {2, 3, 2, 10};
            Array x = Array(shape, layout).fill(random), gate(shape, layout), out = Array(shape, layout).forget();
            Array theta = thetas(5, random), weight = Array({2, 10}, layout).fill(random, -2, 2);
            fill_gates(gate, random);
            for (Array *a : {&x, &gate}) round_to(dtype, *a);
            const int64_t offset = ((int64_t)1 << 32) - 1;
            ASSERT_EQ((Rotation{x, theta, out, offset, all, dtype}).run(context), HOLDFAST_OK) << context.error();
            expect_rotated(x, theta, out, all, [&](int64_t, int64_t t) { return offset + t; }, dtype);
            EXPECT_EQ(context.messages.at(0), std::string("rotate: rotate_") + dtype.name + "_" + name +
                                                  " (backend forced by the context), B 2, T 3, H 2, size 10, tensors "
                                                  "copied from the CPU and back");
            Tensor positions(x.data(), {2, 3}, {4, -1});
            std::vector<int32_t> where = {7, -1, 1'000'000, 0, 3, 2'000'000'000, -2'000'000'000};
            DLTensor dl = positions.dl();
            dl.data = where.data() + 2, dl.dtype = {kDLInt, 32, 1};
            ASSERT_EQ((Rotation{x, theta, out, 0, all, dtype, &dl}).run(context), HOLDFAST_OK) << context.error();
            expect_rotated(x, theta, out, all, [&](int64_t b, int64_t t) { return where[2 + 4 * b - t]; }, dtype);

            HeadNormGate call{x, {}, {}, out, all ? HOLDFAST_NORM_RMS : HOLDFAST_NORM_LAYER};
            call.dtype = dtype;
            if (all) call.gate = gate, call.weight = weight;
            ASSERT_EQ(call.run(context), HOLDFAST_OK) << context.error();
            if (!all) weight.fill(1);
            expect_normed(x, gate, weight, out, !all, all, dtype);
            EXPECT_EQ(context.messages.back().find(std::string("head_norm_gate: head_norm_gate_") + dtype.name + "_" + name +
                                                   " (backend forced"),
                      0u)
                << context.messages.back();
            Array none({2, 0, 2, 10});
            EXPECT_EQ((Rotation{none, theta, {}, 0, all, dtype}).run(context), HOLDFAST_OK) << context.error();
            EXPECT_EQ((HeadNormGate{none, {}, {}, {}, HOLDFAST_NORM_RMS, 0, dtype}).run(context), HOLDFAST_OK);
        }
}

TEST(Backends, MoreTokensThanOneLaunchTakes) {
    if (!runs("opencl")) GTEST_SKIP() << backend("opencl").missing;
    Context context;
    ASSERT_EQ(holdfast_context_set_backend(context, "opencl"), HOLDFAST_OK);
    Random random;
    const int64_t T = ((int64_t)1 << 15) + 3, offset = ((int64_t)1 << 32) - T;
    Array x = Array({1, T, 1, 2}).fill(random), out = Array(x.shape).forget(), theta = Array({1}).fill(1.0f);
    ASSERT_EQ((Rotation{x, theta, out, offset}).run(context), HOLDFAST_OK) << context.error();
    expect_rotated(x, theta, out, false, [&](int64_t, int64_t t) { return offset + t; }, f32);
    Array weight = Array({1, 2}).fill(random, -2, 2);
    ASSERT_EQ((HeadNormGate{x, {}, weight, out}).run(context), HOLDFAST_OK) << context.error();
    expect_normed(x, x, weight, out, false, false, f32);
    // What a weight's gradient sums up of the first launch goes on in the second. Entries as tokens: the same.
    for (const Index &shape : {Index{1, T, 1, 2}, {T, 1, 1, 2}}) {
        Array rows = Array(shape).fill(random), dout = Array(shape).fill(random), dx = Array(shape).forget();
        Array shared = Array({2}).fill(1), dweight = Array({2}).forget();
        ASSERT_EQ((HeadNormGateBackward{rows, {}, shared, dout, dx, {}, dweight}).run(context), HOLDFAST_OK) << context.error();
        expect_gradients(rows, rows, Array({1, 2}).fill(1), dout, &dx, nullptr, &dweight, false, false, 1e-6f, f32);
    }
}

TEST(Backends, VulkanLaunchesMoreBlocksThanAreInAGrid) {
    if (!runs("vulkan")) GTEST_SKIP() << backend("vulkan").missing;
    Context context;
    ASSERT_EQ(holdfast_context_set_backend(context, "vulkan"), HOLDFAST_OK) << context.error();
    Random random;
    constexpr int64_t many = (1 << 16) + 5;
    Array x = Array({1, 1, many, 2}).fill(random), out = Array(x.shape).forget();  // a block per head
    Array weight = Array({many, 2}).fill(random, -2, 2);
    ASSERT_EQ((HeadNormGate{x, {}, weight, out}).run(context), HOLDFAST_OK) << context.error();
    expect_normed(x, x, weight, out, false, false, f32);
    Problem p{1, 0, 1, 8 * many, 1};  // a block for 8 features; no tokens: the state is copied
    ASSERT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();
    EXPECT_TRUE(same_bits(p.final_state, p.initial_state));
}

TEST_P(Copies, PowerRetentionCopiesWhatIsOnTheCpu) {
    const std::string name = GetParam();
    const struct {
        int degree;
        bool normalize, value_major;
        Dtype dtype;
        Layout layout;
    } cases[] = {{2, true, false, f32, Layout::compact},
                 {3, false, true, f32, Layout::reversed},
                 {1, true, false, f32, Layout::padded},
                 {2, true, true, f16, Layout::compact},
                 {2, false, false, bf16, Layout::swapped}};
    for (const auto &c : cases) {
        SCOPED_TRACE(name + ", degree " + std::to_string(c.degree) + ", " + c.dtype.name);
        Context context;
        ASSERT_EQ(holdfast_context_set_backend(context, name.c_str()), HOLDFAST_OK);
        PowerProblem p{2,
                       70,
                       2,
                       2,
                       5,
                       7,
                       c.degree,
                       c.normalize,
                       Gates::weak,
                       c.dtype,
                       HOLDFAST_FORM_AUTO,
                       HOLDFAST_EXPANSION_TIGHT,
                       c.value_major,
                       false,
                       false,
                       0,
                       0,
                       c.layout};
        for (const auto &[from, to] : {std::pair{0, 66}, {66, 66}, {66, 68}})
            ASSERT_EQ(p.run(context, from, to), HOLDFAST_OK) << context.error();
        EXPECT_NE(context.messages.at(0).find(std::string("forward: power_") + c.dtype.name + "_c64_k0_v0_" + name),
                  std::string::npos)
            << context.messages[0];
        EXPECT_NE(context.messages.at(0).find("chunks of 64, tensors copied from the CPU and back"), std::string::npos)
            << context.messages[0];
        if (c.dtype == f32) {
            for (int64_t t : {68, 69}) ASSERT_EQ(p.step(context, t), HOLDFAST_OK) << context.error();
            EXPECT_NE(context.messages.back().find(std::string("step: power_step_f32_k0_v0_") + name), std::string::npos)
                << context.messages.back();
        } else {
            ASSERT_EQ(p.run(context, 68, 70), HOLDFAST_OK) << context.error();
        }
        expect_right(p, p.want());
    }
    // Packed sequences, one of them empty, from states of their own.
    Context context, cpu;
    ASSERT_EQ(holdfast_context_set_backend(context, name.c_str()), HOLDFAST_OK);
    PowerProblem p{1, 70, 2, 1, 8, 16};
    p.starts = {0, 3, 3, 70};
    p.state = Array(p.states_shape()).fill(0), p.keys = Array(Index{3, 2, p.D}).fill(0);
    p.initial_state = Array(p.state.shape).fill(p.random), p.initial_keys = Array(p.keys.shape).fill(p.random, 5, 9);
    PowerProblem want = p;
    ASSERT_EQ(want.run(cpu), HOLDFAST_OK) << cpu.error();
    ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
    for (auto [got, expected] : {std::pair{&p.out, &want.out}, {&p.state, &want.state}, {&p.keys, &want.keys}})
        EXPECT_LE(relative_rms(got->values(), expected->values()), 1e-6);
    for (int64_t f = 0; f < p.D; f++) EXPECT_EQ(p.keys({1, 1, f}), want.keys({1, 1, f}));

    PowerProblem narrow{1, 9, 1, 1, 1, 1};  // chunks and tokens begin at all multiples of 4 bytes
    narrow.initial = false, narrow.chunk_size = 3;
    ASSERT_EQ(narrow.run(context, 0, 7), HOLDFAST_OK) << context.error();
    narrow.form = HOLDFAST_FORM_RECURRENT;
    ASSERT_EQ(narrow.run(context, 7, 9), HOLDFAST_OK) << context.error();
    expect_right(narrow, narrow.want());
}

TEST_P(Copies, PowerStatesInEveryOrder) {
    const std::string name = GetParam();
    constexpr auto chunkwise = HOLDFAST_FORM_CHUNKWISE, recurrent = HOLDFAST_FORM_RECURRENT;
    const struct {
        holdfast_form form;
        bool tiled, value_major;
    } cases[] = {{chunkwise, true, true}, {recurrent, true, false}, {chunkwise, false, true}, {recurrent, false, true}};
    for (const auto &c : cases) {
        SCOPED_TRACE(testing::Message() << name << ", form " << c.form << ", tiled " << c.tiled);
        Context gpu, cpu;
        ASSERT_EQ(holdfast_context_set_backend(gpu, name.c_str()), HOLDFAST_OK);
        const holdfast_expansion expansion = c.tiled ? HOLDFAST_EXPANSION_TILED : HOLDFAST_EXPANSION_TIGHT;
        PowerProblem p{1, 4, 1, 2, c.tiled ? 32 : 5, 3, 2, true, Gates::weak, f32, c.form, expansion, c.value_major, false};
        PowerProblem want = p;
        for (auto [problem, context] : {std::pair{&p, &gpu}, {&want, &cpu}}) {
            for (const auto &[from, to] : {std::pair{0, 2}, {2, 2}, {2, 3}})
                ASSERT_EQ(problem->run(*context, from, to), HOLDFAST_OK) << context->error();
            ASSERT_EQ(problem->step(*context, 3), HOLDFAST_OK) << context->error();
        }
        expect_right(p, p.want());
        for (auto [got, expected] : {std::pair{&p.state, &want.state}, {&p.keys, &want.keys}})
            EXPECT_LE(relative_rms(got->values(), expected->values()), 1e-6);
    }
}

TEST_P(Copies, TokenByTokenWhereItIsAskedFor) {
    const std::string name = GetParam();
    for (bool packed : {false, true})
        for (bool value_major : {false, true}) {
            SCOPED_TRACE(name + (packed ? ", packed" : "") + (value_major ? ", value-major" : ""));
            Context context;
            ASSERT_EQ(holdfast_context_set_backend(context, name.c_str()), HOLDFAST_OK);
            const int64_t T = packed ? 7 : 66;  // of heads of queries that share none 64 go in one call of the kernel
            Problem p{packed ? 1 : 2,
                      T,
                      4,
                      5,
                      3,
                      value_major ? Gates::per_head : Gates::weak,
                      Layout::padded,
                      packed || value_major,  // an initial state
                      packed ? bf16 : f32,
                      packed == value_major ? 1 : 2,  // heads of queries that share a state
                      packed ? Index{0, 3, 3, 7} : Index{},
                      value_major};
            Forward f = p.forward();
            f.form = HOLDFAST_FORM_RECURRENT;
            ASSERT_EQ(f.run(context), HOLDFAST_OK) << context.error();
            p.expect_reference(1, T);
            EXPECT_EQ(context.messages.back().find("forward: recurrent_"), 0u) << context.messages.back();
            EXPECT_NE(context.messages.back().find("token by token, tensors copied"), std::string::npos);
            f.final_state = {};  // not wanted
            p.out.forget();
            ASSERT_EQ(f.run(context), HOLDFAST_OK) << context.error();
            p.expect_reference(1, T);
        }
}

TEST_P(Copies, MorePackedSequencesThanAreInOneCallOfTheTable) {
    Index starts = {0};  // of 0, 1 and 2 tokens; then of several chunks, and none
    for (int64_t s = 0; s < 140; s++) starts.push_back(starts.back() + s % 3);
    for (const int64_t tokens : {9, 0}) starts.push_back(starts.back() + tokens);
    for (const bool given : {true, false}) {  // an initial state, log_decay
        SCOPED_TRACE(testing::Message() << "given " << given);
        const Gates gates = given ? Gates::weak : Gates::none;
        Context context;
        ASSERT_EQ(holdfast_context_set_backend(context, GetParam()), HOLDFAST_OK);
        Problem p{1, starts.back(), 1, 2, 3, gates, Layout::compact, given, f32, 1, starts};
        Forward f = p.forward();
        f.chunk_size = 4, f.form = HOLDFAST_FORM_CHUNKWISE;
        ASSERT_EQ(f.run(context), HOLDFAST_OK) << context.error();
        p.expect_reference(4, 3);
        Backward gradient{1, starts.back(), 1, 1, 2, 3, 1, false, gates, f32, Layout::compact, given, given, starts};
        gradient.chunk_size = 4;
        ASSERT_EQ(gradient.run(context), HOLDFAST_OK) << context.error();
        gradient.expect_reference(4);
    }
}

TEST_P(Copies, TypesOf16Bits) {
    const std::string name = GetParam();
    for (const Dtype &dtype : {f16, bf16})
        for (Layout layout : layouts)
            for (int64_t T : {0, 70}) {
                SCOPED_TRACE(name + ", " + dtype.name + ", " + test::name(layout) + ", T " + std::to_string(T));
                Context context;
                ASSERT_EQ(holdfast_context_set_backend(context, name.c_str()), HOLDFAST_OK);
                Problem p{2, T, 3, 5, 7, Gates::weak, layout, true, dtype};
                ASSERT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();
                p.expect_reference(32, 4);
            }
}

TEST_P(Copies, WithoutQueriesTheSumOfKeysMayBeAllThatIsWanted) {
    for (holdfast_form form : {HOLDFAST_FORM_AUTO, HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_PARALLEL}) {
        SCOPED_TRACE(testing::Message() << "form " << form);
        Context context;
        ASSERT_EQ(holdfast_context_set_backend(context, GetParam()), HOLDFAST_OK);
        PowerProblem p{1, 40, 2, 0, 5, 7, 1, true};
        Tensor queries(p.q), keys(p.k), values(p.v), rows(p.out), sums(p.keys.forget());
        DLTensor q = queries.dl(), k = keys.dl(), v = values.dl(), out = rows.dl(), sum = sums.dl();
        holdfast_forward_args args = forward_args(&q, &k, &v, nullptr, nullptr, &out, nullptr);
        args.form = form, args.normalize = HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS, args.final_sum_of_keys = &sum;
        ASSERT_EQ(holdfast_forward(context, &args), HOLDFAST_OK) << context.error();
        each(p.keys.shape, [&](const Index &i) {
            double want = 0;
            for (int64_t t = 0; t < p.T; t++) want += p.k({0, t, i[1], i[2]});
            EXPECT_NEAR(p.keys(i), want, 1e-4) << text(i);
        });
    }
}

TEST_P(Copies, WithoutQueriesThereAreStates) {
    for (int degree : {1, 2})
        for (holdfast_form form : {HOLDFAST_FORM_AUTO, HOLDFAST_FORM_PARALLEL, HOLDFAST_FORM_RECURRENT})
            for (bool packed : {false, true}) {
                SCOPED_TRACE(testing::Message() << "degree " << degree << ", form " << form << ", packed " << packed);
                Context context;
                ASSERT_EQ(holdfast_context_set_backend(context, GetParam()), HOLDFAST_OK);
                PowerProblem p{packed ? 1 : 2, 40, 2, 0, 5, 7, degree, degree > 1};
                p.form = form;
                if (packed) {
                    PowerProblem cpu = p;
                    Context host;
                    for (PowerProblem *x : {&p, &cpu}) {
                        x->starts = {0, 38, 38, 40}, x->initial = false;
                        x->state = Array(x->states_shape()).fill(0), x->keys = Array(Index{3, 2, x->D}).fill(0);
                    }
                    cpu.form = HOLDFAST_FORM_CHUNKWISE;
                    ASSERT_EQ(cpu.run(host), HOLDFAST_OK) << host.error();
                    ASSERT_EQ(p.run(context), HOLDFAST_OK) << context.error();
                    EXPECT_LE(relative_rms(p.state.values(), cpu.state.values()), 1e-6);
                    if (p.normalize) {
                        EXPECT_LE(relative_rms(p.keys.values(), cpu.keys.values()), 1e-6);
                    }
                    continue;
                }
                ASSERT_EQ(p.run(context, 0, 38), HOLDFAST_OK) << context.error();
                for (int64_t t : {38, 39}) ASSERT_EQ(p.step(context, t), HOLDFAST_OK) << context.error();
                expect_right(p, p.want());
            }
}

/// Bytes that the process has from its allocator, where that says so; OpenCL's and the stand-in's device memory among them.
size_t allocated() {
#if defined(__GLIBC_PREREQ) && !defined(__SANITIZE_ADDRESS__)
#if __GLIBC_PREREQ(2, 33)
    const auto now = mallinfo2();
    return now.uordblks + now.hblkhd;
#endif
#endif
    return 0;
}

TEST_P(Copies, KeepNoMoreMemoryThanTheLastCallNeeded) {
    if (GetParam() == std::string("vulkan")) GTEST_SKIP() << "there memory is not kept";
    if (!allocated()) GTEST_SKIP() << "the allocator does not say how much is in use";
    auto kept_after = [&](const std::vector<int64_t> &lengths) {
        Context context;
        EXPECT_EQ(holdfast_context_set_backend(context, GetParam()), HOLDFAST_OK);
        const size_t before = allocated();
        for (int64_t T : lengths) {
            Problem p{1, T, 4, 8, 64, Gates::none};
            EXPECT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();
        }
        return allocated() - before;
    };
    std::vector<int64_t> lengths;
    for (int64_t T = 128; T <= 2048; T += 128) lengths.push_back(T);
    kept_after({128});  // kernels are compiled
    const size_t once = kept_after({2048}), often = kept_after(lengths);
    EXPECT_GT(once, (size_t)2048 * 4 * (64 + 64) * sizeof(float)) << "v and out, at least";
    EXPECT_LT((double)often, 1.5 * (double)once);
}

TEST(Backends, StreamsOfOtherKindsAreRefused) {
    if (!runs("opencl")) GTEST_SKIP() << backend("opencl").missing;
    void *object[64];  // of another API, as far as OpenCL can see
    std::fill(std::begin(object), std::end(object), (void *)object);
    void *nothing[64] = {};
    for (void *stream : {(void *)0x1234000, (void *)object, (void *)nothing}) {
        Context context;
        ASSERT_EQ(holdfast_context_set_backend(context, "opencl"), HOLDFAST_OK);
        ASSERT_EQ(holdfast_context_set_stream(context, stream), HOLDFAST_OK);
        Problem p{1, 8, 2, 8, 8};
        EXPECT_EQ(p.forward().run(context), HOLDFAST_INVALID_ARGUMENT);
        EXPECT_NE(context.error().find("the stream of holdfast_context_set_stream is no cl_command_queue"), std::string::npos)
            << context.error();
        ASSERT_EQ(holdfast_context_set_stream(context, nullptr), HOLDFAST_OK);
        EXPECT_EQ(p.forward().run(context), HOLDFAST_OK) << context.error();
    }
}

TEST(Backends, VulkanBuffersOfOthersAreRefused) {
    if (!runs("vulkan")) GTEST_SKIP() << backend("vulkan").missing;
    Problem p{1, 8, 2, 8, 8};
    Forward f = p.forward();
    DLTensor q = f.q.dl(), k = f.k.dl(), v = f.v.dl(), out = f.out.dl();
    for (DLTensor *x : {&q, &k, &v, &out}) x->device = {kDLVulkan, 0};
    uintptr_t handle = 0;
    for (DLTensor *x : {&q, &k, &v, &out}) x->data = (void *)(handle += 4096);
    holdfast_forward_args args = {};
    args.struct_size = sizeof args, args.q = &q, args.k = &k, args.v = &v, args.out = &out;
    Context context;
    EXPECT_EQ(holdfast_forward(context, &args), HOLDFAST_UNSUPPORTED);
    EXPECT_NE(context.error().find("q is on Vulkan device 0"), std::string::npos) << context.error();
}

TEST_P(Copies, TakeCallsOfManyThreads) {
    const std::string name = GetParam();
    SCOPED_TRACE(name);
    Problem expected{1, 70, 2, 8, 8};
    Context context;
    ASSERT_EQ(holdfast_context_set_backend(context, name.c_str()), HOLDFAST_OK);
    ASSERT_EQ(expected.forward().run(context), HOLDFAST_OK) << context.error();
    std::vector<Problem> problems(4, Problem{1, 70, 2, 8, 8});
    std::vector<int> failures(4);
    std::vector<std::thread> threads;
    for (int n = 0; n < 4; n++)
        threads.emplace_back([&, n] {
            holdfast_context *c = holdfast_context_create();
            holdfast_context_set_backend(c, name.c_str());
            for (int call = 0; call < 5; call++) failures[n] += problems[n].forward().run(c) != HOLDFAST_OK;
            holdfast_context_destroy(c);
        });
    for (std::thread &thread : threads) thread.join();
    for (int n = 0; n < 4; n++) {
        EXPECT_EQ(failures[n], 0);
        EXPECT_TRUE(same_bits(problems[n].out, expected.out) && same_bits(problems[n].final_state, expected.final_state));
    }
}

/// An allocator that waits, up to a quarter of a second, for a second thread to be in it as well.
struct Meeting {
    std::mutex mutex;
    std::condition_variable changed;
    int inside = 0, most = 0, calls = 0;

    static void *allocate(void *user, size_t bytes, size_t alignment) {
        auto &m = *(Meeting *)user;
        std::unique_lock<std::mutex> lock(m.mutex);
        m.calls++, m.most = std::max(m.most, ++m.inside);
        m.changed.notify_all();
        m.changed.wait_for(lock, std::chrono::milliseconds(250), [&] { return m.most > 1; });
        m.inside--;
        return std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    }
    static void deallocate(void *, void *memory, size_t) { std::free(memory); }
};

TEST_P(Copies, CallsGoOneAfterTheOther) {
    const std::string name = GetParam();
    SCOPED_TRACE(name);
    Meeting meeting;
    std::vector<Problem> problems(2, Problem{1, 8, 2, 8, 8, Gates::weak, Layout::padded});  // padded: packed in host memory
    int failures[2] = {};
    std::vector<std::thread> threads;
    for (int n = 0; n < 2; n++)
        threads.emplace_back([&, n] {
            holdfast_context *c = holdfast_context_create();
            failures[n] += holdfast_context_set_backend(c, name.c_str()) != HOLDFAST_OK;
            holdfast_context_set_allocator(c, Meeting::allocate, Meeting::deallocate, &meeting);
            failures[n] += problems[n].forward().run(c) != HOLDFAST_OK;
            holdfast_context_destroy(c);
        });
    for (std::thread &thread : threads) thread.join();
    for (int n = 0; n < 2; n++) {
        EXPECT_EQ(failures[n], 0);
        problems[n].expect_reference(32, 1);
    }
    EXPECT_GE(meeting.calls, 2) << "nothing was packed";
    EXPECT_EQ(meeting.most, 1) << "two threads were inside of one backend's calls at once";
}

TEST(Arena, PiecesInUseLieApartAndWithin) {
    constexpr uint64_t start = 4096, bytes = 64 * 256;
    holdfast::Arena arena(start, bytes);
    Random random;
    auto below = [&](size_t n) { return (size_t)random(0, (double)n); };
    std::map<uint64_t, uint64_t> used;  // from, to
    uint64_t highest = 0;
    for (int n = 0; n < 10000; n++) {
        if (!used.empty() && below(2)) {
            auto piece = std::next(used.begin(), (ptrdiff_t)below(used.size()));
            arena.free(piece->first);
            used.erase(piece);
            continue;
        }
        const uint64_t size = below(4000), memory = arena.allocate(size);
        const uint64_t rounded = std::max<uint64_t>((size + 255) / 256, 1) * 256;
        uint64_t end = start;  // of the piece before: is there a gap that it would have fitted in?
        bool gap = false;
        for (const auto &[from, to] : used) gap |= from - end >= rounded, end = to;
        gap |= start + bytes - end >= rounded;
        EXPECT_EQ(memory != 0, gap);
        if (!memory) continue;
        EXPECT_EQ(memory % 256, 0u);
        EXPECT_GE(memory, start);
        EXPECT_LE(memory + rounded, start + bytes);
        const auto after = used.lower_bound(memory);
        if (after != used.end()) {
            EXPECT_LE(memory + rounded, after->first);
        }
        if (after != used.begin()) {
            EXPECT_LE(std::prev(after)->second, memory);
        }
        used[memory] = memory + rounded;
        highest = std::max(highest, memory + rounded - start);
    }
    EXPECT_EQ(arena.most(), highest);
}

// ---- Tensors on devices ----------------------------------------------------------------------------------------------

class Tensors : public testing::TestWithParam<const char *> {
protected:
    std::unique_ptr<Device> device;
    Context context;

    void SetUp() override {
        if (!runs(GetParam())) GTEST_SKIP() << backend(GetParam()).missing;
#if HOLDFAST_TEST_METAL
        if (GetParam() == std::string("metal")) device = std::make_unique<MetalDevice>();
#endif
        if (GetParam() == std::string("opencl")) device = std::make_unique<OpenCLDevice>();
        ASSERT_EQ(holdfast_context_set_stream(context, device->stream), HOLDFAST_OK);
    }
    void expect_message(const std::string &text) {
        EXPECT_NE(context.messages.back().find(text), std::string::npos) << context.messages.back();
    }

    /// A call of holdfast_forward.
    struct ForwardOnDevice : OnDevice {
        holdfast_forward_args args = {};
        ForwardOnDevice(Device &device, Problem &p) : ForwardOnDevice(device, p.forward()) {}

    private:
        ForwardOnDevice(Device &device, const Forward &f)
            : OnDevice(device, {f.q, f.k, f.v, f.log_decay, f.initial_state, f.out, f.final_state}, f.dtype, {0, 1, 2, 5}) {
            auto &t = tensors;
            args = forward_args(&t[0], &t[1], &t[2], &t[3], &t[4], &t[5], &t[6]);
            args.state_layout = f.state_layout;
        }
    };
};

TEST_P(Tensors, AreUsedWhereTheyLie) {
    for (const Dtype &dtype : all_dtypes)
        for (int64_t T : {1, 32, 100}) {
            SCOPED_TRACE(std::string(dtype.name) + ", T " + std::to_string(T));
            Problem p{2, T, 3, 16, 24, Gates::weak, T == 100 ? Layout::padded : Layout::compact, true, dtype};
            ForwardOnDevice d(*device, p);
            for (int n = 0; n < 2; n++) {
                ASSERT_EQ(holdfast_forward(context, &d.args), HOLDFAST_OK) << context.error();
                d.fetch({5, 6});
                p.expect_reference(32, 4);
            }
            d.expect_released();
            expect_message(std::string("on ") + device->name);
        }
}

TEST_P(Tensors, ValueMajorStatesAreUsedWhereTheyLie) {
    for (holdfast_form form : {HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_RECURRENT})
        for (bool in_place : {false, true}) {
            SCOPED_TRACE(testing::Message() << "form " << form << ", in place " << in_place);
            Problem p{2, 35, 3, 16, 24, Gates::weak, Layout::padded, true, f32, 1, {}, true};
            ForwardOnDevice d(*device, p);
            d.args.form = form;
            if (in_place) d.tensors[6].byte_offset = d.offsets[6] = d.offsets[4];
            ASSERT_EQ(holdfast_forward(context, &d.args), HOLDFAST_OK) << context.error();
            d.fetch({5, 6});
            p.expect_reference(32, 35);
            d.expect_released();
        }
    Problem p{2, 1, 3, 16, 24, Gates::weak, Layout::compact, true, f32, 1, {}, true};
    p.final_state = p.initial_state;
    Step s = step(p.forward(), 0);
    OnDevice d(*device, {s.q, s.k, s.v, s.log_decay, s.state, s.out}, f32, {0, 1, 2, 5});
    auto &t = d.tensors;
    holdfast_step_args args = step_args(&t[0], &t[1], &t[2], &t[3], &t[4], &t[5]);
    args.state_layout = HOLDFAST_STATE_VALUE_MAJOR;
    ASSERT_EQ(holdfast_step(context, &args), HOLDFAST_OK) << context.error();
    d.fetch({4, 5});
    p.expect_reference(1, 1);
}

TEST_P(Tensors, WithoutQueriesThereAreStates) {
    for (holdfast_form form : {HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_PARALLEL, HOLDFAST_FORM_RECURRENT}) {
        SCOPED_TRACE(testing::Message() << "form " << form);
        Problem p{2, 35, 3, 16, 24}, want = p;
        Context cpu;
        ASSERT_EQ(want.forward().run(cpu), HOLDFAST_OK) << cpu.error();
        ForwardOnDevice d(*device, p);
        for (int n : {0, 5}) d.tensors[n].shape[2] = 0, d.tensors[n].data = nullptr;
        d.args.form = form;
        ASSERT_EQ(holdfast_forward(context, &d.args), HOLDFAST_OK) << context.error();
        d.fetch({6});
        EXPECT_LE(relative_rms(p.final_state.values(), want.final_state.values()), 1e-6);
        d.expect_released();
    }
}

TEST_P(Tensors, StateIsAdvancedInPlace) {
    Problem p{2, 70, 3, 16, 24};
    ForwardOnDevice d(*device, p);
    d.tensors[6].byte_offset = d.offsets[6] = d.offsets[4];
    ASSERT_EQ(holdfast_forward(context, &d.args), HOLDFAST_OK) << context.error();
    d.fetch({5, 6});
    p.expect_reference(32, 4);
}

TEST_P(Tensors, StepsAreTakenWhereTheStateLies) {
    for (const Dtype &dtype : all_dtypes)
        for (Gates gates : {Gates::none, Gates::per_head, Gates::weak}) {
            SCOPED_TRACE(std::string(dtype.name) + ", gates " + name(gates));
            Problem p{2, 1, 3, 16, 24, gates, Layout::compact, true, dtype};
            p.final_state = p.initial_state;
            Step s = step(p.forward(), 0);
            std::vector<Tensor> list = {s.q, s.k, s.v, s.state, s.out};
            if (s.log_decay.data) list.push_back(s.log_decay);
            OnDevice d(*device, list, dtype, {0, 1, 2, 4});
            auto &t = d.tensors;
            DLTensor *log_decay = s.log_decay.data ? &t[5] : nullptr;
            const holdfast_step_args args = step_args(&t[0], &t[1], &t[2], log_decay, &t[3], &t[4]);
            ASSERT_EQ(holdfast_step(context, &args), HOLDFAST_OK) << context.error();
            d.expect_released();
            d.fetch({3, 4});
            p.expect_reference(1, 1);
            expect_message(std::string("token by token, on ") + device->name);
            size_t bytes = 1;
            EXPECT_EQ(holdfast_step_workspace_size(context, &args, &bytes), HOLDFAST_OK) << context.error();
            EXPECT_EQ(bytes, 0u);
        }
}

TEST_P(Tensors, AreRotatedWhereTheyLie) {
    for (const Dtype &dtype : all_dtypes)
        for (int bits : {0, 32, 64}) {  // of positions, where they are given
            SCOPED_TRACE(std::string(dtype.name) + ", positions of " + std::to_string(bits) + " bits");
            Random random;
            const Layout layout = bits ? Layout::padded : Layout::compact;
            Array x = Array({2, 3, 2, 10}, layout).fill(random), out = Array(x.shape, layout).forget();
            Array theta = thetas(5, random);
            round_to(dtype, x);
            // Positions by the bits of floats: [T] of 32 bits, [B, T] of 64.
            std::vector<int64_t> where = {3, ((int64_t)1 << 40) + 1, -2, 999'999, 0, -((int64_t)1 << 33)};
            std::vector<int32_t> small = {-5, 0, 2'000'000'000};
            Tensor positions((float *)where.data(), {12}, {1});
            if (bits == 32) positions = Tensor((float *)small.data(), {3}, {1});
            OnDevice d(*device, {x, theta, out, positions}, dtype, {0, 2});
            int64_t extents[] = {2, 3};
            DLTensor given = d.tensors[3];
            given.dtype = {kDLInt, (uint8_t)bits, 1}, given.strides = nullptr;
            if (bits == 64) given.ndim = 2, given.shape = extents;
            const int64_t offset = bits ? 0 : ((int64_t)1 << 32) - 2;
            auto position = [&](int64_t b, int64_t t) {
                return bits == 0 ? offset + t : bits == 32 ? small[t] : where[3 * b + t];
            };
            holdfast_rotate_args args = {};
            args.struct_size = sizeof args, args.x = &d.tensors[0], args.theta = &d.tensors[1], args.out = &d.tensors[2];
            args.positions = bits ? &given : nullptr, args.offset = offset, args.interleaved = bits == 64;
            ASSERT_EQ(holdfast_rotate(context, &args), HOLDFAST_OK) << context.error();
            d.fetch({2});
            expect_rotated(x, theta, out, args.interleaved, position, dtype);
            expect_message(std::string(", on ") + device->name);
            const Array before = x;
            args.out = &d.tensors[0];
            ASSERT_EQ(holdfast_rotate(context, &args), HOLDFAST_OK) << context.error();
            d.fetch({0});
            expect_rotated(before, theta, x, args.interleaved, position, dtype);
            d.expect_released();
        }
}

TEST_P(Tensors, AreNormedWhereTheyLie) {
    for (const Dtype &dtype : all_dtypes)
        for (int heads : {0, 1, 2})  // that have weights: none, all the same, each its own
            for (bool in_place : {false, true}) {
                SCOPED_TRACE(std::string(dtype.name) + ", weights " + std::to_string(heads));
                Random random;
                const Layout layout = heads ? Layout::padded : Layout::compact;
                Array x = Array({2, 3, 2, 33}, layout).fill(random), gate(x.shape, layout),
                      out = Array(x.shape, layout).forget();
                Array weight = Array({2, 33}).fill(random, -2, 2);
                each(weight.shape, [&](const Index &i) {
                    if (heads < 2) weight(i) = heads ? weight({0, i[1]}) : 1;
                });
                fill_gates(gate, random);
                for (Array *a : {&x, &gate}) round_to(dtype, *a);
                OnDevice d(*device, {x, gate, weight, out}, dtype, {0, 1, 3});
                DLTensor weights = d.tensors[2];
                if (heads == 1) weights.ndim = 1, weights.shape++, weights.strides++;
                holdfast_head_norm_gate_args args = {};
                args.struct_size = sizeof args, args.x = &d.tensors[0], args.gate = heads ? &d.tensors[1] : nullptr;
                args.weight = heads ? &weights : nullptr, args.out = &d.tensors[in_place ? 0 : 3];
                args.norm = in_place ? HOLDFAST_NORM_LAYER : HOLDFAST_NORM_RMS, args.eps = 1e-6f;
                const Array before = x;
                ASSERT_EQ(holdfast_head_norm_gate(context, &args), HOLDFAST_OK) << context.error();
                d.fetch({in_place ? (size_t)0 : 3});
                expect_normed(before, gate, weight, in_place ? x : out, in_place, heads, dtype);
                expect_message(std::string(", on ") + device->name);
                d.expect_released();
            }
}

TEST_P(Tensors, HaveGradientsWhereTheyLie) {
    for (const Dtype &dtype : all_dtypes)
        for (int heads : {0, 1, 2}) {  // that have weights: none, all the same, each its own
            SCOPED_TRACE(std::string(dtype.name) + ", weights " + std::to_string(heads));
            Random random;
            const Layout layout = heads ? Layout::padded : Layout::compact;
            const Index shape = {2, 67, 2, 33};
            Array x = Array(shape, layout).fill(random), gate(shape, layout), dout = Array(shape, layout).fill(random);
            Array dx = Array(shape, layout).forget(), dgate = dx, weight = Array({2, 33}).fill(random, -2, 2);
            Array dweight = heads == 1 ? Array({33}).forget() : Array({2, 33}).forget();
            each(weight.shape, [&](const Index &i) {
                if (heads < 2) weight(i) = heads ? weight({0, i[1]}) : 1;
            });
            fill_gates(gate, random);
            for (Array *a : {&x, &gate, &dout}) round_to(dtype, *a);
            OnDevice d(*device, {x, gate, weight, dout, dx, dgate, dweight}, dtype, {0, 1, 3, 4, 5});
            DLTensor weights = d.tensors[2];
            if (heads == 1) weights.ndim = 1, weights.shape++, weights.strides++;
            holdfast_head_norm_gate_backward_args args = {};
            args.struct_size = sizeof args, args.x = &d.tensors[0], args.gate = heads ? &d.tensors[1] : nullptr;
            args.weight = heads ? &weights : nullptr, args.dout = &d.tensors[3], args.dx = &d.tensors[4];
            args.dgate = heads ? &d.tensors[5] : nullptr, args.dweight = heads ? &d.tensors[6] : nullptr;
            args.norm = heads == 1 ? HOLDFAST_NORM_LAYER : HOLDFAST_NORM_RMS, args.eps = 1e-6f;
            ASSERT_EQ(holdfast_head_norm_gate_backward(context, &args), HOLDFAST_OK) << context.error();
            d.fetch({4, 5, 6});
            expect_gradients(x, gate, weight, dout, &dx, heads ? &dgate : nullptr, heads ? &dweight : nullptr, heads == 1,
                             heads, 1e-6f, dtype);
            expect_message(std::string(", on ") + device->name);
            d.expect_released();
        }
    Random random;
    Array dout = Array({2, 3, 2, 10}).fill(random), theta = thetas(5, random);
    const Array before = dout;
    OnDevice d(*device, {dout, theta}, f32, {0});
    holdfast_rotate_backward_args args = {};
    args.struct_size = sizeof args, args.dout = args.dx = &d.tensors[0], args.theta = &d.tensors[1], args.offset = 7;
    ASSERT_EQ(holdfast_rotate_backward(context, &args), HOLDFAST_OK) << context.error();
    d.fetch({0});
    expect_rotated(before, theta, dout, false, [](int64_t, int64_t t) { return 7 + t; }, f32, true);
}

TEST_P(Tensors, OfPowerRetentionAreUsedWhereTheyLie) {
    for (const Dtype &dtype : all_dtypes)
        for (bool in_place : {false, true}) {
            if (!has_type("power", dtype)) continue;  // what results are compared with
            SCOPED_TRACE(std::string(dtype.name) + (in_place ? ", in place" : ""));
            PowerProblem p{2, 136, 2, 2, 6, 5};
            p.dtype = dtype, p.initial = false;
            Context cpu;
            ASSERT_EQ(p.run(cpu, 0, 5), HOLDFAST_OK) << cpu.error();
            {
                auto tokens = [](Array &a) { return Tensor(a).part(1, 5, 135); };
                OnDevice d(*device,
                           {tokens(p.q), tokens(p.k), tokens(p.v), tokens(p.log_decay), p.initial_state, p.initial_keys,
                            tokens(p.out), p.state, p.keys},
                           dtype, {0, 1, 2, 6});
                for (size_t n : {7, 8})
                    if (in_place) d.tensors[n].byte_offset = d.offsets[n] = d.offsets[n - 3];
                auto &t = d.tensors;
                holdfast_forward_args args = forward_args(&t[0], &t[1], &t[2], &t[3], &t[4], &t[6], &t[7]);
                args.degree = 2, args.initial_sum_of_keys = &t[5], args.final_sum_of_keys = &t[8];
                ASSERT_EQ(holdfast_forward(context, &args), HOLDFAST_OK) << context.error();
                d.fetch({6, 7, 8});
                d.expect_released();
                expect_message(std::string("chunks of 64, on ") + device->name);
            }
            {
                Array q = slice(p.q, 1, 135, 1), k = slice(p.k, 1, 135, 1), v = slice(p.v, 1, 135, 1);
                Array log_decay = slice(p.log_decay, 1, 135, 1), out = slice(p.out, 1, 135, 1);
                auto token = [](Array &a) { return Tensor(a).without(1); };
                OnDevice d(*device, {token(q), token(k), token(v), token(log_decay), p.state, p.keys, token(out)}, dtype,
                           {0, 1, 2, 6});
                auto &t = d.tensors;
                holdfast_step_args args = step_args(&t[0], &t[1], &t[2], &t[3], &t[4], &t[6]);
                args.degree = 2, args.sum_of_keys = &t[5];
                ASSERT_EQ(holdfast_step(context, &args), HOLDFAST_OK) << context.error();
                d.fetch({4, 5, 6});
                each(out.shape, [&](const Index &i) { p.out({i[0], 135, i[2], i[3]}) = out(i); });
                expect_message(std::string("token by token, on ") + device->name);
            }
            expect_right(p, p.want());
        }
}

#if HOLDFAST_TEST_METAL && !defined(__APPLE__)
/// Stages that a call launches kernels for, as the stand-in says: without what Halide adds to their names, "x'" for what it derives
/// of x.
std::set<std::string> launched(const std::function<void()> &call) {
    setenv("FAKEMETAL_TRACE", "1", 1);
    testing::internal::CaptureStderr();
    call();
    std::istringstream trace(testing::internal::GetCapturedStderr());
    unsetenv("FAKEMETAL_TRACE");
    static const std::regex kernel(R"(fakemetal: _kernel_(.*?)_s\d+_[a-z].* groups .*)"),
        added(R"((_global|_wrapper|_+\d+)*$)"), derived(R"((_+\d+)?(_hole)?(_\d+)?_d_def_+)");
    std::set<std::string> stages;
    for (std::string line; std::getline(trace, line);) {
        std::smatch match;
        if (!std::regex_match(line, match, kernel)) continue;
        const std::string name = std::regex_replace(match[1].str(), added, "", std::regex_constants::format_first_only);
        stages.insert(std::regex_replace(name, derived, "'"));
    }
    return stages;
}

/// Stages, and the gradients that need them, as Backward::wanted has them; "Q" of those with an axis of queries, of which there are
/// none without dout.
using Needs = std::vector<std::pair<std::string, std::string>>;

std::set<std::string> needed(const Needs &needs, const std::string &wanted, bool dout) {
    std::set<std::string> stages;
    for (const auto &[names, by] : needs) {
        if (by.find_first_of(wanted) == std::string::npos || (!dout && by[0] == 'Q')) continue;
        std::istringstream words(names);
        for (std::string name; words >> name;) stages.insert(name);
    }
    return stages;
}

Needs of_chunkwise() {
    return {{"table decay_steps decay_rest row_decay", "qkvgs"},
            {"key_decay", "qkvg"},
            {"contribution state", "qg"},
            {"q_chunks'", "Qqg"},
            {"dq", "Qq"},
            {"scores'", "Qqkg"},
            {"state' dstate", "kvgs"},
            {"keys_decayed' k_chunks'", "kg"},
            {"dk", "k"},
            {"weights", "Qv"},
            {"v_chunks' dv", "v"},
            {"row_product key_product state_product added_product end_product dlog_decay_chunks dlog_decay", "g"},
            {"dstate_in", "s"}};
}
Needs of_power(bool normalize) {
    const std::string all = "qkvgsz";
    auto or_sums = [&](const std::string &by) { return normalize ? by + all : by; };
    return {{"table decay_steps decay_rest factor weight", all},
            {"unit queries row", "Q" + all},
            {"queries_decayed phi_q", or_sums("Qsz")},
            {"keys", or_sums("qkvg")},
            {"scores", or_sums("Qqkvg")},
            {"weights", or_sums("Qv")},
            {"dnum", "Qqkvgs"},
            {"dden", "Qqkgz"},
            {"phi_q' dqueries_state queries'", "Qqg"},
            {"dq", "Qq"},
            {"weights' scores'", "Qqkg"},
            {"v_chunk", "qkg"},
            {"phi_k' dkeys_state keys'", "kg"},
            {"dk", "k"},
            {"keys_decayed phi_k v_chunk' dv", "v"},
            {"along_row along_key along_end along_state kept dgates dlog_decay", "g"},
            {"dstate_in", "s"},
            {"dkeys_in", "z"},
            {"to", "sz"}};
}
Needs of_parallel(bool normalize) {
    return {{"table decay_steps decay_rest decay_before unit pair_scores factor_of_row", "Qqkvg"},
            {"pair_weights", normalize ? "Qqkvg" : "Qv"},
            {"dden pair_scores'", "Qqkg"},
            {"dq_sum", "Qqg"},
            {"dq", "Qq"},
            {"dk_sum", "Qkg"},
            {"dk", "Qk"},
            {"dv_sum dv", "Qv"},
            {"q_dq k_dk ddecay_after ddecay_of_row ddecay_of_pair ddecay_sum ddecay_before ddecay_of_later dlog_decay", "Qg"}};
}

// Of each gradient alone, and of all but it.
TEST(Launches, OfGradientsAreThoseThatTheWantedOnesNeed) {
    if (!runs("metal")) GTEST_SKIP() << backend("metal").missing;
    for (const auto &[degree, normalize, states] :
         {std::make_tuple(1, false, true), {2, false, true}, {2, true, true}, {2, false, false}, {2, true, false}}) {
        Context context;
        ASSERT_EQ(holdfast_context_set_backend(context, "metal"), HOLDFAST_OK) << context.error();
        Backward p{1, 35, 1, 1, 3, 5, degree, normalize, Gates::weak, f32, Layout::compact, states, states};
        if (!states) p.form = HOLDFAST_FORM_PARALLEL;
        ASSERT_EQ(p.forward(context), HOLDFAST_OK) << context.error();
        const Needs needs = degree == 1 ? of_chunkwise() : states ? of_power(normalize) : of_parallel(normalize);
        const std::string all = p.wanted;
        std::vector<std::string> some = {all};
        for (char one : all) {
            some.emplace_back(1, one), some.push_back(all);
            some.back().erase(all.find(one), 1);
        }
        for (const std::string &wanted : some)
            for (bool dout : {true, false})
                for (bool dfinal : {true, false}) {
                    if (!states && dfinal) continue;
                    SCOPED_TRACE(testing::Message()
                                 << "degree " << degree << ", normalize " << normalize << ", states " << states << ", wanted "
                                 << wanted << ", dout " << dout << ", dfinal " << dfinal);
                    p.wanted = wanted, p.has_dout = dout, p.has_dstate = p.has_dsum = dfinal;
                    const std::set<std::string> stages =
                        launched([&] { ASSERT_EQ(p.backward(context), HOLDFAST_OK) << context.error(); });
                    // What nothing comes to is zero: queries without dout, and without gradients of the final state all.
                    std::string computed = wanted;
                    if (!dout) computed.erase(std::remove(computed.begin(), computed.end(), 'q'), computed.end());
                    if (!dout && !dfinal) computed = "";
                    EXPECT_EQ(stages, needed(needs, computed, dout));
                }
    }
}
#endif

/// A call of holdfast_backward, with all that `p` has.
struct BackwardOnDevice : OnDevice {
    holdfast_backward_args args = {};
    BackwardOnDevice(Device &device, Backward &p)
        : OnDevice(device,
                   {p.q, p.k, p.v, decays(p, p.log_decay), state(p, p.initial_state), p.initial_keys, p.out, p.dout,
                    state(p, p.dfinal_state), p.dfinal_keys, p.dq, p.dk, p.dv, p.dlog_decay, state(p, p.dinitial_state),
                    p.dinitial_keys},
                   p.dtype, {0, 1, 2, 6, 7, 10, 11, 12}) {
        auto &t = tensors;
        args.struct_size = sizeof args, args.degree = p.degree, args.form = p.form, args.chunk_size = p.chunk_size;
        args.normalize = p.normalize ? HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS : HOLDFAST_NORMALIZE_NONE;
        args.state_layout = p.value_major ? HOLDFAST_STATE_VALUE_MAJOR : HOLDFAST_STATE_KEY_MAJOR;
        args.q = &t[0], args.k = &t[1], args.v = &t[2], args.log_decay = &t[3];
        args.dq = &t[10], args.dk = &t[11], args.dv = &t[12], args.dlog_decay = &t[13];
        if (p.has_dout) args.dout = &t[7];
        if (p.normalize) args.out = &t[6];
        if (p.initial) args.initial_state = &t[4], args.initial_sum_of_keys = sum(p, 5);
        if (p.final && p.has_dstate) args.dfinal_state = &t[8];
        if (p.final && p.has_dsum) args.dfinal_sum_of_keys = sum(p, 9);
        if (p.final) args.dinitial_state = &t[14], args.dinitial_sum_of_keys = sum(p, 15);
        if (p.starts.empty()) return;
        length = (int64_t)p.starts.size();
        cu_seqlens = {p.starts.data(), {kDLCPU, 0}, 1, {kDLInt, 64, 1}, &length, nullptr, 0}, args.cu_seqlens = &cu_seqlens;
    }
    void fetch() { OnDevice::fetch({10, 11, 12, 13, 14, 15}); }

private:
    int64_t length = 0;
    DLTensor cu_seqlens = {};

    static Tensor decays(const Backward &p, Array &a) {
        return p.gates == Gates::per_head ? Tensor(a.data(), {p.H}, {a.stride.back()}) : Tensor(a);
    }
    static Tensor state(const Backward &p, Array &a) {
        Tensor t(a);
        if (p.value_major) std::swap(t.shape[2], t.shape[3]), std::swap(t.stride[2], t.stride[3]);
        return t;
    }
    DLTensor *sum(const Backward &p, size_t n) { return p.normalize ? &tensors[n] : nullptr; }
};

TEST_P(Tensors, OfGradientsAreUsedWhereTheyLie) {
    for (const auto &[degree, dtype, in_place] :
         {std::make_tuple(1, f32, true), {1, bf16, false}, {2, f32, true}, {2, f16, false}}) {
        const char *forward = degree > 1 ? "power" : "chunkwise",
                   *backward = degree > 1 ? "power_backward" : "chunkwise_backward";
        if (!has_type(forward, dtype) || !variant_for(GetParam(), {6, 5}, dtype, backward)) continue;
        SCOPED_TRACE(testing::Message() << "degree " << degree << ", " << dtype.name << ", in place " << in_place);
        const Gates gates = in_place ? Gates::weak : Gates::per_head;
        Backward p{2, 19, 2, 2, 6, 5, degree, degree > 1, gates, dtype, in_place ? Layout::compact : Layout::padded};
        p.chunk_size = 8;
        Context cpu;
        ASSERT_EQ(p.forward(cpu), HOLDFAST_OK) << cpu.error();
        BackwardOnDevice d(*device, p);
        for (size_t n : {14, 15})
            if (in_place && (n == 14 || p.normalize)) d.tensors[n].byte_offset = d.offsets[n] = d.offsets[n - 6];
        size_t bytes = 1;
        EXPECT_EQ(holdfast_backward_workspace_size(context, &d.args, &bytes), HOLDFAST_OK) << context.error();
        EXPECT_EQ(bytes, 0u);
        ASSERT_EQ(holdfast_backward(context, &d.args), HOLDFAST_OK) << context.error();
        d.fetch();
        p.expect_reference(8);
        d.expect_released();
        expect_message(std::string("chunks of 8, on ") + device->name);
    }
}

TEST_P(Tensors, OfGradientsAreClearedWhereNothingComesToThem) {
    struct Case {
        int degree;
        Dtype dtype;
        bool dstate, states;  // a gradient of the final state; any, else the parallel form
        Layout layout = Layout::padded;
        Gates gates = Gates::weak;
        Index starts = {};
        bool value_major = false;
    };
    for (const auto &[degree, dtype, dstate, states, layout, gates, starts, value_major] :
         {Case{1, f32, true, true},
          {1, bf16, true, true, Layout::compact, Gates::per_head},
          {2, f32, true, true, Layout::padded, Gates::weak, {0, 3, 3, 11}},
          {2, f16, true, true},
          {1, f32, false, true, Layout::padded, Gates::weak, {0, 11, 11}, true},
          {2, bf16, false, true, Layout::padded, Gates::per_head},
          {2, f16, false, false},
          {1, f32, false, false, Layout::swapped, Gates::per_head}}) {
        // What is given, whatever that is of, is enough to clear what is of the same type.
        const char *kernel = degree == 1 && states ? "chunkwise_backward" : "power_backward";
        if (dstate && !variant_for(GetParam(), {5, 7}, dtype, kernel)) continue;
        SCOPED_TRACE(testing::Message() << "degree " << degree << ", " << dtype.name << ", dstate " << dstate << ", states "
                                        << states << ", packed " << !starts.empty());
        Backward p{starts.empty() ? 2 : 1,
                   starts.empty() ? 11 : starts.back(),
                   2,
                   2,
                   5,
                   7,
                   degree,
                   degree > 1 || !states,
                   gates,
                   dtype,
                   layout,
                   states,
                   states,
                   starts,
                   states ? HOLDFAST_FORM_CHUNKWISE : HOLDFAST_FORM_PARALLEL,
                   HOLDFAST_EXPANSION_TIGHT,
                   value_major};
        p.chunk_size = 8, p.has_dout = false, p.has_dstate = p.has_dsum = dstate;
        p.dout.fill(0), p.out.fill(0);
        for (Array *x : {&p.k, &p.v}) round_to(dtype, *x);
        Backward call = p;  // which has no numbers where nothing is looked at
        call.q.fill(NAN), call.out.forget(), call.dout.forget();
        if (!dstate) call.k.forget(), call.v.forget();
        const size_t said = context.messages.size();
        {
            BackwardOnDevice d(*device, call);
            ASSERT_EQ(holdfast_backward(context, &d.args), HOLDFAST_OK) << context.error();
            d.fetch();
            EXPECT_TRUE(d.gaps_intact()) << "memory between the elements was written";
            d.expect_released();
        }
        EXPECT_EQ(context.messages.size() - said, (size_t)dstate) << "kernels that are announced";
        const Array *from[] = {&call.dq, &call.dk, &call.dv, &call.dlog_decay, &call.dinitial_state, &call.dinitial_keys};
        for (size_t n = 0; n < 6; n++) *p.gradients()[n] = *from[n];
        p.expect_reference(8);
        each(p.dq.shape, [&](const Index &i) { EXPECT_EQ(p.dq(i), 0) << text(i); });
    }
}

TEST_P(Tensors, WhatIsTooLargeForOneCallOfTheKernelTakesSeveral) {
    auto *opencl = dynamic_cast<OpenCLDevice *>(device.get());
    if (!opencl) GTEST_SKIP() << "no memory that is there only where it is used";
    for (bool packed : {false, true}) {
        SCOPED_TRACE(packed);
        const Gates gates = packed ? Gates::weak : Gates::per_head;
        Problem p{1, 100, 2, 16, 24, gates, Layout::compact, true, f32, 1, packed ? Index{0, 61, 61, 100} : Index{}};
        ForwardOnDevice d(*device, p);
        int64_t count = 4;
        const DLTensor cu_seqlens = {p.starts.data(), {kDLCPU, 0}, 1, {kDLInt, 64, 1}, &count, nullptr, 0};
        if (packed) d.args.cu_seqlens = &cu_seqlens;
        // Tokens of v lie so far apart that 2^31 bytes hold 51 of them.
        constexpr int64_t apart = 10 << 20;
        int64_t strides[] = {0, apart, 24, 1};
        void *memory = opencl->sparse_buffer((size_t)(p.T * apart) * sizeof(float));
        if (!memory) GTEST_SKIP() << "OpenCL has no buffers of 4 GB here";
        for (int64_t t = 0; t < p.T; t++)
            device->write(memory, (size_t)(t * apart) * sizeof(float), &p.v({0, t, 0, 0}), 2 * 24 * sizeof(float));
        d.tensors[2].data = memory, d.tensors[2].strides = strides, d.tensors[2].byte_offset = 0;
        ASSERT_EQ(holdfast_forward(context, &d.args), HOLDFAST_OK) << context.error();
        d.fetch({5, 6});
        p.expect_reference(32, 4);
        device->release(memory);
    }
}

TEST_P(Tensors, GradientsOfWhatIsTooLargeForOneCallOfTheKernelTakeSeveral) {
    auto *opencl = dynamic_cast<OpenCLDevice *>(device.get());
    if (!opencl) GTEST_SKIP() << "no memory that is there only where it is used";
    for (bool packed : {false, true}) {
        SCOPED_TRACE(packed);
        const Gates gates = packed ? Gates::weak : Gates::per_head;
        Backward p{
            1, 100, 2, 2, 16, 24, 1, false, gates, f32, Layout::compact, true, true, packed ? Index{0, 61, 61, 100} : Index{}};
        OnDevice d(*device,
                   {p.q, p.k, p.v, packed ? Tensor(p.log_decay) : Tensor(p.log_decay.data(), {p.H}, {1}), p.initial_state,
                    p.dout, p.dfinal_state, p.dq, p.dk, p.dv, p.dlog_decay, p.dinitial_state},
                   f32, {0, 1, 2, 5, 7, 8, 9});
        auto &t = d.tensors;
        holdfast_backward_args args = {};
        args.struct_size = sizeof args, args.q = &t[0], args.k = &t[1], args.v = &t[2], args.log_decay = &t[3];
        args.initial_state = &t[4], args.dout = &t[5], args.dfinal_state = &t[6], args.dq = &t[7], args.dk = &t[8];
        args.dv = &t[9], args.dlog_decay = &t[10], args.dinitial_state = &t[11];
        int64_t count = 4;
        const DLTensor cu_seqlens = {p.starts.data(), {kDLCPU, 0}, 1, {kDLInt, 64, 1}, &count, nullptr, 0};
        if (packed) args.cu_seqlens = &cu_seqlens;
        // Tokens of v lie so far apart that 2^31 bytes hold 51 of them.
        constexpr int64_t apart = 10 << 20;
        int64_t strides[] = {0, apart, 24, 1};
        void *memory = opencl->sparse_buffer((size_t)(p.T * apart) * sizeof(float));
        if (!memory) GTEST_SKIP() << "OpenCL has no buffers of 4 GB here";
        for (int64_t n = 0; n < p.T; n++)
            device->write(memory, (size_t)(n * apart) * sizeof(float), &p.v({0, n, 0, 0}), 2 * 24 * sizeof(float));
        t[2].data = memory, t[2].strides = strides, t[2].byte_offset = 0;
        for (const bool states : {true, false}) {  // that calls begin with: for dq and decays alone
            if (!states) {
                args.dq = args.dlog_decay = args.dinitial_state = nullptr;
                p.wanted = "kv";
                for (Array *a : {&p.dq, &p.dk, &p.dv, &p.dlog_decay, &p.dinitial_state}) a->forget();
            }
            ASSERT_EQ(holdfast_backward(context, &args), HOLDFAST_OK) << context.error();
            d.fetch(states ? std::vector<size_t>{7, 8, 9, 10, 11} : std::vector<size_t>{8, 9});
            p.expect_reference(32);
        }
        device->release(memory);
    }
}

TEST_P(Tensors, PowerStatesInEveryOrderAreUsedWhereTheyLie) {
    for (holdfast_form form : {HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_RECURRENT}) {
        SCOPED_TRACE(testing::Message() << "form " << form);
        const bool tiled = form == HOLDFAST_FORM_CHUNKWISE;
        const holdfast_expansion expansion = tiled ? HOLDFAST_EXPANSION_TILED : HOLDFAST_EXPANSION_TIGHT;
        PowerProblem p{2, 4, 1, 1, tiled ? 32 : 6, 3, 2, true, Gates::weak, f32, form, expansion, true, false};
        Context cpu;
        ASSERT_EQ(p.run(cpu, 0, 2), HOLDFAST_OK) << cpu.error();
        PowerProblem want = p;
        ASSERT_EQ(want.run(cpu, 2, 4), HOLDFAST_OK) << cpu.error();
        auto tokens = [](Array &a) { return Tensor(a).part(1, 2, 4); };
        OnDevice d(*device,
                   {tokens(p.q), tokens(p.k), tokens(p.v), tokens(p.log_decay), p.initial_state, p.initial_keys, tokens(p.out),
                    p.state, p.keys},
                   f32, {0, 1, 2, 6});
        auto &t = d.tensors;
        holdfast_forward_args args = forward_args(&t[0], &t[1], &t[2], &t[3], &t[4], &t[6], &t[7]);
        args.degree = 2, args.initial_sum_of_keys = &t[5], args.final_sum_of_keys = &t[8], args.form = form;
        args.expansion = expansion, args.state_layout = HOLDFAST_STATE_VALUE_MAJOR;
        ASSERT_EQ(holdfast_forward(context, &args), HOLDFAST_OK) << context.error();
        d.fetch({6, 7, 8});
        expect_right(p, p.want());
        for (auto [got, expected] : {std::pair{&p.state, &want.state}, {&p.keys, &want.keys}})
            EXPECT_LE(relative_rms(got->values(), expected->values()), 1e-6);
        d.expect_released();
    }
}

TEST_P(Tensors, OfTheParallelFormAreUsedWhereTheyLie) {
    for (int degree : {1, 2})
        for (bool in_place : {false, true}) {
            SCOPED_TRACE("degree " + std::to_string(degree) + (in_place ? ", in place" : ""));
            const bool value_major = degree == 1 || in_place;
            PowerProblem p{2,
                           40,
                           2,
                           2,
                           6,
                           5,
                           degree,
                           degree > 1,
                           Gates::weak,
                           f32,
                           HOLDFAST_FORM_AUTO,
                           HOLDFAST_EXPANSION_TIGHT,
                           value_major,
                           false};
            Context cpu;
            ASSERT_EQ(p.run(cpu, 0, 5), HOLDFAST_OK) << cpu.error();
            auto tokens = [](Array &a) { return Tensor(a).part(1, 5, 40); };
            Array weights(Index{2, 4, 35, 35}), want(weights.shape), out = p.out;
            std::vector<Tensor> list = {tokens(p.q),     tokens(p.k),    tokens(p.v),   tokens(p.log_decay),
                                        p.initial_state, p.initial_keys, tokens(p.out), p.state,
                                        p.keys,          weights};
            auto call = [&](std::vector<DLTensor> &t) {
                holdfast_forward_args args = forward_args(&t[0], &t[1], &t[2], &t[3], &t[4], &t[6], &t[7]);
                args.degree = degree, args.weights = &t[9], args.form = HOLDFAST_FORM_PARALLEL;
                args.state_layout = value_major ? HOLDFAST_STATE_VALUE_MAJOR : HOLDFAST_STATE_KEY_MAJOR;
                if (degree > 1) args.initial_sum_of_keys = &t[5], args.final_sum_of_keys = &t[8];
                return args;
            };
            {
                OnDevice d(*device, list, f32, {});
                for (size_t n : {7, 8})
                    if (in_place) d.tensors[n].byte_offset = d.offsets[n] = d.offsets[n - 3];
                const holdfast_forward_args args = call(d.tensors);
                ASSERT_EQ(holdfast_forward(context, &args), HOLDFAST_OK) << context.error();
                d.fetch({6, 7, 8, 9});
                d.expect_released();
                expect_message(std::string("parallel form, on ") + device->name);
            }
            expect_right(p, p.want());
            list[6] = Tensor(out).part(1, 5, 40), list[9] = want;
            Array state = p.state, keys = p.keys;
            list[7] = state, list[8] = keys;
            std::vector<DLTensor> host;
            for (Tensor &x : list) host.push_back(x.dl());
            const holdfast_forward_args args = call(host);
            ASSERT_EQ(holdfast_forward(cpu, &args), HOLDFAST_OK) << cpu.error();
            EXPECT_LE(relative_rms(weights.values(), want.values()), tolerance::relative_rms_between_forms);
            EXPECT_LE(relative_rms(p.state.values(), state.values()), tolerance::relative_rms_between_forms);
        }
}

TEST_P(Tensors, ErrorsNameThem) {
    Problem p{1, 8, 2, 8, 8};
    ForwardOnDevice d(*device, p);
    const std::string where = device->name;
    if (device->stream) {
        ASSERT_EQ(holdfast_context_set_stream(context, nullptr), HOLDFAST_OK);
        EXPECT_EQ(holdfast_forward(context, &d.args), HOLDFAST_INVALID_ARGUMENT);
        EXPECT_NE(context.error().find("q is on " + where + " and the context has no stream"), std::string::npos)
            << context.error();
        ASSERT_EQ(holdfast_context_set_stream(context, device->stream), HOLDFAST_OK);
    }

    d.tensors[1].device = {kDLCPU, 0}, d.tensors[1].byte_offset = 0, d.tensors[1].data = p.k.data();
    EXPECT_EQ(holdfast_forward(context, &d.args), HOLDFAST_INVALID_ARGUMENT);
    EXPECT_EQ(context.error(), "k is on the CPU and q on " + where + "; expected all tensors on one device");
    d.tensors[1] = d.tensors[0], d.tensors[1].byte_offset = d.offsets[1];

    d.tensors[5].byte_offset = d.offsets[0];
    EXPECT_EQ(holdfast_forward(context, &d.args), HOLDFAST_INVALID_ARGUMENT);
    EXPECT_EQ(context.error(), "out overlaps q in memory; expected separate memory");
    d.tensors[5].byte_offset = d.offsets[5];

    ASSERT_EQ(holdfast_forward(context, &d.args), HOLDFAST_OK) << context.error();
    d.fetch({5, 6});
    p.expect_reference(32, 1);
}

INSTANTIATE_TEST_SUITE_P(, Tensors, testing::Values("metal", "opencl"),
                         [](const auto &info) { return std::string(info.param); });

}  // namespace
