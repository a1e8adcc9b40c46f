// holdfast_rotate and its gradient: on the CPU the rotation kernel on some tokens at a time, whose positions are written out for it;
// on a GPU on as many as it can address.
#include "args.h"
#include "buffers.h"
#include "gpu.h"
#include "tokens.h"

#include <cmath>
#include <functional>
#include <limits>

namespace holdfast {
namespace {

/// Where tokens stand: offset + t, or integers of the caller.
struct Positions {
    const Tensor given;         // rank 0: not given
    int64_t offset, stride[2];  // along b and t; not given: how much a position grows

    int64_t at(int64_t b, int64_t t) const {
        const int64_t n = b * stride[0] + t * stride[1];
        if (!given.rank) return offset + n;
        const char *element = given.data + n * given.dtype.bytes();
        return given.dtype == i64 ? *(const int64_t *)element : *(const int32_t *)element;
    }
};

struct Call {
    Tensor x, out, theta;
    bool interleaved, backward;
    Positions positions;

    Buffer rows(const Tensor &t, int64_t tokens) const {
        const int64_t pairs = t.shape[3] / 2;
        return {nullptr,
                halide_type(t.dtype),
                {{0, (int32_t)pairs, interleaved ? 2 : 1},
                 {0, 2, interleaved ? 1 : (int32_t)pairs},
                 axis(t.shape[2], t.stride[2]),
                 axis(tokens, t.stride[1]),
                 {0, 1, 0}}};
    }

    void run(Workspace &workspace, const Variant &variant, int64_t b, int64_t t, int64_t tokens, int64_t *memory) const {
        for (int64_t n = 0; n < tokens; n++) memory[n] = positions.at(b, t + n);
        Buffer x_rows = rows(x, tokens), out_rows = rows(out, tokens);
        x_rows.host = x.at<uint8_t>(b, t), out_rows.host = out.at<uint8_t>(b, t);
        Buffer angles(theta.data, float32, {{0, (int32_t)theta.shape[0], 1}});
        Buffer position(memory, uint32, {{0, 2, 1}, {0, (int32_t)tokens, 2}, {0, 1, 0}});
        check_returned(
            std::get<RotateKernel *>(variant.run)(&workspace, &x_rows, &angles, &position, 64, 0, 0, backward, &out_rows),
            variant, workspace);
    }

    /// On a GPU. Positions that are not given are counted by the kernel.
    void issue(const Run &run) const {
        const OnDevice xs(run, x, true), angles(run, theta, true), given(run, positions.given, true);
        OnDevice outs(run, out, false);
        const int64_t K = x.shape[3], H = x.shape[2];
        const bool counted = !given.t.rank;
        const int32_t bits = counted ? 0 : given.t.dtype.dl.bits, words = bits / 32;
        each_part({&xs, &outs, &given}, [&](int64_t b, int64_t t, int64_t entries, int64_t tokens) {
            auto rows = [&](const OnDevice &r) {
                return View(*r.memory, r.at(b, t), halide_type(r.t.dtype),
                            {{0, (int32_t)(K / 2), interleaved ? 2 : 1},
                             {0, 2, interleaved ? 1 : (int32_t)(K / 2)},
                             {0, (int32_t)H, narrow(r.t, 2, H)},
                             {0, (int32_t)tokens, narrow(r.t, 1, tokens)},
                             {0, (int32_t)entries, narrow(r.t, 0, entries)}});
            };
            View x_rows = rows(xs), out_rows = rows(outs);
            View theta_row(*angles.memory, angles.start, float32, {{0, (int32_t)(K / 2), 1}});
            const bool shared = given.t.rank == 1;
            const int32_t step = counted ? 0 : words * narrow(given.t, shared ? 0 : 1, tokens);
            View position(counted ? *angles.memory : *given.memory,
                          counted  ? angles.start
                          : shared ? given.at(t)
                                   : given.at(b, t),
                          uint32,
                          {{0, 2, words == 2},
                           {0, (int32_t)tokens, step},
                           {0, (int32_t)entries, counted || shared ? 0 : words * narrow(given.t, 0, entries)}});
            const uint64_t start = (uint64_t)positions.offset + (uint64_t)t;
            run.check(run.variant.name,
                      std::get<RotateKernel *>(run.variant.run)(&run.workspace, &x_rows, &theta_row, &position, bits,
                                                                (uint32_t)start, (uint32_t)(start >> 32), backward, &out_rows));
        });
        outs.fetch(run, out);
    }
};

/// A rotation, or its gradient: from what is called x or dout, by "that of x", to out or dx.
struct Names {
    const char *call, *x, *of_x, *out;
};

Positions checked_positions(const holdfast_rotate_args &args, const Names &names, const Tensor &x) {
    const int64_t T = x.shape[1];
    if (!args.positions) {
        if (T && args.offset > std::numeric_limits<int64_t>::max() - (T - 1))
            fail(HOLDFAST_INVALID_ARGUMENT, "offset is ", args.offset,
                 "; expected positions offset + t that fit 64 bits, for T = ", T);
        return {{}, args.offset, {0, 1}};
    }
    if (args.offset)
        fail(HOLDFAST_INVALID_ARGUMENT, "offset is ", args.offset, " and positions are given; expected an offset of 0");
    const bool shared = args.positions->ndim == 1;
    const TensorSpec spec{"positions", shared ? "T" : "BT", TensorSpec::integers};
    if (!shared && args.positions->ndim != 2)
        fail(HOLDFAST_INVALID_ARGUMENT, "positions has ", args.positions->ndim, " dimensions; expected 1, [T], or 2, [B, T]");
    const Tensor given = check_tensor(spec, args.positions);
    for (int n = 0; n < given.rank; n++) check_extent(spec, given, n, x.shape[shared ? 1 : n], names.of_x);
    return {given, 0, {shared ? 0 : given.stride[0], given.stride[given.rank - 1]}};
}

Call checked_call(const holdfast_rotate_args &args, const Names &names, bool backward) {
    const TensorSpec x_spec{names.x, "BTHK", TensorSpec::floats}, out_spec{names.out, "BTHK", TensorSpec::floats},
        theta_spec{"theta", "J"};
    Tensor x = check_tensor(x_spec, args.x), out = check_tensor(out_spec, args.out);
    const int64_t K = x.shape[3];
    if (K < 2 || K % 2)
        fail(HOLDFAST_INVALID_ARGUMENT, names.x, " [B, T, H, K] has K = ", K,
             "; expected pairs of features, an even number of them");
    for (int n = 0; n < 4; n++) check_extent(out_spec, out, n, x.shape[n], names.of_x);
    check_same_dtype(out, x);
    check_rows(x), check_rows(out);
    const Tensor theta = check_tensor(theta_spec, args.theta);
    if (theta.shape[0] != K / 2)
        fail(HOLDFAST_INVALID_ARGUMENT, "theta has ", theta.shape[0], " elements; expected ", K / 2, ", one for each pair of ",
             names.x);
    check_rows(theta);
    Positions positions = checked_positions(args, names, x);

    check_distinct_elements(out);
    if (!same_elements(out, x)) check_no_overlap(out, x);
    check_no_overlap(out, theta);
    if (positions.given.rank) check_no_overlap(out, positions.given), check_same_device(positions.given, x);
    check_same_device(out, x), check_same_device(theta, x);

    if (args.interleaved != 0 && args.interleaved != 1)
        fail(HOLDFAST_INVALID_ARGUMENT, "interleaved is ", args.interleaved, "; expected 0 or 1");
    for (int64_t j = 0; j < K / 2 && theta.on_host(); j++) {
        const float value = ((const float *)theta.data)[j];
        if (!std::isfinite(value)) fail(HOLDFAST_INVALID_ARGUMENT, "theta[", j, "] is ", value, "; expected a finite number");
    }
    return {x, out, theta, args.interleaved != 0, backward, positions};
}

void run(holdfast_context &c, const Names &names, Call call) {
    const Choice choice = choose_backend(c, home_of(call.x));
    const Variant &variant = variant_for("rotate", call.x, choice);
    if (choice.backend != Backend::cpu) {
        announce(c, names.call, variant, choice.why, call.x);
        const GpuCall on_gpu{
            variant, {&call.x, &call.theta, &call.positions.given, &call.out}, [&](const Run &run) { call.issue(run); }};
        if (!call.x.empty()) on_gpu.run(c);
        return;
    }
    const Tensor given = call.x;
    const Rows rows(&call.x, &call.out);
    if (rows.turned) std::swap(call.positions.stride[0], call.positions.stride[1]);
    const Tokens tokens(rows);
    announce(c, names.call, variant, choice.why, given, tokens.pieces());
    if (!tokens.pieces()) return;
    const auto work = [&](Workspace &workspace, int64_t n) {
        const Scratch positions(workspace, 2 * Tokens::most_at_once);
        tokens.each(n, [&](int64_t b, int64_t t, int64_t count) {
            call.run(workspace, variant, b, t, count, (int64_t *)positions.floats());
        });
    };
    c.for_each(tokens.pieces(), std::cref(work));
}

}  // namespace
}  // namespace holdfast

using namespace holdfast;

extern "C" holdfast_status holdfast_rotate(holdfast_context *context, const holdfast_rotate_args *args) {
    return guarded(context, [&](holdfast_context &c) {
        constexpr size_t first_version = offsetof(holdfast_rotate_args, interleaved) + sizeof(int32_t);
        const Names names{"rotate", "x", "that of x", "out"};
        run(c, names, checked_call(checked_args(args, "holdfast_rotate_args", first_version), names, false));
    });
}

extern "C" holdfast_status holdfast_rotate_backward(holdfast_context *context, const holdfast_rotate_backward_args *args) {
    return guarded(context, [&](holdfast_context &c) {
        constexpr size_t first_version = offsetof(holdfast_rotate_backward_args, interleaved) + sizeof(int32_t);
        const Names names{"rotate_backward", "dout", "that of dout", "dx"};
        const holdfast_rotate_backward_args given = checked_args(args, "holdfast_rotate_backward_args", first_version);
        holdfast_rotate_args same{};
        same.x = given.dout, same.theta = given.theta, same.positions = given.positions, same.out = given.dx;
        same.offset = given.offset, same.interleaved = given.interleaved;
        run(c, names, checked_call(same, names, true));
    });
}
