#include "problem.h"

#include "failure.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <sstream>

namespace holdfast {
namespace {

constexpr int64_t max_state = 1 << 25;  // K V: the kernel's own buffer of a few states is addressed by 32 bits, in bytes

/// The caller's struct in this version's layout, whatever version it was compiled against.
template<class Args>
Args checked_args(const Args *args, const char *type, size_t first_version) {
    if (!args) fail(HOLDFAST_INVALID_ARGUMENT, "args is NULL; expected a ", type);
    const size_t size = args->struct_size;
    if (size < first_version)
        fail(HOLDFAST_INVALID_ARGUMENT, "args.struct_size is ", size, "; expected sizeof(", type, "), at least ",
             first_version);
    for (size_t n = sizeof *args; n < size; n++)
        if (((const unsigned char *)args)[n])
            fail(HOLDFAST_UNSUPPORTED, "args.struct_size is ", size, " and byte ", n, " is not zero; expected zeros past byte ",
                 sizeof *args, ": this version does not know that option");
    Args copy{};
    std::memcpy(&copy, args, std::min(size, sizeof copy));
    return copy;
}

/// Refuses positive and NaN decays, by name; [H], [B, H] or [B, T, H].
void check_log_decay(const Tensor &g) {
    if (g.empty()) return;
    const int rank = g.rank;
    const int64_t H = g.shape[rank - 1], T = rank == 3 ? g.shape[1] : 1, B = rank > 1 ? g.shape[0] : 1;
    const int64_t stride = g.stride[rank - 1];
    for (int64_t b = 0; b < B; b++)
        for (int64_t t = 0; t < T; t++) {
            const float *row = (const float *)g.data + (rank > 1 ? b * g.stride[0] : 0) + (rank == 3 ? t * g.stride[1] : 0);
            bool good = true;
            for (int64_t h = 0; h < H; h++) good &= row[h * stride] <= 0;
            for (int64_t h = 0; !good && h < H; h++) {
                const float value = row[h * stride];
                if (value <= 0) continue;
                std::ostringstream where;
                if (rank > 1) where << b << ", ";
                if (rank == 3) where << t << ", ";
                where << h;
                fail(HOLDFAST_INVALID_ARGUMENT, "log_decay[", where.str(), "] is ", value, "; expected a number <= 0");
            }
        }
}

/// As many axes as a token has, [B, H, ...], with one for time among them: [B, 1, H, ...].
Tensor with_time(Tensor t) {
    std::copy_backward(t.shape + 1, t.shape + t.rank, t.shape + t.rank + 1);
    std::copy_backward(t.stride + 1, t.stride + t.rank, t.stride + t.rank + 1);
    t.shape[1] = 1, t.stride[1] = 0;
    t.rank++;
    return t;
}

/// Arguments of holdfast_forward, or of holdfast_step as far as they are the same, its state in the place of both states.
Problem checked(const holdfast_forward_args &args, bool step) {
    const TensorSpec q{"q", step ? "BHK" : "BTHK", true}, k{"k", q.axes, true}, v{"v", step ? "BHV" : "BTHV", true},
        out{"out", v.axes, true};
    const TensorSpec initial{step ? "state" : "initial_state", "BHKV"}, final{step ? "state" : "final_state", "BHKV"};
    const int last = step ? 2 : 3;  // axis of q, k, v, out
    Problem p{};
    p.q = check_tensor(q, args.q);
    p.k = check_tensor(k, args.k);
    p.v = check_tensor(v, args.v);
    p.out = check_tensor(out, args.out);
    p.B = p.q.shape[0], p.T = step ? 1 : p.q.shape[1], p.H = p.q.shape[last - 1], p.K = p.q.shape[last], p.V = p.v.shape[last];
    if (p.K < 1) fail(HOLDFAST_INVALID_ARGUMENT, "q ", describe(q), " has K = 0; expected at least 1");
    if (p.V < 1) fail(HOLDFAST_INVALID_ARGUMENT, "v ", describe(v), " has V = 0; expected at least 1");
    if (p.K * p.V > max_state)
        fail(HOLDFAST_UNSUPPORTED, "q has K = ", p.K, " and v has V = ", p.V, "; expected K V of at most ", max_state);
    for (int axis = 0; axis <= last; axis++) check_extent(k, p.k, axis, p.q.shape[axis], "of q");
    for (int axis = 0; axis < last; axis++) check_extent(v, p.v, axis, p.q.shape[axis], "of q");
    for (int axis = 0; axis < last; axis++) check_extent(out, p.out, axis, p.q.shape[axis], "of q");
    check_extent(out, p.out, last, p.V, "of v");
    for (const Tensor *t : {&p.k, &p.v, &p.out}) check_same_dtype(*t, p.q);
    for (const Tensor *t : {&p.q, &p.k, &p.v, &p.out}) check_rows(*t);

    if (args.log_decay) {
        const bool per_head = args.log_decay->ndim == 1;
        const TensorSpec spec{"log_decay", per_head ? "H" : step ? "BH" : "BTH"};
        if (!per_head && args.log_decay->ndim != last)
            fail(HOLDFAST_INVALID_ARGUMENT, "log_decay has ", args.log_decay->ndim, " dimensions; expected 1, [H], or ", last,
                 ", ", describe(spec));
        p.log_decay = check_tensor(spec, args.log_decay);
        for (int axis = 0; axis < p.log_decay.rank; axis++)
            check_extent(spec, p.log_decay, axis, per_head ? p.H : p.q.shape[axis], "of q");
    }
    auto check_state = [&](const TensorSpec &spec, const DLTensor *tensor) {
        Tensor state = check_tensor(spec, tensor);
        check_extent(spec, state, 0, p.B, "of q"), check_extent(spec, state, 1, p.H, "of q");
        check_extent(spec, state, 2, p.K, "of q"), check_extent(spec, state, 3, p.V, "of v");
        check_rows(state);
        return state;
    };
    if (args.initial_state || step) p.initial_state = check_state(initial, args.initial_state);
    if (step)
        p.final_state = p.initial_state;
    else if (args.final_state)
        p.final_state = check_state(final, args.final_state);

    for (const Tensor *output : {&p.out, &p.final_state}) {
        if (!output->rank) continue;
        check_distinct_elements(*output);
        for (const Tensor *other : {&p.q, &p.k, &p.v, &p.log_decay, &p.initial_state, &p.final_state}) {
            const bool in_place = output == &p.final_state && other == &p.initial_state && same_elements(*output, *other);
            if (other->rank && other != output && !in_place) check_no_overlap(*output, *other);
        }
    }

    for (const Tensor *t : {&p.k, &p.v, &p.log_decay, &p.initial_state, &p.out, &p.final_state})
        if (t->rank) check_same_device(*t, p.q);
    p.workspace = args.workspace;

    if (!std::isfinite(args.scale)) fail(HOLDFAST_INVALID_ARGUMENT, "scale is ", args.scale, "; expected a finite number");
    p.scale = args.scale != 0 ? args.scale : 1 / std::sqrt((float)p.K);
    if (args.chunk_size < 0) fail(HOLDFAST_INVALID_ARGUMENT, "chunk_size is ", args.chunk_size, "; expected at least 0");
    p.chunk_size = args.chunk_size;
    if (p.q.on_host()) check_log_decay(p.log_decay);  // to fetch a GPU's would take longer than the call
    if (step) {
        for (Tensor *t : {&p.q, &p.k, &p.v, &p.out}) *t = with_time(*t);
        if (p.log_decay.rank == 2) p.log_decay = with_time(p.log_decay);
    }
    return p;
}

}  // namespace

Problem checked_problem(const holdfast_forward_args *args) {
    constexpr size_t first_version = offsetof(holdfast_forward_args, chunk_size) + sizeof(int64_t);
    return checked(checked_args(args, "holdfast_forward_args", first_version), false);
}

Problem checked_problem(const holdfast_step_args *args) {
    constexpr size_t first_version = offsetof(holdfast_step_args, scale) + sizeof(float);
    const holdfast_step_args step = checked_args(args, "holdfast_step_args", first_version);
    holdfast_forward_args same{};
    same.q = step.q, same.k = step.k, same.v = step.v, same.log_decay = step.log_decay, same.initial_state = step.state;
    same.out = step.out, same.scale = step.scale;
    return checked(same, true);
}

Backend Problem::home() const {
    Backend backend = Backend::cpu;
    backend_of(q.device.device_type, &backend);
    return backend;
}

void check_kernel_strides(const Problem &p, int64_t tokens) {
    auto check = [](const Tensor &t, int axis, int64_t extent) {
        const int64_t most = std::numeric_limits<int32_t>::max() / std::max<int64_t>(extent, 1);
        if (t.rank && !t.empty() && extent > 1 && (t.stride[axis] > most || t.stride[axis] < -most))
            fail(HOLDFAST_UNSUPPORTED, t.name, " has stride ", t.stride[axis], " on axis ", axis, "; expected at most ", most,
                 " either way");
    };
    for (const Tensor *t : {&p.q, &p.k, &p.v, &p.out}) check(*t, 1, std::min(tokens, p.T));
    if (p.log_decay.rank == 3) check(p.log_decay, 1, std::min(tokens, p.T));
    for (const Tensor *t : {&p.initial_state, &p.final_state}) check(*t, 2, p.K);
}

void announce(const holdfast_context &c, const char *call, const Variant &variant, const char *why, const Problem &p,
              const std::string &how, int64_t pieces) {
    if (!c.verbose) return;
    std::ostringstream line;
    line << call << ": " << variant.name << " (" << why << "), B " << p.B << ", T " << p.T << ", H " << p.H << ", K " << p.K
         << ", V " << p.V << ", " << how << ", " << c.threads_for(pieces) << " threads";
    c.verbose(c.verbose_user, line.str().c_str());
}

}  // namespace holdfast
