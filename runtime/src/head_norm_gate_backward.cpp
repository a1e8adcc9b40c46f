// holdfast_head_norm_gate_backward: the kernel of the gradient of norm and gate, on the CPU on some tokens at a time, on a GPU on as
// many as it can address. What it sums over the tokens of a call, for the weight, is added up here: on the CPU in double.
#include "args.h"
#include "buffers.h"
#include "gpu.h"
#include "tokens.h"

#include <cmath>
#include <functional>

namespace holdfast {
namespace {

struct Call {
    Tensor x, gate, weight, dout, dx, dgate, dweight;  // rank 0: not given
    bool layer_norm;
    float eps;

    bool shared() const { return weight.rank == 1; }  // by all heads
    int64_t weights() const { return shared() ? 1 : x.shape[2]; }

    /// kernel(...) with conditions, on buffers that stand in for those that are not given.
    int call(const Variant &variant, const void *user_context, Buffer &x_rows, Buffer &gate_rows, Buffer &weight_rows,
             Buffer &dout_rows, bool add, Buffer &dx_rows, Buffer &dgate_rows, Buffer &dweight_rows) const {
        return std::get<HeadNormGateBackwardKernel *>(variant.run)(
            user_context, &x_rows, &gate_rows, &weight_rows, &dout_rows, layer_norm, gate.rank != 0, weight.rank != 0, eps,
            dx.rank != 0, dgate.rank != 0, dweight.rank != 0, add, &dx_rows, &dgate_rows, &dweight_rows);
    }

    /// `sums`: of these tokens, for each weight.
    void run(Workspace &workspace, const Variant &variant, int64_t b, int64_t t, int64_t tokens, float *sums) const {
        auto rows = [&](const Tensor &given) {
            const Tensor &r = given.rank ? given : x;
            return Buffer(r.at<uint8_t>(b, t), halide_type(r.dtype),
                          {{0, (int32_t)r.shape[3], 1}, axis(r.shape[2], r.stride[2]), axis(tokens, r.stride[1]), {0, 1, 0}});
        };
        Buffer x_rows = rows(x), gate_rows = rows(gate), dout_rows = rows(dout), dx_rows = rows(dx), dgate_rows = rows(dgate);
        const int64_t V = x.shape[3], H = x.shape[2];
        Buffer weight_rows(weight.rank ? weight.data : x.data, float32,
                           {{0, (int32_t)V, 1}, axis(H, weight.rank == 2 ? weight.stride[0] : 0)});
        Buffer dweight_rows(sums ? (void *)sums : x.data, float32, {{0, (int32_t)V, 1}, axis(weights(), V)});
        check_returned(
            call(variant, &workspace, x_rows, gate_rows, weight_rows, dout_rows, false, dx_rows, dgate_rows, dweight_rows),
            variant, workspace);
    }

    /// On a GPU.
    void issue(const Run &run) const {
        const OnDevice xs(run, x, true), gates(run, gate, true), weights(run, weight, true), douts(run, dout, true);
        OnDevice dxs(run, dx, false), dgates(run, dgate, false), dweights(run, dweight, false);
        const int64_t V = x.shape[3], H = x.shape[2];
        auto rows_of_weight = [&](const OnDevice &w, int64_t heads) {  // or of any floats, where there is none
            const bool given = w.t.rank;
            return View(given ? *w.memory : *xs.memory, given ? w.start : xs.start, float32,
                        {{0, (int32_t)V, 1}, {0, (int32_t)heads, w.t.rank == 2 ? narrow(w.t, 0, heads) : 0}});
        };
        bool add = false;
        if (!x.empty())
            each_part({&xs, &gates, &douts, &dxs, &dgates}, [&](int64_t b, int64_t t, int64_t entries, int64_t tokens) {
                auto rows = [&](const OnDevice &given) {
                    const OnDevice &r = given.t.rank ? given : xs;
                    return View(*r.memory, r.at(b, t), halide_type(r.t.dtype),
                                {{0, (int32_t)V, 1},
                                 {0, (int32_t)H, narrow(r.t, 2, H)},
                                 {0, (int32_t)tokens, narrow(r.t, 1, tokens)},
                                 {0, (int32_t)entries, narrow(r.t, 0, entries)}});
                };
                View x_rows = rows(xs), gate_rows = rows(gates), dout_rows = rows(douts), dx_rows = rows(dxs),
                     dgate_rows = rows(dgates);
                View weight_rows = rows_of_weight(weights, H), dweight_rows = rows_of_weight(dweights, this->weights());
                run.check(run.variant.name, call(run.variant, &run.workspace, x_rows, gate_rows, weight_rows, dout_rows, add,
                                                 dx_rows, dgate_rows, dweight_rows));
                add = true;
            });
        else if (dweight.rank && !dweight.empty())
            clear(run, View(*dweights.memory, dweights.start, float32,
                            {{0, (int32_t)V, 1},
                             {0, (int32_t)this->weights(), shared() ? 0 : narrow(dweights.t, 0, H)},
                             {0, 1, 0},
                             {0, 1, 0}}));
        dxs.fetch(run, dx), dgates.fetch(run, dgate), dweights.fetch(run, dweight);
    }
};

/// The sums for the weight on the CPU: each piece of the work adds up its own, and these are added up one after the other.
class Sums {
public:
    static constexpr int64_t most_pieces = 256;

    Sums(Workspace &workspace, const Call &call, int64_t pieces)
        : call(call), count(call.weights() * call.x.shape[3]), pieces(pieces),
          memory(workspace, (size_t)std::max<int64_t>(2 * count * pieces, 1)) {
        std::fill_n(of_piece(0), count * pieces, 0.0);
    }
    void add(int64_t piece, const float *sums) {
        double *own = of_piece(piece);
        for (int64_t n = 0; n < count; n++) own[n] += sums[n];
    }
    void store() {
        const int64_t V = call.x.shape[3];
        for (int64_t n = 0; n < count; n++) {
            double sum = 0;
            for (int64_t piece = 0; piece < pieces; piece++) sum += of_piece(piece)[n];
            *(call.shared() ? call.dweight.at(n) : call.dweight.at(n / V, n % V)) = (float)sum;
        }
    }

private:
    const Call &call;
    const int64_t count, pieces;
    const Scratch memory;

    double *of_piece(int64_t piece) const { return (double *)memory.floats() + piece * count; }
};

void run_on_cpu(holdfast_context &c, const Variant &variant, const Call &call, const Tokens &tokens) {
    if (!call.dweight.rank) {
        const auto work = [&](Workspace &workspace, int64_t n) {
            tokens.each(n, [&](int64_t b, int64_t t, int64_t count) { call.run(workspace, variant, b, t, count, nullptr); });
        };
        if (tokens.pieces()) c.for_each(tokens.pieces(), std::cref(work));
        return;
    }
    const auto whole = [&](Workspace &own, int64_t) {
        Sums sums(own, call, tokens.pieces());
        const auto work = [&](Workspace &workspace, int64_t n) {
            const Scratch some(workspace, (size_t)(call.weights() * call.x.shape[3]));
            tokens.each(n, [&](int64_t b, int64_t t, int64_t count) {
                call.run(workspace, variant, b, t, count, some.floats());
                sums.add(n, some.floats());
            });
        };
        if (tokens.pieces()) c.for_each(tokens.pieces(), std::cref(work));
        sums.store();
    };
    c.for_each(1, std::cref(whole));
}

Call checked_call(const holdfast_head_norm_gate_backward_args &args) {
    Call call{};
    const TensorSpec x_spec{"x", "BTHV", TensorSpec::floats};
    call.x = check_tensor(x_spec, args.x);
    const Tensor &x = call.x;
    if (x.shape[3] < 1) fail(HOLDFAST_INVALID_ARGUMENT, "x [B, T, H, V] has V = 0; expected at least 1");
    check_rows(x);
    auto rows = [&](const char *name, const DLTensor *given) {
        const TensorSpec spec{name, "BTHV", TensorSpec::floats};
        const Tensor tensor = check_tensor(spec, given);
        for (int n = 0; n < 4; n++) check_extent(spec, tensor, n, x.shape[n], "that of x");
        check_same_dtype(tensor, x), check_rows(tensor), check_same_device(tensor, x);
        return tensor;
    };
    if (args.gate) call.gate = rows("gate", args.gate);
    call.dout = rows("dout", args.dout);
    if (args.dx) call.dx = rows("dx", args.dx);
    auto check_given = [](const char *gradient, const char *name, const DLTensor *given) {
        if (!given)
            fail(HOLDFAST_INVALID_ARGUMENT, gradient, " is given and ", name, " is NULL; expected ", gradient, " of NULL");
    };
    if (args.dgate) check_given("dgate", "gate", args.gate), call.dgate = rows("dgate", args.dgate);
    if (args.weight) {
        const bool shared = args.weight->ndim == 1;
        if (!shared && args.weight->ndim != 2)
            fail(HOLDFAST_INVALID_ARGUMENT, "weight has ", args.weight->ndim, " dimensions; expected 1, [V], or 2, [H, V]");
        auto weights = [&](const char *name, const DLTensor *given) {
            const TensorSpec spec{name, shared ? "V" : "HV"};
            const Tensor tensor = check_tensor(spec, given);
            for (int n = 0; n < tensor.rank; n++) check_extent(spec, tensor, n, x.shape[n + (shared ? 3 : 2)], "that of x");
            check_rows(tensor), check_same_device(tensor, x);
            return tensor;
        };
        call.weight = weights("weight", args.weight);
        if (args.dweight) call.dweight = weights("dweight", args.dweight);
    } else if (args.dweight) {
        check_given("dweight", "weight", args.weight);
    }
    const Tensor *const inputs[] = {&call.x, &call.gate, &call.weight, &call.dout};
    const Tensor *const outputs[] = {&call.dx, &call.dgate, &call.dweight};
    for (const Tensor *output : outputs) {
        if (!output->rank) continue;
        check_distinct_elements(*output);
        for (const Tensor *input : inputs)
            if (input->rank) check_no_overlap(*output, *input);
        for (const Tensor *other : outputs)
            if (other->rank && other != output) check_no_overlap(*output, *other);
    }
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

extern "C" holdfast_status holdfast_head_norm_gate_backward(holdfast_context *context,
                                                            const holdfast_head_norm_gate_backward_args *args) {
    return guarded(context, [&](holdfast_context &c) {
        constexpr size_t first_version = offsetof(holdfast_head_norm_gate_backward_args, eps) + sizeof(float);
        Call call = checked_call(checked_args(args, "holdfast_head_norm_gate_backward_args", first_version));
        const Choice choice = choose_backend(c, home_of(call.x));
        const Variant &variant = variant_for("head_norm_gate_backward", call.x, choice);
        for (const Tensor *weight : {&call.weight, &call.dweight})
            if (weight->rank == 2) Tokens::check_axis(*weight, 0);
        const bool wanted = call.dx.rank || call.dgate.rank || call.dweight.rank;
        Tensor *const rows_of_call[] = {&call.x, &call.dout, &call.gate, &call.dx, &call.dgate};
        if (choice.backend != Backend::cpu) {
            announce(c, "head_norm_gate_backward", variant, choice.why, call.x);
            const bool turned = call.x.shape[0] > call.x.shape[1];  // so that sums over tokens are made of many at once
            for (Tensor *rows : rows_of_call)
                if (turned) std::swap(rows->shape[0], rows->shape[1]), std::swap(rows->stride[0], rows->stride[1]);
            const GpuCall on_gpu{variant,
                                 {&call.x, &call.gate, &call.weight, &call.dout, &call.dx, &call.dgate, &call.dweight},
                                 [&](const Run &run) { call.issue(run); }};
            if (wanted && (!call.x.empty() || (call.dweight.rank && !call.dweight.empty()))) on_gpu.run(c);
            return;
        }
        const Tensor given = call.x;
        auto there = [](Tensor &t) { return t.rank ? &t : nullptr; };
        const Rows rows(&call.x, &call.dout, there(call.gate), there(call.dx), there(call.dgate));
        // One call of the kernel goes through its rows several times: they stay in L2.
        const Tokens tokens(rows, call.dweight.rank ? Sums::most_pieces : std::numeric_limits<int64_t>::max(),
                            Tokens::worth_a_thread);
        announce(c, "head_norm_gate_backward", variant, choice.why, given, tokens.pieces());
        if (wanted) run_on_cpu(c, variant, call, tokens);
    });
}
