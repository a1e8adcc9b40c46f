// What holdfast_backward says to bad arguments: every status, a text that names the argument with what it was and what was expected,
// and nothing written. What it shares with holdfast_forward, whose checks it goes through, is in arguments_test.cpp.
#include "../backward.h"
#include "bad_argument.h"

#include <cstring>
#include <functional>
#include <limits>
#include <map>

namespace {
using namespace test;

constexpr int64_t B = 2, T = 5, H = 3, K = 4, V = 6;

/// A good call of normalized outputs, to be spoilt. `memory` is one more array to point into.
struct Call {
    Backward p{B, T, H, 1, K, V, 1, true};
    Array out = p.v, memory = Array({8192}).fill(-1.0f), inside = Array({B * 4, H, K, V}).fill(p.random);
    Tensor states_view = inside;
    DLTensor states = states_view.dl();  // after 0, 2, 4 and 5 tokens
    Tensor views[16] = {
        p.q,  p.k,  p.v,  p.log_decay,  p.initial_state,  p.initial_keys, out, p.dout, p.dfinal_state, p.dfinal_keys,
        p.dq, p.dk, p.dv, p.dlog_decay, p.dinitial_state, p.dinitial_keys};
    DLTensor tensors[16];
    int64_t starts[3] = {0, 2, T}, sequences[1] = {3};
    DLTensor cu_seqlens = {starts, {kDLCPU, 0}, 1, {kDLInt, 64, 1}, sequences, nullptr, 0};
    holdfast_backward_args args = {};
    std::unique_ptr<Reserved> far;
    Index other_strides;

    static const std::vector<std::string> &names() {
        static const std::vector<std::string> list = {"q",
                                                      "k",
                                                      "v",
                                                      "log_decay",
                                                      "initial_state",
                                                      "initial_sum_of_keys",
                                                      "out",
                                                      "dout",
                                                      "dfinal_state",
                                                      "dfinal_sum_of_keys",
                                                      "dq",
                                                      "dk",
                                                      "dv",
                                                      "dlog_decay",
                                                      "dinitial_state",
                                                      "dinitial_sum_of_keys"};
        return list;
    }
    Call() {
        for (size_t n = 0; n < 16; n++) tensors[n] = views[n].dl();
        DLTensor *t = tensors;
        args.struct_size = sizeof args, args.normalize = HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS;
        args.q = t, args.k = t + 1, args.v = t + 2, args.log_decay = t + 3, args.initial_state = t + 4;
        args.initial_sum_of_keys = t + 5, args.out = t + 6, args.dout = t + 7, args.dfinal_state = t + 8;
        args.dfinal_sum_of_keys = t + 9, args.dq = t + 10, args.dk = t + 11, args.dv = t + 12, args.dlog_decay = t + 13;
        args.dinitial_state = t + 14, args.dinitial_sum_of_keys = t + 15;
    }
    Call(const Call &) = delete;

    DLTensor &tensor(const std::string &name) {
        return tensors[std::find(names().begin(), names().end(), name) - names().begin()];
    }
    void place(DLTensor &x, int64_t offset) { x.data = memory.data() + offset, x.strides = nullptr; }
    void place_far(DLTensor &x) {
        constexpr size_t bytes = (size_t)64 << 30;
        far = std::make_unique<Reserved>(bytes);
        EXPECT_TRUE(*far) << "no address space of 64 GB";
        x.data = far->floats() + bytes / sizeof(float) / 2;
    }
    void decay_per_head() {
        for (const char *name : {"log_decay", "dlog_decay"}) {
            DLTensor &x = tensor(name);
            x.ndim = 1, x.shape[0] = H, x.strides = nullptr;
        }
    }
    void give_states() { plain(), args.states = &states, args.state_interval = 2; }
    /// Out is not normalized.
    void plain() {
        args.normalize = HOLDFAST_NORMALIZE_NONE;
        args.initial_sum_of_keys = args.dfinal_sum_of_keys = nullptr, args.dinitial_sum_of_keys = nullptr, args.out = nullptr;
    }
    std::vector<const Array *> arrays() const {
        return {&p.q,
                &p.k,
                &p.v,
                &p.log_decay,
                &p.initial_state,
                &p.initial_keys,
                &out,
                &p.dout,
                &p.dfinal_state,
                &p.dfinal_keys,
                &p.dq,
                &p.dk,
                &p.dv,
                &p.dlog_decay,
                &p.dinitial_state,
                &p.dinitial_keys,
                &inside,
                &memory};
    }
};

struct Case {
    std::string name;
    holdfast_status status;
    std::string text;  // part of what the library says
    std::function<void(Call &)> spoil;
};
void PrintTo(const Case &c, std::ostream *stream) { *stream << c.name; }

std::vector<Case> cases() {
    constexpr holdfast_status invalid = HOLDFAST_INVALID_ARGUMENT, unsupported = HOLDFAST_UNSUPPORTED;
    std::vector<Case> list;
    auto add = [&](const std::string &name, holdfast_status status, const std::string &text,
                   std::function<void(Call &)> spoil) { list.push_back({name, status, text, std::move(spoil)}); };

    // ---- States that the forward kept.
    add("states_without_interval", invalid, "state_interval is 0 and states is given; expected at least 1",
        [](Call &c) { c.give_states(), c.args.state_interval = 0; });
    add("interval_without_states", invalid, "state_interval is 2 and states is NULL; expected 0",
        [](Call &c) { c.give_states(), c.args.states = nullptr; });
    add("states_of_another_interval", invalid,
        "states [M, Hk, D, V] has M = 8; expected 6, of each sequence T / state_interval, rounded up, and one more",
        [](Call &c) { c.give_states(), c.args.state_interval = 3; });
    add("states_of_normalized", unsupported,
        "states is given and out, of degree 1, is normalized; expected degree 1 without normalization, or NULL",
        [](Call &c) { c.args.states = &c.states, c.args.state_interval = 2; });
    add("dq_in_states", invalid, "dq overlaps states in memory; expected separate memory",
        [](Call &c) { c.give_states(), c.tensor("dq").data = c.states.data; });

    // ---- The struct, and what goes through the checks of holdfast_forward.
    for (size_t size : {(size_t)0, sizeof(void *), offsetof(holdfast_backward_args, cu_seqlens)})
        add("struct_size_" + std::to_string(size), invalid,
            "args.struct_size is " + std::to_string(size) + "; expected sizeof(holdfast_backward_args)",
            [=](Call &c) { c.args.struct_size = size; });
    add("scale_nan", invalid, "scale is nan; expected a finite number",
        [](Call &c) { c.args.scale = std::numeric_limits<float>::quiet_NaN(); });
    add("chunk_size_negative", invalid, "chunk_size is -1; expected at least 0", [](Call &c) { c.args.chunk_size = -1; });
    add("degree_5", invalid, "degree is 5; expected 0 to 4", [](Call &c) { c.args.degree = 5; });
    add("normalize_3", invalid, "normalize is 3; expected 0 to 2", [](Call &c) { c.args.normalize = 3; });
    add("form_4", invalid, "form is 4; expected 0 to 3", [](Call &c) { c.args.form = 4; });
    add("state_layout_2", invalid, "state_layout is 2; expected 0 to 1", [](Call &c) { c.args.state_layout = 2; });
    add("expansion_2", invalid, "expansion is 2; expected 0 to 1", [](Call &c) { c.args.expansion = 2; });
    add("log_decay_positive", invalid, "log_decay[1, 2, 0] is 0.5; expected a number <= 0",
        [](Call &c) { c.p.log_decay({1, 2, 0}) = 0.5; });
    add("states_of_other_degree", invalid, "initial_state [N, Hk, D, V] has D = 4; expected 10, the size of q's K features",
        [](Call &c) { c.args.degree = 2; });
    add("packed_states_of_batch_entries", invalid,
        "dfinal_state [N, Hk, D, V] has N = 1; expected 2, the sequences of cu_seqlens", [](Call &c) {
            for (const std::string &name : Call::names()) {
                const bool of_sequences = name.find("state") != std::string::npos || name.find("sum") != std::string::npos;
                c.tensor(name).shape[0] = of_sequences ? 2 : 1;
            }
            c.args.cu_seqlens = &c.cu_seqlens, c.tensor("dfinal_state").shape[0] = 1;
        });
    add("initial_state_without_its_sum", invalid,
        "initial_sum_of_keys is NULL and initial_state is given; expected both or neither",
        [](Call &c) { c.args.initial_sum_of_keys = nullptr; });

    // ---- Missing tensors.
    for (const auto &[name, shape] : std::map<std::string, const char *>{
             {"q", "[B, T, H, K]"}, {"k", "[B, T, Hk, K]"}, {"v", "[B, T, Hk, V]"}, {"out", "[B, T, H, V]"}}) {
        const std::string who = name;
        add(who + "_null", invalid, who + " is NULL; expected a tensor " + shape, [=](Call &c) {
            (who == "q" ? c.args.q : who == "k" ? c.args.k : who == "v" ? c.args.v : c.args.out) = nullptr;
        });
    }
    add("dlog_decay_without_log_decay", invalid, "dlog_decay is given and log_decay is NULL; expected both, or dlog_decay NULL",
        [](Call &c) { c.args.log_decay = nullptr; });
    add("dlog_decay_per_head_of_decay_per_token", invalid, "dlog_decay has 1 dimensions; expected 3, [B, T, Hk]",
        [](Call &c) { c.tensor("dlog_decay").ndim = 1, c.tensor("dlog_decay").shape[0] = H; });
    add("dlog_decay_per_token_of_decay_per_head", invalid, "dlog_decay has 3 dimensions; expected 1, [Hk]",
        [](Call &c) { c.decay_per_head(), c.tensor("dlog_decay").ndim = 3; });
    add("dlog_decay_per_head_of_other_heads", invalid, "dlog_decay [Hk] has Hk = 2; expected 3, that of log_decay",
        [](Call &c) { c.decay_per_head(), c.tensor("dlog_decay").shape[0] = 2; });
    for (const char *name : {"dfinal_sum_of_keys", "dinitial_sum_of_keys"}) {
        const std::string who = name;
        add(who + "_without_sum", invalid, who + " is given and out, of degree 1, is not normalized; expected NULL",
            [=](Call &c) {
                c.plain();
                if (who[1] == 'f')
                    c.args.dfinal_sum_of_keys = &c.tensor(who);
                else
                    c.args.dinitial_sum_of_keys = &c.tensor(who);
            });
    }

    // ---- Each tensor by itself: those that holdfast_forward does not have.
    const std::map<std::string, std::string> axes = {{"dout", "BTHV"},
                                                     {"dfinal_state", "NHDV"},
                                                     {"dfinal_sum_of_keys", "NHD"},
                                                     {"dq", "BTHK"},
                                                     {"dk", "BThK"},
                                                     {"dv", "BThV"},
                                                     {"dlog_decay", "BTh"},
                                                     {"dinitial_state", "NHDV"},
                                                     {"dinitial_sum_of_keys", "NHD"}};
    const std::vector<std::string> outputs(Call::names().begin() + 10, Call::names().end());
    for (const auto &[name, letters] : axes) {
        const std::string who = name;
        const int rank = (int)letters.size();
        const bool rows = who == "dout" || who.size() == 2;
        auto add_one = [&](const std::string &what, holdfast_status status, const std::string &text,
                           std::function<void(DLTensor &)> spoil) {
            add(who + "_" + what, status, who + " " + text, [=](Call &c) { spoil(c.tensor(who)); });
        };
        add_one("data_null", invalid, "has NULL data; expected memory for shape [", [](DLTensor &x) { x.data = nullptr; });
        add_one("shape_null", invalid, "has a NULL shape", [](DLTensor &x) { x.shape = nullptr; });
        add_one("rank", invalid, "has 2 dimensions; expected " + std::to_string(rank) + ", [", [](DLTensor &x) { x.ndim = 2; });
        add_one("float64", unsupported, "has dtype float64; expected float32", [](DLTensor &x) { x.dtype.bits = 64; });
        add_one("float16", rows ? invalid : unsupported,
                std::string("has dtype float16; expected float32") + (rows ? ", that of q" : ""),
                [](DLTensor &x) { x.dtype.bits = 16; });
        add_one("device", unsupported, "is on device type 10; expected that of a backend of this build: 1 (cpu)",
                [](DLTensor &x) { x.device.device_type = kDLROCM; });
        for (int axis = 0; axis < rank; axis++) {
            const std::string at = std::string("_on_") + letters[axis];
            for (int64_t by : {-1, 1})
                add_one((by < 0 ? "less" : "more") + at, invalid, "[", [=](DLTensor &x) { x.shape[axis] += by; });
            if (std::count(outputs.begin(), outputs.end(), who) && axis < rank - 1)
                add_one("elements_share_memory" + at, invalid,
                        "has stride 0 on axis " + std::to_string(axis) + ", so that its elements share memory",
                        [=](DLTensor &x) { x.strides[axis] = 0; });
        }
        if (who != "dlog_decay")
            add_one("row_stride", invalid, "has stride 2 on its last axis; expected 1",
                    [=](DLTensor &x) { x.strides[rank - 1] = 2; });
    }

    // ---- Strides that kernels have no room for.
    for (const std::string who : {"dout", "dq", "dk", "dv", "dlog_decay", "dfinal_state", "dinitial_state"}) {
        const int axis = who.find("state") == std::string::npos ? 1 : 2;
        for (bool plain : {false, true})
            add(who + (plain ? "_stride_too_large_of_degree_1" : "_stride_too_large"), unsupported,
                who + " has stride 1073741824 on axis " + std::to_string(axis) + "; expected at most ", [=](Call &c) {
                    if (plain) c.plain();
                    c.place_far(c.tensor(who));
                    c.tensor(who).strides[axis] = 1073741824;
                });
    }

    // ---- Overlap.
    for (const std::string &output : outputs)
        for (const std::string &other : Call::names()) {
            if (other == output) continue;
            for (int64_t offset : {0, 1}) {
                // The same place is the in-place update of a state's gradient.
                const bool in_place = output.substr(0, 4) == "dini" && other == "dfinal" + output.substr(8);
                if (offset == 0 && in_place) continue;
                add(output + "_overlaps_" + other + "_at_" + std::to_string(offset), invalid, " overlaps ", [=](Call &c) {
                    c.place(c.tensor(other), 1024);
                    c.place(c.tensor(output), 1024 + offset);
                });
            }
        }
    return list;
}

class BadBackwardArgument : public testing::TestWithParam<Case> {};

TEST_P(BadBackwardArgument, IsNamedAndNothingIsWritten) {
    Context context;
    Call call;
    expect_refused(GetParam(), context, call, [&] { return holdfast_backward(context, &call.args); });
}

INSTANTIATE_TEST_SUITE_P(, BadBackwardArgument, testing::ValuesIn(cases()), [](const auto &info) { return info.param.name; });

TEST(BackwardArgs, WhatIsNoError) {
    const std::pair<const char *, std::function<void(Call &)>> good[] = {
        {"nothing changed", [](Call &) {}},
        {"plain", [](Call &c) { c.plain(); }},
        {"states", [](Call &c) { c.give_states(); }},
        {"plain, with out", [](Call &c) { c.plain(), c.args.out = &c.tensor("out"); }},
        {"nothing wanted",
         [](Call &c) {
             c.args.dq = c.args.dk = c.args.dv = c.args.dlog_decay = c.args.dinitial_state = c.args.dinitial_sum_of_keys =
                 nullptr;
         }},
        {"no gradients of states", [](Call &c) { c.args.dfinal_state = c.args.dfinal_sum_of_keys = nullptr; }},
        {"one gradient of a state", [](Call &c) { c.args.dfinal_state = nullptr, c.args.dinitial_sum_of_keys = nullptr; }},
        {"no decay", [](Call &c) { c.args.log_decay = nullptr, c.args.dlog_decay = nullptr; }},
        {"decay per head", [](Call &c) { c.decay_per_head(); }},
        {"inputs overlap", [](Call &c) { c.place(c.tensor("q"), 0), c.place(c.tensor("k"), 1), c.place(c.tensor("dout"), 2); }},
        {"gradients of states in place",
         [](Call &c) {
             c.place(c.tensor("dfinal_state"), 0), c.place(c.tensor("dinitial_state"), 0);
             c.place(c.tensor("dfinal_sum_of_keys"), 1024), c.place(c.tensor("dinitial_sum_of_keys"), 1024);
         }},
        {"one head of keys", [](Call &c) {
             for (const std::string &name : Call::names()) {
                 const bool of_queries = name == "q" || name == "dq" || name == "out" || name == "dout";
                 const bool of_sequences = name.find("state") != std::string::npos || name.find("sum") != std::string::npos;
                 if (!of_queries) c.tensor(name).shape[of_sequences ? 1 : 2] = 1;
             }
         }}};
    for (const auto &[name, change] : good) {
        SCOPED_TRACE(name);
        Context context;
        Call call;
        change(call);
        EXPECT_EQ(holdfast_backward(context, &call.args), HOLDFAST_OK) << context.error();
        size_t bytes = 1;
        EXPECT_EQ(holdfast_backward_workspace_size(context, &call.args, &bytes), HOLDFAST_OK) << context.error();
        EXPECT_EQ(bytes, 0u);
    }
}

TEST(BackwardArgs, Null) {
    Context context;
    EXPECT_EQ(holdfast_backward(context, nullptr), HOLDFAST_INVALID_ARGUMENT);
    EXPECT_EQ(context.error(), "args is NULL; expected a holdfast_backward_args");
    Call call;
    EXPECT_EQ(holdfast_backward_workspace_size(context, &call.args, nullptr), HOLDFAST_INVALID_ARGUMENT);
    EXPECT_EQ(context.error(), "bytes is NULL; expected a size_t to write to");
}

TEST(BackwardArgs, OfALaterVersion) {
    struct {
        holdfast_backward_args args;
        unsigned char more[24];
    } later = {};
    Context context;
    Call call;
    later.args = call.args, later.args.struct_size = sizeof later;
    EXPECT_EQ(holdfast_backward(context, &later.args), HOLDFAST_OK) << context.error();
    later.more[7] = 1;
    EXPECT_EQ(holdfast_backward(context, &later.args), HOLDFAST_UNSUPPORTED);
    EXPECT_NE(context.error().find("is not zero; expected zeros"), std::string::npos) << context.error();
}

}  // namespace
