// What holdfast_rotate and holdfast_head_norm_gate, and their gradients, say to bad arguments: each in words, and nothing is written.
#include "../tokens.h"
#include "bad_argument.h"

#include <cstddef>
#include <functional>
#include <limits>

namespace {
using namespace test;

constexpr int64_t B = 2, T = 3, H = 2, K = 6;

/// Good calls, to be spoilt. `memory` is one more array to point into.
struct Call {
    Random random;
    Array x = Array({B, T, H, K}).fill(random), gate = Array({B, T, H, K}).fill(random), out = Array({B, T, H, K}).forget();
    Array theta = Array({K / 2}).fill(random), weight = Array({H, K}).fill(random);
    Array dout = Array({B, T, H, K}).fill(random), dx = Array({B, T, H, K}).forget(), dgate = Array({B, T, H, K}).forget();
    Array dweight = Array({H, K}).forget();
    Array memory = Array({4096}).fill(-1.0f);
    std::vector<int64_t> positions = std::vector<int64_t>(B * T, 4);
    int64_t positions_shape[3] = {B, T, 1}, positions_stride[3] = {T, 1, 1};
    std::unique_ptr<Reserved> far;

    struct Views {  // of tensors that live as long
        Tensor tensors[9];
        DLTensor x, gate, out, theta, weight, positions, dout, dx, dgate, dweight;
    } v;
    holdfast_rotate_args rotate;
    holdfast_rotate_backward_args rotate_backward;
    holdfast_head_norm_gate_args norm;
    holdfast_head_norm_gate_backward_args norm_backward;

    Call() {
        v.tensors[0] = x, v.tensors[1] = gate, v.tensors[2] = out, v.tensors[3] = theta, v.tensors[4] = weight;
        v.x = v.tensors[0].dl(), v.gate = v.tensors[1].dl(), v.out = v.tensors[2].dl(), v.theta = v.tensors[3].dl();
        v.weight = v.tensors[4].dl();
        v.tensors[5] = dout, v.tensors[6] = dx, v.tensors[7] = dgate, v.tensors[8] = dweight;
        v.dout = v.tensors[5].dl(), v.dx = v.tensors[6].dl(), v.dgate = v.tensors[7].dl(), v.dweight = v.tensors[8].dl();
        v.positions = {positions.data(), {kDLCPU, 0}, 2, {kDLInt, 64, 1}, positions_shape, positions_stride, 0};
        rotate = {sizeof rotate, &v.x, &v.theta, &v.positions, &v.out, 0, 0};
        rotate_backward = {sizeof rotate_backward, &v.dout, &v.theta, &v.positions, &v.dx, 0, 0};
        norm = {sizeof norm, &v.x, &v.gate, &v.weight, &v.out, HOLDFAST_NORM_LAYER, 1e-6f};
        norm_backward = {sizeof norm_backward, &v.x, &v.gate, &v.weight, &v.dout, &v.dx, &v.dgate, &v.dweight,
                         HOLDFAST_NORM_LAYER,  1e-6f};
    }
    Call(const Call &) = delete;

    /// Put a compact tensor of that shape at `offset` of `memory`.
    void place(DLTensor &t, int64_t offset) { t.data = memory.data() + offset, t.strides = nullptr; }
    std::vector<const Array *> arrays() const {
        return {&x, &gate, &out, &theta, &weight, &memory, &dout, &dx, &dgate, &dweight};
    }
};

enum Function { of_rotate, of_rotate_backward, of_norm, of_norm_backward };
constexpr const char *functions[] = {"rotate", "rotate_backward", "head_norm_gate", "head_norm_gate_backward"};

struct Case {
    std::string name;
    Function function;
    holdfast_status status;
    std::string text;  // part of what the library says
    std::function<void(Call &)> spoil;
};
void PrintTo(const Case &c, std::ostream *stream) { *stream << c.name; }

std::vector<Case> cases() {
    constexpr holdfast_status invalid = HOLDFAST_INVALID_ARGUMENT, unsupported = HOLDFAST_UNSUPPORTED;
    constexpr int64_t huge = std::numeric_limits<int64_t>::max();
    const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<Case> list;
    Function function = of_rotate;
    auto add = [&](const std::string &name, holdfast_status status, const std::string &text,
                   std::function<void(Call &)> spoil) {
        list.push_back({std::string(functions[function]) + "_" + name, function, status, text, std::move(spoil)});
    };
    auto add_tensor = [&](const std::string &who, const std::string &axes, DLTensor Call::Views::*view) {
        const int rank = (int)axes.size();
        auto add_one = [&](const std::string &what, holdfast_status status, const std::string &text,
                           std::function<void(DLTensor &)> spoil) {
            add(who + "_" + what, status, who + " " + text, [=](Call &c) { spoil(c.v.*view); });
        };
        add_one("data_null", invalid, "has NULL data; expected memory for shape [", [](DLTensor &t) { t.data = nullptr; });
        add_one("rank", invalid, "has 5 dimensions; expected ", [](DLTensor &t) { t.ndim = 5; });
        add_one("dtype", unsupported,
                "has dtype " +
                    std::string(who == "positions" ? "float64; expected int32 or int64" : "float64; expected float32"),
                [](DLTensor &t) { t.dtype = {kDLFloat, 64, 1}; });
        add_one("device", unsupported, "is on device type 10; expected that of a backend of this build: 1 (cpu)",
                [](DLTensor &t) { t.device.device_type = kDLROCM; });
        for (int axis = 0; axis < rank; axis++) {
            const std::string at = std::string("_on_") + axes[axis];
            add_one("extent_negative" + at, invalid, "has shape [", [=](DLTensor &t) { t.shape[axis] = -1; });
            add_one("stride_most" + at, invalid, "has ", [=](DLTensor &t) { t.strides[axis] = huge; });
            if (who != "x" && who != "theta" && !(who == "dout" && function == of_rotate_backward))
                add_one("extent_other" + at, invalid,
                        (rank == 4      ? "[B, T, H, "
                         : rank == 1    ? "["
                         : axes == "BT" ? "[B, T"
                                        : "[H, V"),
                        [=](DLTensor &t) { t.shape[axis]--; });
            if ((who == "out" || (who[0] == 'd' && who != "dout")) && axis < rank - 1)
                add_one("elements_share_memory" + at, invalid,
                        "has stride 0 on axis " + std::to_string(axis) + ", so that its elements share memory",
                        [=](DLTensor &t) { t.strides[axis] = 0; });
        }
        if (who != "positions")
            add_one("row_stride", invalid, "has stride 2 on its last axis; expected 1",
                    [=](DLTensor &t) { t.strides[rank - 1] = 2; });
        const bool turned = function == of_rotate_backward;
        if (rank == 4 && who != (turned ? "dout" : "x"))
            add_one("float16", invalid, std::string("has dtype float16; expected float32, that of ") + (turned ? "dout" : "x"),
                    [](DLTensor &t) { t.dtype.bits = 16; });
    };

    for (size_t size : {(size_t)0, offsetof(holdfast_rotate_args, interleaved)})
        add("struct_size_" + std::to_string(size), invalid,
            "args.struct_size is " + std::to_string(size) + "; expected sizeof(holdfast_rotate_args)",
            [=](Call &c) { c.rotate.struct_size = size; });
    add("x_null", invalid, "x is NULL; expected a tensor [B, T, H, K]", [](Call &c) { c.rotate.x = nullptr; });
    add("theta_null", invalid, "theta is NULL; expected a tensor", [](Call &c) { c.rotate.theta = nullptr; });
    add("out_null", invalid, "out is NULL; expected a tensor [B, T, H, K]", [](Call &c) { c.rotate.out = nullptr; });
    add_tensor("x", "BTHK", &Call::Views::x), add_tensor("out", "BTHK", &Call::Views::out);
    add_tensor("theta", "J", &Call::Views::theta), add_tensor("positions", "BT", &Call::Views::positions);
    add("out_of_another_dtype", invalid, "out has dtype float16; expected float32, that of x",
        [](Call &c) { c.v.out.dtype.bits = 16; });
    add("K_odd", invalid, "x [B, T, H, K] has K = 5; expected pairs of features, an even number of them",
        [](Call &c) { c.v.x.shape[3] = c.v.out.shape[3] = 5; });
    add("K_0", invalid, "x [B, T, H, K] has K = 0; expected pairs", [](Call &c) { c.v.x.shape[3] = c.v.out.shape[3] = 0; });
    add("theta_too_short", invalid, "theta has 2 elements; expected 3, one for each pair of x",
        [](Call &c) { c.v.theta.shape[0] = 2; });
    for (float value : {infinity, nan})
        add(std::string("theta_") + (std::isnan(value) ? "nan" : "inf"), invalid, "theta[1] is ",
            [=](Call &c) { c.theta({1}) = value; });
    add("positions_int16", unsupported, "positions has dtype int16; expected int32 or int64",
        [](Call &c) { c.v.positions.dtype.bits = 16; });
    add("offset_with_positions", invalid, "offset is -1 and positions are given; expected an offset of 0",
        [](Call &c) { c.rotate.offset = -1; });
    add("offset_too_large", invalid, "; expected positions offset + t that fit 64 bits, for T = 3",
        [=](Call &c) { c.rotate.positions = nullptr, c.rotate.offset = huge - 1; });
    add("interleaved_2", invalid, "interleaved is 2; expected 0 or 1", [](Call &c) { c.rotate.interleaved = 2; });
    for (const bool of_theta : {false, true})
        add(of_theta ? "out_overlaps_theta" : "out_overlaps_x", invalid, " in memory; expected separate memory", [=](Call &c) {
            c.place(c.v.out, 1024);
            c.place(of_theta ? c.v.theta : c.v.x, 1026);
        });
    add("out_overlaps_positions", invalid, "out overlaps positions in memory", [](Call &c) {
        c.place(c.v.out, 1024);
        c.place(c.v.positions, 1024);
    });
    add("out_is_x_with_other_strides", invalid, "out overlaps x in memory", [](Call &c) {
        c.place(c.v.out, 1024), c.place(c.v.x, 1024);
        c.v.x.strides = c.positions_stride, c.positions_stride[2] = 1;  // not compact
        static int64_t other[] = {K * H * T, K, K * T, 1};
        c.v.x.strides = other;
    });
    add("heads_too_far_apart", unsupported, "x has stride 1073741824 on axis 2; expected at most 536870912 either way",
        [](Call &c) {
            c.far = std::make_unique<Reserved>((size_t)64 << 30);
            EXPECT_TRUE(*c.far) << "no address space of 64 GB";
            c.v.x.data = c.far->floats();
            c.v.x.strides[2] = 1 << 30;
        });

    function = of_rotate_backward;
    for (size_t size : {(size_t)0, offsetof(holdfast_rotate_backward_args, interleaved)})
        add("struct_size_" + std::to_string(size), invalid,
            "args.struct_size is " + std::to_string(size) + "; expected sizeof(holdfast_rotate_backward_args)",
            [=](Call &c) { c.rotate_backward.struct_size = size; });
    add("dout_null", invalid, "dout is NULL; expected a tensor [B, T, H, K]",
        [](Call &c) { c.rotate_backward.dout = nullptr; });
    add("theta_null", invalid, "theta is NULL; expected a tensor", [](Call &c) { c.rotate_backward.theta = nullptr; });
    add("dx_null", invalid, "dx is NULL; expected a tensor [B, T, H, K]", [](Call &c) { c.rotate_backward.dx = nullptr; });
    add_tensor("dout", "BTHK", &Call::Views::dout), add_tensor("dx", "BTHK", &Call::Views::dx);
    add_tensor("theta", "J", &Call::Views::theta), add_tensor("positions", "BT", &Call::Views::positions);
    add("K_odd", invalid, "dout [B, T, H, K] has K = 5; expected pairs of features, an even number of them",
        [](Call &c) { c.v.dout.shape[3] = c.v.dx.shape[3] = 5; });
    add("theta_too_short", invalid, "theta has 2 elements; expected 3, one for each pair of dout",
        [](Call &c) { c.v.theta.shape[0] = 2; });
    add("theta_nan", invalid, "theta[1] is ", [=](Call &c) { c.theta({1}) = nan; });
    add("positions_too_few", invalid, "positions [B, T] has T = 2; expected 3, that of dout",
        [](Call &c) { c.v.positions.shape[1] = 2; });
    add("offset_with_positions", invalid, "offset is -1 and positions are given; expected an offset of 0",
        [](Call &c) { c.rotate_backward.offset = -1; });
    add("offset_too_large", invalid, "; expected positions offset + t that fit 64 bits, for T = 3",
        [=](Call &c) { c.rotate_backward.positions = nullptr, c.rotate_backward.offset = huge - 1; });
    add("interleaved_2", invalid, "interleaved is 2; expected 0 or 1", [](Call &c) { c.rotate_backward.interleaved = 2; });
    for (const auto &[name, view] : {std::pair<std::string, DLTensor Call::Views::*>{"dout", &Call::Views::dout},
                                     {"theta", &Call::Views::theta},
                                     {"positions", &Call::Views::positions}})
        add("dx_overlaps_" + name, invalid, "dx overlaps " + name + " in memory; expected separate memory",
            [view = view](Call &c) {
                c.place(c.v.dx, 1024);
                c.place(c.v.*view, 1026);
            });

    function = of_norm;
    for (size_t size : {(size_t)0, offsetof(holdfast_head_norm_gate_args, eps)})
        add("struct_size_" + std::to_string(size), invalid,
            "args.struct_size is " + std::to_string(size) + "; expected sizeof(holdfast_head_norm_gate_args)",
            [=](Call &c) { c.norm.struct_size = size; });
    add("x_null", invalid, "x is NULL; expected a tensor [B, T, H, V]", [](Call &c) { c.norm.x = nullptr; });
    add("out_null", invalid, "out is NULL; expected a tensor [B, T, H, V]", [](Call &c) { c.norm.out = nullptr; });
    add_tensor("x", "BTHV", &Call::Views::x), add_tensor("out", "BTHV", &Call::Views::out);
    add_tensor("gate", "BTHV", &Call::Views::gate), add_tensor("weight", "HV", &Call::Views::weight);
    add("weight_float16", unsupported, "weight has dtype float16; expected float32",
        [](Call &c) { c.v.weight.dtype.bits = 16; });
    add("V_0", invalid, "x [B, T, H, V] has V = 0; expected at least 1",
        [](Call &c) { c.v.x.shape[3] = c.v.gate.shape[3] = c.v.out.shape[3] = 0; });
    add("norm_2", invalid, "norm is 2; expected HOLDFAST_NORM_RMS, 0, or HOLDFAST_NORM_LAYER, 1",
        [](Call &c) { c.norm.norm = 2; });
    for (float value : {-1e-6f, infinity, nan})
        add("eps_" + std::string(std::isnan(value) ? "nan"
                                 : value < 0       ? "negative"
                                                   : "inf"),
            invalid, "eps is ", [=](Call &c) { c.norm.eps = value; });
    for (const auto &[name, view] : {std::pair<std::string, DLTensor Call::Views::*>{"x", &Call::Views::x},
                                     {"gate", &Call::Views::gate},
                                     {"weight", &Call::Views::weight}})
        add("out_overlaps_" + name, invalid, "out overlaps " + name + " in memory; expected separate memory",
            [view = view](Call &c) {
                c.place(c.v.out, 1024);
                c.place(c.v.*view, 1026);
            });

    function = of_norm_backward;
    for (size_t size : {(size_t)0, offsetof(holdfast_head_norm_gate_backward_args, eps)})
        add("struct_size_" + std::to_string(size), invalid,
            "args.struct_size is " + std::to_string(size) + "; expected sizeof(holdfast_head_norm_gate_backward_args)",
            [=](Call &c) { c.norm_backward.struct_size = size; });
    add("x_null", invalid, "x is NULL; expected a tensor [B, T, H, V]", [](Call &c) { c.norm_backward.x = nullptr; });
    add("dout_null", invalid, "dout is NULL; expected a tensor [B, T, H, V]", [](Call &c) { c.norm_backward.dout = nullptr; });
    for (const auto &[name, view] : {std::pair<std::string, DLTensor Call::Views::*>{"x", &Call::Views::x},
                                     {"gate", &Call::Views::gate},
                                     {"dout", &Call::Views::dout},
                                     {"dx", &Call::Views::dx},
                                     {"dgate", &Call::Views::dgate}})
        add_tensor(name, "BTHV", view);
    add_tensor("weight", "HV", &Call::Views::weight), add_tensor("dweight", "HV", &Call::Views::dweight);
    add("dgate_without_gate", invalid, "dgate is given and gate is NULL; expected dgate of NULL",
        [](Call &c) { c.norm_backward.gate = nullptr; });
    add("dweight_without_weight", invalid, "dweight is given and weight is NULL; expected dweight of NULL",
        [](Call &c) { c.norm_backward.weight = nullptr; });
    add("dweight_of_another_rank", invalid, "dweight has 1 dimensions; expected 2, [H, V]",
        [](Call &c) { c.v.dweight.ndim = 1; });
    add("dweight_float16", unsupported, "dweight has dtype float16; expected float32",
        [](Call &c) { c.v.dweight.dtype.bits = 16; });
    add("V_0", invalid, "x [B, T, H, V] has V = 0; expected at least 1", [](Call &c) { c.v.x.shape[3] = 0; });
    add("norm_2", invalid, "norm is 2; expected HOLDFAST_NORM_RMS, 0, or HOLDFAST_NORM_LAYER, 1",
        [](Call &c) { c.norm_backward.norm = 2; });
    for (float value : {-1e-6f, infinity, nan})
        add("eps_" + std::string(std::isnan(value) ? "nan"
                                 : value < 0       ? "negative"
                                                   : "inf"),
            invalid, "eps is ", [=](Call &c) { c.norm_backward.eps = value; });
    struct Named {
        std::string name;
        DLTensor Call::Views::*view;
    };
    const Named outputs[] = {{"dx", &Call::Views::dx}, {"dgate", &Call::Views::dgate}, {"dweight", &Call::Views::dweight}};
    const Named inputs[] = {
        {"x", &Call::Views::x}, {"gate", &Call::Views::gate}, {"weight", &Call::Views::weight}, {"dout", &Call::Views::dout}};
    auto overlap = [&](const Named &output, const Named &other, int64_t apart) {
        add(output.name + (apart ? "_overlaps_" : "_is_") + other.name, invalid,
            output.name + " overlaps " + other.name + " in memory; expected separate memory", [=](Call &c) {
                c.place(c.v.*output.view, 1024);
                c.place(c.v.*other.view, 1024 + apart);
            });
    };
    for (const Named &output : outputs)
        for (const Named &input : inputs) overlap(output, input, 2);
    overlap(outputs[0], inputs[3], 0), overlap(outputs[1], inputs[1], 0);
    overlap(outputs[0], outputs[1], 2), overlap(outputs[0], outputs[2], 2), overlap(outputs[1], outputs[2], 2);
    return list;
}

holdfast_status run(const Case &c, Context &context, Call &call) {
    switch (c.function) {
    case of_rotate: return holdfast_rotate(context, &call.rotate);
    case of_rotate_backward: return holdfast_rotate_backward(context, &call.rotate_backward);
    case of_norm: return holdfast_head_norm_gate(context, &call.norm);
    default: return holdfast_head_norm_gate_backward(context, &call.norm_backward);
    }
}

class BadArgumentAround : public testing::TestWithParam<Case> {};

TEST_P(BadArgumentAround, IsNamedAndNothingIsWritten) {
    Context context;
    Call call;
    expect_refused(GetParam(), context, call, [&] { return run(GetParam(), context, call); });
}

INSTANTIATE_TEST_SUITE_P(, BadArgumentAround, testing::ValuesIn(cases()), [](const auto &info) { return info.param.name; });

TEST(AroundArgs, GoodOnesAreTaken) {
    Context context;
    Call call;
    EXPECT_EQ(holdfast_rotate(context, &call.rotate), HOLDFAST_OK) << context.error();
    EXPECT_EQ(holdfast_head_norm_gate(context, &call.norm), HOLDFAST_OK) << context.error();
    EXPECT_EQ(holdfast_rotate(context, nullptr), HOLDFAST_INVALID_ARGUMENT);
    EXPECT_EQ(context.error(), "args is NULL; expected a holdfast_rotate_args");
    EXPECT_EQ(holdfast_head_norm_gate(context, nullptr), HOLDFAST_INVALID_ARGUMENT);
    EXPECT_EQ(context.error(), "args is NULL; expected a holdfast_head_norm_gate_args");
    EXPECT_EQ(holdfast_rotate_backward(context, &call.rotate_backward), HOLDFAST_OK) << context.error();
    EXPECT_EQ(holdfast_head_norm_gate_backward(context, &call.norm_backward), HOLDFAST_OK) << context.error();
    EXPECT_EQ(holdfast_rotate_backward(context, nullptr), HOLDFAST_INVALID_ARGUMENT);
    EXPECT_EQ(context.error(), "args is NULL; expected a holdfast_rotate_backward_args");
    EXPECT_EQ(holdfast_head_norm_gate_backward(context, nullptr), HOLDFAST_INVALID_ARGUMENT);
    EXPECT_EQ(context.error(), "args is NULL; expected a holdfast_head_norm_gate_backward_args");
    holdfast_head_norm_gate_backward_args nothing = {};
    nothing.struct_size = sizeof nothing, nothing.x = &call.v.x, nothing.dout = &call.v.dout;
    EXPECT_EQ(holdfast_head_norm_gate_backward(context, &nothing), HOLDFAST_OK) << context.error();
    for (DLTensor *t : {&call.v.x, &call.v.gate, &call.v.out, &call.v.positions, &call.v.dout, &call.v.dx, &call.v.dgate})
        t->shape[0] = 0, t->data = nullptr;
    EXPECT_EQ(holdfast_rotate_backward(context, &call.rotate_backward), HOLDFAST_OK) << context.error();
    EXPECT_EQ(holdfast_head_norm_gate_backward(context, &call.norm_backward), HOLDFAST_OK) << context.error();
    EXPECT_EQ(holdfast_rotate(context, &call.rotate), HOLDFAST_OK) << context.error();
    EXPECT_EQ(holdfast_head_norm_gate(context, &call.norm), HOLDFAST_OK) << context.error();
}

}  // namespace
