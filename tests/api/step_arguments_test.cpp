// What holdfast_step says to bad arguments. Its checks are those of holdfast_forward (arguments_test.cpp); here each is met
// once, in the words that fit a step, and nothing is written.
#include "../step.h"
#include "bad_argument.h"

#include <cstddef>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <tuple>

namespace {
using namespace test;

constexpr int64_t B = 2, H = 3, K = 4, V = 6;

/// A good call, to be spoilt. `memory` is one more array to point into.
struct Call {
    Problem p{B, 1, H, K, V};
    Step s = step(p.forward(), 0);
    DLTensor q = s.q.dl(), k = s.k.dl(), v = s.v.dl(), log_decay = s.log_decay.dl(), state = s.state.dl(), out = s.out.dl();
    Array sums = Array({B, H, K}).fill(p.random);
    Tensor sum_view = sums;
    DLTensor sum_of_keys = sum_view.dl();
    holdfast_step_args args = step_args(&q, &k, &v, &log_decay, &state, &out);
    Array memory = Array({4096}).fill(-1.0f);
    std::unique_ptr<Reserved> far;

    Call() { p.final_state.fill(p.random); }
    Call(const Call &) = delete;

    DLTensor &tensor(const std::string &name) {
        const std::map<std::string, DLTensor *> all = {
            {"q", &q}, {"k", &k}, {"v", &v}, {"out", &out}, {"log_decay", &log_decay}, {"state", &state}};
        return *all.at(name);
    }
    /// Put a compact tensor of that shape at `offset` of `memory`.
    void place(DLTensor &x, int64_t offset) {
        x.data = memory.data() + offset;
        x.strides = nullptr;
    }
    std::vector<const Array *> arrays() const {
        return {&p.q, &p.k, &p.v, &p.log_decay, &p.final_state, &p.out, &sums, &memory};
    }
};

struct Case {
    std::string name;
    holdfast_status status;
    std::string text;  // part of what the library says
    std::function<void(Call &)> spoil;
};
void PrintTo(const Case &c, std::ostream *stream) { *stream << c.name; }

const std::vector<std::pair<std::string, std::string>> tensors = {{"q", "BHK"},   {"k", "BHK"},        {"v", "BHV"},
                                                                  {"out", "BHV"}, {"log_decay", "BH"}, {"state", "BHKV"}};

std::vector<Case> cases() {
    constexpr holdfast_status invalid = HOLDFAST_INVALID_ARGUMENT, unsupported = HOLDFAST_UNSUPPORTED;
    constexpr int64_t huge = std::numeric_limits<int64_t>::max();
    std::vector<Case> list;
    auto add = [&](const std::string &name, holdfast_status status, const std::string &text,
                   std::function<void(Call &)> spoil) { list.push_back({name, status, text, std::move(spoil)}); };

    for (size_t size : {(size_t)0, sizeof(void *), offsetof(holdfast_step_args, scale)})
        add("struct_size_" + std::to_string(size), invalid,
            "args.struct_size is " + std::to_string(size) + "; expected sizeof(holdfast_step_args)",
            [=](Call &c) { c.args.struct_size = size; });
    for (float scale : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()})
        add(std::isnan(scale) ? "scale_nan" : "scale_minus_inf", invalid, "scale is ", [=](Call &c) { c.args.scale = scale; });

    const std::tuple<const char *, int32_t holdfast_step_args::*, int32_t> options[] = {
        {"degree", &holdfast_step_args::degree, 4},
        {"normalize", &holdfast_step_args::normalize, 2},
        {"state_layout", &holdfast_step_args::state_layout, 1},
        {"expansion", &holdfast_step_args::expansion, 1}};
    for (const auto &[option, field, most] : options) {
        const auto where = field;
        add(std::string(option) + "_too_large", invalid,
            std::string(option) + " is " + std::to_string(most + 1) + "; expected 0 to " + std::to_string(most),
            [=, value = most + 1](Call &c) { c.args.*where = value; });
    }
    add("heads_in_no_groups", invalid, "k [B, Hk, K] has Hk = 2; expected a divisor of 3, the H of q",
        [](Call &c) { c.k.shape[1] = 2; });
    add("state_of_other_layout", invalid, "state [B, Hk, V, D] has D = 6; expected 4, the K of q",
        [](Call &c) { c.args.state_layout = HOLDFAST_STATE_VALUE_MAJOR; });
    add("sum_of_keys_without_sum", invalid, "sum_of_keys is given and out, of degree 1, is not normalized; expected NULL",
        [](Call &c) { c.args.sum_of_keys = &c.sum_of_keys; });
    add("sum_of_keys_null", invalid, "sum_of_keys is NULL; expected a tensor [B, Hk, D]",
        [](Call &c) { c.args.normalize = HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS; });
    add("sum_of_keys_overlaps_state", invalid, " overlaps ", [](Call &c) {
        c.args.normalize = HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS, c.args.sum_of_keys = &c.sum_of_keys;
        c.place(c.state, 1024), c.place(c.sum_of_keys, 1025);
    });

    add("q_null", invalid, "q is NULL; expected a tensor [B, H, K]", [](Call &c) { c.args.q = nullptr; });
    add("k_null", invalid, "k is NULL; expected a tensor [B, Hk, K]", [](Call &c) { c.args.k = nullptr; });
    add("v_null", invalid, "v is NULL; expected a tensor [B, Hk, V]", [](Call &c) { c.args.v = nullptr; });
    add("out_null", invalid, "out is NULL; expected a tensor [B, H, V]", [](Call &c) { c.args.out = nullptr; });
    add("state_null", invalid, "state is NULL; expected a tensor [B, Hk, D, V]", [](Call &c) { c.args.state = nullptr; });

    for (const auto &[name, axes] : tensors) {
        const std::string who = name;
        const int rank = (int)axes.size();
        auto add_one = [&](const std::string &what, holdfast_status status, const std::string &text,
                           std::function<void(DLTensor &)> spoil) {
            add(who + "_" + what, status, who + " " + text, [=](Call &c) { spoil(c.tensor(who)); });
        };
        add_one("data_null", invalid, "has NULL data; expected memory for shape [", [](DLTensor &x) { x.data = nullptr; });
        const int other_rank = rank == 4 ? 3 : 4;
        add_one("rank", invalid,
                "has " + std::to_string(other_rank) + " dimensions; expected " +
                    (who == "log_decay" ? "1, [Hk], or 2, [B, Hk]" : std::to_string(rank) + ", [B, H"),
                [=](DLTensor &x) { x.ndim = other_rank; });
        const bool any_dtype = who.size() == 1 || who == "out";
        add_one("dtype", unsupported,
                std::string("has dtype float64; expected float32") + (any_dtype ? ", float16 or bfloat16" : ""),
                [](DLTensor &x) { x.dtype.bits = 64; });
        if (who != "q")
            add_one("float16", any_dtype ? invalid : unsupported,
                    std::string("has dtype float16; expected float32") + (any_dtype ? ", that of q" : ""),
                    [](DLTensor &x) { x.dtype.bits = 16; });
        add_one("device", unsupported, "is on device type 10; expected that of a backend of this build: 1 (cpu)",
                [](DLTensor &x) { x.device.device_type = kDLROCM; });
        for (int axis = 0; axis < rank; axis++) {
            const std::string at = std::string("_on_") + axes[axis];
            add_one("extent_negative" + at, invalid, "has shape [", [=](DLTensor &x) { x.shape[axis] = -1; });
            add_one("stride_most" + at, invalid, "has ", [=](DLTensor &x) { x.strides[axis] = huge; });
            if (who != "q" && who != "v") add_one("extent_other" + at, invalid, "[", [=](DLTensor &x) { x.shape[axis]--; });
            if ((who == "out" || who == "state") && axis < rank - 1)
                add_one("elements_share_memory" + at, invalid,
                        "has stride 0 on axis " + std::to_string(axis) + ", so that its elements share memory",
                        [=](DLTensor &x) { x.strides[axis] = 0; });
        }
        if (who != "log_decay")
            add_one("row_stride", invalid, "has stride 2 on its last axis; expected 1",
                    [=](DLTensor &x) { x.strides[rank - 1] = 2; });
    }
    add("v_says_what_it_was", invalid, "v [B, Hk, V] has Hk = 2; expected 3, that of k", [](Call &c) { c.v.shape[1] = 2; });
    add("out_says_what_it_was", invalid, "out [B, H, V] has V = 6; expected 5, that of v", [](Call &c) { c.v.shape[2] = 5; });
    add("K_0", invalid, "q [B, H, K] has K = 0; expected at least 1", [](Call &c) { c.q.shape[2] = c.k.shape[2] = 0; });
    add("V_0", invalid, "v [B, Hk, V] has V = 0; expected at least 1", [](Call &c) { c.v.shape[2] = c.out.shape[2] = 0; });
    add("state_stride_too_large", unsupported, "state has stride 1073741824 on axis 2; expected at most ", [](Call &c) {
        constexpr size_t bytes = (size_t)64 << 30;
        c.far = std::make_unique<Reserved>(bytes);
        EXPECT_TRUE(*c.far) << "no address space of 64 GB";
        c.state.data = c.far->floats();
        c.state.strides[2] = 1 << 30;
    });
    for (const std::string output : {"out", "state"})
        for (const auto &[other, axes] : tensors) {
            if (other == output) continue;
            const std::string input = other;
            add(output + "_overlaps_" + input, invalid, " in memory; expected separate memory", [=](Call &c) {
                c.place(c.tensor(input), 1024);
                c.place(c.tensor(output), 1025);
            });
        }
    for (float value : {0.5f, std::numeric_limits<float>::quiet_NaN()}) {
        const std::string name = std::isnan(value) ? "nan" : "positive";
        add("log_decay_" + name, invalid, "log_decay[1, 2] is " + std::string(std::isnan(value) ? "nan" : "0.5"),
            [=](Call &c) { c.p.log_decay({1, 0, 2}) = value; });
        add("log_decay_per_head_" + name, invalid, "log_decay[2] is ", [=](Call &c) {
            c.log_decay.ndim = 1, c.log_decay.shape[0] = H, c.log_decay.strides = nullptr;
            c.p.log_decay({0, 0, 2}) = value;
        });
    }
    return list;
}

class BadStepArgument : public testing::TestWithParam<Case> {};

TEST_P(BadStepArgument, IsNamedAndNothingIsWritten) {
    Context context;
    Call call;
    expect_refused(GetParam(), context, call, [&] { return holdfast_step(context, &call.args); });
}

INSTANTIATE_TEST_SUITE_P(, BadStepArgument, testing::ValuesIn(cases()), [](const auto &info) { return info.param.name; });

TEST(StepArgs, Null) {
    Context context;
    EXPECT_EQ(holdfast_step(context, nullptr), HOLDFAST_INVALID_ARGUMENT);
    EXPECT_EQ(context.error(), "args is NULL; expected a holdfast_step_args");
}

TEST(StepArgs, OfALaterVersion) {
    struct {
        holdfast_step_args args;
        unsigned char more[24];
    } later = {};
    Context context;
    Call call;
    later.args = call.args;
    later.args.struct_size = sizeof later;
    EXPECT_EQ(holdfast_step(context, &later.args), HOLDFAST_OK) << context.error();
    later.more[7] = 1;
    EXPECT_EQ(holdfast_step(context, &later.args), HOLDFAST_UNSUPPORTED);
    EXPECT_NE(context.error().find("is not zero; expected zeros"), std::string::npos) << context.error();
}

TEST(StepArgs, OfTheFirstVersion) {
    Context context;
    Call call;
    call.args.struct_size = offsetof(holdfast_step_args, sum_of_keys);
    std::memset((char *)&call.args + call.args.struct_size, 0xff, sizeof call.args - call.args.struct_size);
    EXPECT_EQ(holdfast_step(context, &call.args), HOLDFAST_OK) << context.error();
}

TEST(StepArgs, WhatMayBeLeftOutOrOdd) {
    const std::pair<const char *, std::function<void(Call &)>> changes[] = {
        {"no decay", [](Call &c) { c.args.log_decay = nullptr; }},
        {"decay of minus infinity", [](Call &c) { c.p.log_decay({1, 0, 2}) = -std::numeric_limits<float>::infinity(); }},
        {"q and k overlap", [](Call &c) { c.place(c.q, 1024), c.place(c.k, 1025); }},
        {"empty",
         [](Call &c) {
             for (DLTensor *x : {&c.q, &c.k, &c.v, &c.log_decay, &c.state, &c.out}) x->shape[0] = 0, x->data = nullptr;
         }},
    };
    for (const auto &[name, change] : changes) {
        SCOPED_TRACE(name);
        Context context;
        Call call;
        change(call);
        EXPECT_EQ(holdfast_step(context, &call.args), HOLDFAST_OK) << context.error();
    }
}

}  // namespace
