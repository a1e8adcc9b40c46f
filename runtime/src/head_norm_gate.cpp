// holdfast_head_norm_gate: the kernel of norm and gate, on the CPU on some tokens at a time, on a GPU on as many as it can address.
#include "args.h"
#include "buffers.h"
#include "gpu.h"
#include "tokens.h"

#include <cmath>
#include <functional>

namespace holdfast {
namespace {

struct Call {
    Tensor x, gate, weight, out;  // rank 0: not given
    bool layer_norm;
    float eps;

    void run(Workspace &workspace, const Variant &variant, int64_t b, int64_t t, int64_t tokens) const {
        auto rows = [&](const Tensor &r) {
            return Buffer(r.at<uint8_t>(b, t), halide_type(r.dtype),
                          {{0, (int32_t)r.shape[3], 1}, axis(r.shape[2], r.stride[2]), axis(tokens, r.stride[1]), {0, 1, 0}});
        };
        const bool gated = gate.rank, weighted = weight.rank;
        Buffer x_rows = rows(x), gate_rows = rows(gated ? gate : x), out_rows = rows(out);
        const int64_t V = x.shape[3], H = x.shape[2];
        Buffer weights(weighted ? weight.data : x.data, float32,
                       {{0, (int32_t)V, 1}, axis(H, weight.rank == 2 ? weight.stride[0] : 0)});
        check_returned(std::get<HeadNormGateKernel *>(variant.run)(&workspace, &x_rows, &gate_rows, &weights, layer_norm, gated,
                                                                   weighted, eps, &out_rows),
                       variant, workspace);
    }

    /// On a GPU.
    void issue(const Run &run) const {
        const OnDevice xs(run, x, true), gates(run, gate, true), weights(run, weight, true);
        OnDevice outs(run, out, false);
        const int64_t V = x.shape[3], H = x.shape[2];
        const bool gated = gate.rank, weighted = weight.rank;
        each_part({&xs, &gates, &outs}, [&](int64_t b, int64_t t, int64_t entries, int64_t tokens) {
            auto rows = [&](const OnDevice &r) {
                return View(*r.memory, r.at(b, t), halide_type(r.t.dtype),
                            {{0, (int32_t)V, 1},
                             {0, (int32_t)H, narrow(r.t, 2, H)},
                             {0, (int32_t)tokens, narrow(r.t, 1, tokens)},
                             {0, (int32_t)entries, narrow(r.t, 0, entries)}});
            };
            View x_rows = rows(xs), gate_rows = rows(gated ? gates : xs), out_rows = rows(outs);
            View weight_rows(weighted ? *weights.memory : *xs.memory, weighted ? weights.start : xs.start, float32,
                             {{0, (int32_t)V, 1}, {0, (int32_t)H, weight.rank == 2 ? narrow(weights.t, 0, H) : 0}});
            run.check(run.variant.name,
                      std::get<HeadNormGateKernel *>(run.variant.run)(&run.workspace, &x_rows, &gate_rows, &weight_rows,
                                                                      layer_norm, gated, weighted, eps, &out_rows));
        });
        outs.fetch(run, out);
    }
};

Call checked_call(const holdfast_head_norm_gate_args &args) {
    const TensorSpec x_spec{"x", "BTHV", TensorSpec::floats}, gate_spec{"gate", "BTHV", TensorSpec::floats},
        out_spec{"out", "BTHV", TensorSpec::floats};
    Call call{};
    call.x = check_tensor(x_spec, args.x);
    if (args.gate) call.gate = check_tensor(gate_spec, args.gate);
    call.out = check_tensor(out_spec, args.out);
    const Tensor &x = call.x, &out = call.out;
    if (x.shape[3] < 1) fail(HOLDFAST_INVALID_ARGUMENT, "x [B, T, H, V] has V = 0; expected at least 1");
    for (const auto &[spec, tensor] : {std::pair{&gate_spec, &call.gate}, std::pair{&out_spec, &call.out}}) {
        if (!tensor->rank) continue;
        for (int n = 0; n < 4; n++) check_extent(*spec, *tensor, n, x.shape[n], "that of x");
        check_same_dtype(*tensor, x), check_rows(*tensor), check_same_device(*tensor, x);
    }
    check_rows(x);
    if (args.weight) {
        const bool shared = args.weight->ndim == 1;
        const TensorSpec spec{"weight", shared ? "V" : "HV"};
        if (!shared && args.weight->ndim != 2)
            fail(HOLDFAST_INVALID_ARGUMENT, "weight has ", args.weight->ndim, " dimensions; expected 1, [V], or 2, [H, V]");
        call.weight = check_tensor(spec, args.weight);
        for (int n = 0; n < call.weight.rank; n++)
            check_extent(spec, call.weight, n, x.shape[n + (shared ? 3 : 2)], "that of x");
        check_rows(call.weight), check_same_device(call.weight, x);
        check_no_overlap(out, call.weight);
    }
    check_distinct_elements(out);
    for (const Tensor *input : {&call.x, &call.gate})
        if (input->rank && !same_elements(out, *input)) check_no_overlap(out, *input);

    if (args.norm != HOLDFAST_NORM_RMS && args.norm != HOLDFAST_NORM_LAYER)
        fail(HOLDFAST_INVALID_ARGUMENT, "norm is ", args.norm, "; expected HOLDFAST_NORM_RMS, 0, or HOLDFAST_NORM_LAYER, 1");
    if (!(args.eps >= 0) || !std::isfinite(args.eps))
        fail(HOLDFAST_INVALID_ARGUMENT, "eps is ", args.eps, "; expected a finite number of at least 0");
    call.layer_norm = args.norm == HOLDFAST_NORM_LAYER, call.eps = args.eps;
    return call;
}

}  // namespace
}  // namespace holdfast

using namespace holdfast;

extern "C" holdfast_status holdfast_head_norm_gate(holdfast_context *context, const holdfast_head_norm_gate_args *args) {
    return guarded(context, [&](holdfast_context &c) {
        constexpr size_t first_version = offsetof(holdfast_head_norm_gate_args, eps) + sizeof(float);
        Call call = checked_call(checked_args(args, "holdfast_head_norm_gate_args", first_version));
        const Choice choice = choose_backend(c, home_of(call.x));
        const Variant &variant = variant_for("head_norm_gate", call.x, choice);
        if (call.weight.rank == 2) Tokens::check_axis(call.weight, 0);
        if (choice.backend != Backend::cpu) {
            announce(c, "head_norm_gate", variant, choice.why, call.x);
            const GpuCall on_gpu{
                variant, {&call.x, &call.gate, &call.weight, &call.out}, [&](const Run &run) { call.issue(run); }};
            if (!call.x.empty()) on_gpu.run(c);
            return;
        }
        const Tensor given = call.x;
        const Rows rows(&call.x, &call.out, call.gate.rank ? &call.gate : nullptr);
        const Tokens tokens(rows);
        announce(c, "head_norm_gate", variant, choice.why, given, tokens.pieces());
        if (!tokens.pieces()) return;
        const auto work = [&](Workspace &workspace, int64_t n) {
            tokens.each(n, [&](int64_t b, int64_t t, int64_t count) { call.run(workspace, variant, b, t, count); });
        };
        c.for_each(tokens.pieces(), std::cref(work));
    });
}
