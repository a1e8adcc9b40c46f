#include "problem.h"

#include "args.h"
#include "buffers.h"
#include "expansion.h"
#include "failure.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <utility>

namespace holdfast {
namespace {

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

/// A value of an enumeration, 0 .. most.
int32_t checked_option(const char *name, int32_t value, int32_t most) {
    if (value < 0 || value > most) fail(HOLDFAST_INVALID_ARGUMENT, name, " is ", value, "; expected 0 to ", most);
    return value;
}

/// cu_seqlens, of T tokens.
std::vector<int64_t> checked_starts(const DLTensor *tensor, const TensorSpec &q, int64_t B, int64_t T) {
    const TensorSpec spec{"cu_seqlens", "n", TensorSpec::integers};
    const Tensor t = check_tensor(spec, tensor);
    if (!t.on_host())
        fail(HOLDFAST_UNSUPPORTED, t.name, " is on ", describe(t.device),
             "; expected it on the CPU, whatever the others are on");
    if (B != 1) fail(HOLDFAST_INVALID_ARGUMENT, "cu_seqlens is given and q ", describe(q), " has B = ", B, "; expected 1");
    if (t.shape[0] < 2)
        fail(HOLDFAST_INVALID_ARGUMENT, "cu_seqlens ", describe(spec), " has N + 1 = ", t.shape[0], "; expected at least 2");
    std::vector<int64_t> starts(t.shape[0]);
    for (int64_t n = 0; n < t.shape[0]; n++) {
        starts[n] = t.dtype == i32 ? *t.at<int32_t>(n) : *t.at<int64_t>(n);
        const int64_t least = n ? starts[n - 1] : 0, most = n ? T : 0;
        if (starts[n] < least || starts[n] > most)
            fail(HOLDFAST_INVALID_ARGUMENT, "cu_seqlens[", n, "] is ", starts[n], "; expected ", least,
                 most == least ? "" : " to " + std::to_string(most));
    }
    if (starts.back() != T)
        fail(HOLDFAST_INVALID_ARGUMENT, "cu_seqlens[", t.shape[0] - 1, "] is ", starts.back(), "; expected ", T,
             ", the T of q: the last sequence ends there");
    return starts;
}

/// Whether a call that neither gives nor takes a state may be computed from all T x T weights.
bool may_have_no_state(const Problem &p, int64_t chunk_size) {
    return p.degree > 1 && (p.form == HOLDFAST_FORM_PARALLEL || (p.form == HOLDFAST_FORM_AUTO && chunk_size == 0));
}

/// Whose arguments they are.
enum class Call { forward, step, backward };

using Tensors = std::initializer_list<const Tensor *>;  // those of rank 0 are not there

/// Check that outputs have each element once and share none with another tensor, but for the two of a pair of `in_place`, if they
/// are exactly the same; and that all are on one device.
void check_memory(Tensors inputs, Tensors outputs, std::initializer_list<std::pair<const Tensor *, const Tensor *>> in_place) {
    for (const Tensor *output : outputs) {
        if (!output->rank) continue;
        check_distinct_elements(*output);
        auto check_apart = [&](const Tensor &other) {
            if (other.rank && &other != output) check_no_overlap(*output, other);
        };
        for (const Tensor *input : inputs) {
            const bool pair = std::find(in_place.begin(), in_place.end(), std::make_pair(output, input)) != in_place.end();
            if (!pair || !same_elements(*output, *input)) check_apart(*input);
        }
        for (const Tensor *other : outputs) check_apart(*other);
    }
    for (Tensors list : {inputs, outputs})
        for (const Tensor *t : list)
            if (t->rank) check_same_device(*t, **inputs.begin());
}

/// A tensor of rows that has q's type and these extents, "that of " whom.
Tensor checked_rows(const Tensor &q, const TensorSpec &spec, const DLTensor *tensor, std::initializer_list<int64_t> extents,
                    const char *whose) {
    const Tensor t = check_tensor(spec, tensor);
    for (int axis = 0; axis < t.rank; axis++) check_extent(spec, t, axis, extents.begin()[axis], whose);
    check_same_dtype(t, q), check_rows(t);
    return t;
}

/// State [N, Hk, D, V] of `p`; [B, Hk, D, V] in a step, and [M, Hk, D, V] of several in a sequence, by their first letter.
Tensor checked_state(const Problem &p, const char *name, const DLTensor *tensor, bool value_major, char first = 'N') {
    const std::string axes = std::string(1, first) + (value_major ? "hVD" : "hDV");
    const TensorSpec spec{name, axes.c_str()};
    Tensor state = check_tensor(spec, tensor);
    if (first == 'M')
        check_extent(spec, state, 0, p.first_state(p.N), "of each sequence T / state_interval, rounded up, and one more");
    else
        check_extent(spec, state, 0, p.N, p.packed() ? "the sequences of cu_seqlens" : "the B of q");
    check_extent(spec, state, 1, p.Hk, "that of k");
    check_extent(spec, state, value_major ? 3 : 2, p.D, p.degree > 1 ? "the size of q's K features expanded" : "the K of q");
    check_extent(spec, state, value_major ? 2 : 3, p.V, "that of v");
    check_rows(state);
    if (value_major) std::swap(state.shape[2], state.shape[3]), std::swap(state.stride[2], state.stride[3]);
    return state;
}

/// Sum of keys [N, Hk, D] of `p`; of letters [B, Hk, D] in a step.
Tensor checked_sum(const Problem &p, const char *name, const DLTensor *tensor, bool step = false) {
    const TensorSpec spec{name, step ? "BhD" : "NhD"};
    if (!p.normalized)
        fail(HOLDFAST_INVALID_ARGUMENT, name, " is given and out, of degree ", p.degree, ", is not normalized; expected NULL");
    const Tensor sum = check_tensor(spec, tensor);
    check_extent(spec, sum, 0, p.N, p.packed() ? "the sequences of cu_seqlens" : "the B of q");
    check_extent(spec, sum, 1, p.Hk, "that of k");
    check_extent(spec, sum, 2, p.D, p.degree > 1 ? "the size of q's K features expanded" : "the K of q");
    check_rows(sum);
    return sum;
}

/// Arguments of holdfast_forward; or of holdfast_step as far as they are the same, its state in the place of both states; or of
/// holdfast_backward, whose out is an input, without what has to do with the final states.
Problem checked(const holdfast_forward_args &args, Call call) {
    const bool step = call == Call::step, backward = call == Call::backward;
    constexpr TensorSpec::Types floats = TensorSpec::floats;
    const TensorSpec q{"q", step ? "BHK" : "BTHK", floats}, k{"k", step ? "BhK" : "BThK", floats},
        v{"v", step ? "BhV" : "BThV", floats}, out{"out", step ? "BHV" : "BTHV", floats};
    const int last = step ? 2 : 3, head = last - 1;  // axes of q, k, v, out
    Problem p{};
    p.degree = std::max(1, checked_option("degree", args.degree, 4));
    const int32_t normalize = checked_option("normalize", args.normalize, HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS);
    p.normalized = normalize == HOLDFAST_NORMALIZE_DEFAULT ? p.degree > 1 : normalize == HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS;
    p.form = (holdfast_form)checked_option("form", args.form, HOLDFAST_FORM_RECURRENT);
    const bool value_major =
        checked_option("state_layout", args.state_layout, HOLDFAST_STATE_VALUE_MAJOR) == HOLDFAST_STATE_VALUE_MAJOR;
    p.expansion = (holdfast_expansion)checked_option("expansion", args.expansion, HOLDFAST_EXPANSION_TILED);

    p.q = check_tensor(q, args.q);
    p.k = check_tensor(k, args.k);
    p.v = check_tensor(v, args.v);
    if (!backward || p.normalized || args.out) p.out = check_tensor(out, args.out);
    p.B = p.q.shape[0], p.T = step ? 1 : p.q.shape[1], p.H = p.q.shape[head], p.K = p.q.shape[last], p.V = p.v.shape[last];
    p.Hk = p.k.shape[head];
    if (p.K < 1) fail(HOLDFAST_INVALID_ARGUMENT, "q ", describe(q), " has K = 0; expected at least 1");
    if (p.V < 1) fail(HOLDFAST_INVALID_ARGUMENT, "v ", describe(v), " has V = 0; expected at least 1");
    if (p.expansion == HOLDFAST_EXPANSION_TILED && (p.degree != 2 || p.K % 16))
        fail(HOLDFAST_INVALID_ARGUMENT, "expansion is HOLDFAST_EXPANSION_TILED, degree ", p.degree, " and K of q ", p.K,
             "; expected degree 2 and K a multiple of 16");
    p.D = expanded_size(p.K, p.degree, p.expansion, (int64_t)1 << 53);  // exact until there
    const bool any_states =
        step || args.initial_state || args.final_state || args.initial_sum_of_keys || args.final_sum_of_keys;
    if (!may_have_no_state(p, args.chunk_size) || any_states) check_state_size(p, backward ? max_state : max_power_state);
    for (int axis = 0; axis <= last; axis++)
        if (axis != head) check_extent(k, p.k, axis, p.q.shape[axis], "that of q");
    if (p.Hk == 0 ? p.H != 0 : p.H % p.Hk != 0)
        fail(HOLDFAST_INVALID_ARGUMENT, "k ", describe(k), " has Hk = ", p.Hk, "; expected a divisor of ", p.H, ", the H of q");
    for (int axis = 0; axis < last; axis++)
        check_extent(v, p.v, axis, p.k.shape[axis], axis == head ? "that of k" : "that of q");
    if (p.out.rank) {
        for (int axis = 0; axis < last; axis++) check_extent(out, p.out, axis, p.q.shape[axis], "that of q");
        check_extent(out, p.out, last, p.V, "that of v");
    }
    for (const Tensor *t : {&p.k, &p.v, &p.out})
        if (t->rank) check_same_dtype(*t, p.q);
    for (const Tensor *t : {&p.q, &p.k, &p.v, &p.out})
        if (t->rank) check_rows(*t);
    if (args.cu_seqlens) p.starts = checked_starts(args.cu_seqlens, q, p.B, p.T);
    p.N = p.packed() ? (int64_t)p.starts.size() - 1 : p.B;

    if (args.log_decay) {
        const bool per_head = args.log_decay->ndim == 1;
        const TensorSpec spec{"log_decay", per_head ? "h" : step ? "Bh" : "BTh"};
        if (!per_head && args.log_decay->ndim != last)
            fail(HOLDFAST_INVALID_ARGUMENT, "log_decay has ", args.log_decay->ndim, " dimensions; expected 1, [Hk], or ", last,
                 ", ", describe(spec));
        p.log_decay = check_tensor(spec, args.log_decay);
        for (int axis = 0; axis < p.log_decay.rank; axis++)
            check_extent(spec, p.log_decay, axis, per_head ? p.Hk : p.k.shape[axis], "that of k");
    }

    if (args.initial_state || step)
        p.initial_state = checked_state(p, step ? "state" : "initial_state", args.initial_state, value_major, step ? 'B' : 'N');
    if (step)
        p.final_state = p.initial_state;
    else if (args.final_state)
        p.final_state = checked_state(p, "final_state", args.final_state, value_major);

    if (args.initial_sum_of_keys || (step && p.normalized))
        p.initial_sum = checked_sum(p, step ? "sum_of_keys" : "initial_sum_of_keys", args.initial_sum_of_keys, step);
    if (step)
        p.final_sum = p.initial_sum;
    else if (args.final_sum_of_keys)
        p.final_sum = checked_sum(p, "final_sum_of_keys", args.final_sum_of_keys);
    if (p.normalized && !p.initial_state.rank != !p.initial_sum.rank)
        fail(HOLDFAST_INVALID_ARGUMENT, p.initial_sum.rank ? "initial_state" : "initial_sum_of_keys", " is NULL and ",
             p.initial_sum.rank ? "initial_sum_of_keys" : "initial_state", " is given; expected both or neither");

    if (args.weights) {
        const TensorSpec spec{"weights", "BHTT", floats};
        if (p.form != HOLDFAST_FORM_PARALLEL)
            fail(HOLDFAST_INVALID_ARGUMENT, "weights is given and form is ", (int)p.form, "; expected ",
                 (int)HOLDFAST_FORM_PARALLEL, ", HOLDFAST_FORM_PARALLEL");
        p.weights = check_tensor(spec, args.weights);
        const int64_t extents[] = {p.B, p.H, p.T, p.T};
        for (int axis = 0; axis < 4; axis++) check_extent(spec, p.weights, axis, extents[axis], "that of q");
        check_same_dtype(p.weights, p.q);
        check_rows(p.weights);
    }

    if (args.state_interval < 0 || !args.states != !args.state_interval)
        fail(HOLDFAST_INVALID_ARGUMENT, "state_interval is ", args.state_interval, " and states is ",
             args.states ? "given; expected at least 1" : "NULL; expected 0");
    p.state_interval = args.state_interval;
    if (args.states) {
        if (p.degree > 1 || p.normalized)
            fail(HOLDFAST_UNSUPPORTED, "states is given and out, of degree ", p.degree, ", is ", p.normalized ? "" : "not ",
                 "normalized; expected degree 1 without normalization, or NULL");
        if (!backward && (p.form == HOLDFAST_FORM_PARALLEL || p.form == HOLDFAST_FORM_RECURRENT))
            fail(HOLDFAST_INVALID_ARGUMENT, "states is given and form is ", (int)p.form, "; expected ",
                 (int)HOLDFAST_FORM_CHUNKWISE, ", HOLDFAST_FORM_CHUNKWISE, or ", (int)HOLDFAST_FORM_AUTO);
        p.states = checked_state(p, "states", args.states, value_major, 'M');
    }

    if (backward)  // its outputs are not here yet
        check_memory({&p.q, &p.k, &p.v, &p.log_decay, &p.initial_state, &p.initial_sum, &p.out, &p.states}, {}, {});
    else
        check_memory({&p.q, &p.k, &p.v, &p.log_decay, &p.initial_state, &p.initial_sum},
                     {&p.out, &p.final_state, &p.final_sum, &p.weights, &p.states},
                     {{&p.final_state, &p.initial_state}, {&p.final_sum, &p.initial_sum}});
    p.workspace = args.workspace;

    if (!std::isfinite(args.scale)) fail(HOLDFAST_INVALID_ARGUMENT, "scale is ", args.scale, "; expected a finite number");
    p.scale = args.scale != 0 ? args.scale : 1 / std::sqrt((float)p.K);
    if (args.chunk_size < 0) fail(HOLDFAST_INVALID_ARGUMENT, "chunk_size is ", args.chunk_size, "; expected at least 0");
    p.chunk_size = args.chunk_size;
    if (p.q.on_host()) check_log_decay(p.log_decay);  // to fetch a GPU's would take longer than the call
    if (step) {
        p.form = HOLDFAST_FORM_RECURRENT;
        for (Tensor *t : {&p.q, &p.k, &p.v, &p.out}) *t = with_time(*t);
        if (p.log_decay.rank == 2) p.log_decay = with_time(p.log_decay);
    }
    return p;
}

}  // namespace

Problem checked_problem(const holdfast_forward_args *args) {
    constexpr size_t first_version = offsetof(holdfast_forward_args, chunk_size) + sizeof(int64_t);
    return checked(checked_args(args, "holdfast_forward_args", first_version), Call::forward);
}

Problem checked_problem(const holdfast_step_args *args) {
    constexpr size_t first_version = offsetof(holdfast_step_args, scale) + sizeof(float);
    const holdfast_step_args step = checked_args(args, "holdfast_step_args", first_version);
    holdfast_forward_args same{};
    same.q = step.q, same.k = step.k, same.v = step.v, same.log_decay = step.log_decay, same.initial_state = step.state;
    same.initial_sum_of_keys = step.sum_of_keys, same.out = step.out, same.scale = step.scale;
    same.degree = step.degree, same.normalize = step.normalize;
    same.state_layout = step.state_layout, same.expansion = step.expansion, same.workspace = step.workspace;
    return checked(same, Call::step);
}

BackwardProblem checked_problem(const holdfast_backward_args *args) {
    constexpr size_t first_version = offsetof(holdfast_backward_args, cu_seqlens) + sizeof(const DLTensor *);
    const holdfast_backward_args call = checked_args(args, "holdfast_backward_args", first_version);
    holdfast_forward_args same{};
    same.q = call.q, same.k = call.k, same.v = call.v, same.log_decay = call.log_decay;
    same.initial_state = call.initial_state, same.initial_sum_of_keys = call.initial_sum_of_keys;
    same.out = const_cast<DLTensor *>(call.out);  // an input here
    same.scale = call.scale, same.chunk_size = call.chunk_size, same.workspace = call.workspace;
    same.degree = call.degree, same.normalize = call.normalize, same.form = call.form;
    same.state_layout = call.state_layout, same.expansion = call.expansion, same.cu_seqlens = call.cu_seqlens;
    same.states = const_cast<DLTensor *>(call.states), same.state_interval = call.state_interval;  // an input here
    BackwardProblem p{checked(same, Call::backward), {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};

    constexpr TensorSpec::Types floats = TensorSpec::floats;
    if (call.dout) p.dout = checked_rows(p.q, {"dout", "BTHV", floats}, call.dout, {p.B, p.T, p.H, p.V}, "that of out");
    if (call.dq) p.dq = checked_rows(p.q, {"dq", "BTHK", floats}, call.dq, {p.B, p.T, p.H, p.K}, "that of q");
    if (call.dk) p.dk = checked_rows(p.q, {"dk", "BThK", floats}, call.dk, {p.B, p.T, p.Hk, p.K}, "that of k");
    if (call.dv) p.dv = checked_rows(p.q, {"dv", "BThV", floats}, call.dv, {p.B, p.T, p.Hk, p.V}, "that of v");
    if (call.dlog_decay) {
        if (!p.log_decay.rank)
            fail(HOLDFAST_INVALID_ARGUMENT, "dlog_decay is given and log_decay is NULL; expected both, or dlog_decay NULL");
        const TensorSpec spec{"dlog_decay", p.log_decay.rank == 1 ? "h" : "BTh"};
        p.dlog_decay = check_tensor(spec, call.dlog_decay);
        for (int axis = 0; axis < p.dlog_decay.rank; axis++)
            check_extent(spec, p.dlog_decay, axis, p.log_decay.shape[axis], "that of log_decay");
    }
    const bool value_major = call.state_layout == HOLDFAST_STATE_VALUE_MAJOR;
    auto state = [&](const char *name, const DLTensor *tensor) {
        return tensor ? checked_state(p, name, tensor, value_major) : Tensor{};
    };
    auto sum = [&](const char *name, const DLTensor *tensor) { return tensor ? checked_sum(p, name, tensor) : Tensor{}; };
    p.dfinal_state = state("dfinal_state", call.dfinal_state);
    p.dfinal_sum = sum("dfinal_sum_of_keys", call.dfinal_sum_of_keys);
    p.dinitial_state = state("dinitial_state", call.dinitial_state);
    p.dinitial_sum = sum("dinitial_sum_of_keys", call.dinitial_sum_of_keys);

    check_memory({&p.q, &p.k, &p.v, &p.log_decay, &p.initial_state, &p.initial_sum, &p.out, &p.states, &p.dout, &p.dfinal_state,
                  &p.dfinal_sum},
                 {&p.dq, &p.dk, &p.dv, &p.dlog_decay, &p.dinitial_state, &p.dinitial_sum},
                 {{&p.dinitial_state, &p.dfinal_state}, {&p.dinitial_sum, &p.dfinal_sum}});
    return p;
}

void check_state_size(const Problem &p, int64_t most_of_power) {
    const int64_t most = p.degree > 1 ? most_of_power : max_state;
    // A feature's factors are found by degree! times its index (generators/expansion.cpp).
    const int64_t most_features = std::numeric_limits<int32_t>::max() / (p.degree == 4 ? 24 : p.degree == 3 ? 6 : p.degree);
    if (p.D > most / p.V)
        fail(HOLDFAST_UNSUPPORTED, "q has K = ", p.K, " and v has V = ", p.V, p.degree > 1 ? ", degree " : "",
             p.degree > 1 ? std::to_string(p.degree) : "", "; expected ",
             p.degree > 1 ? "D V, D the size of an expanded key," : "K V", " of at most ", most);
    if (p.D > most_features)
        fail(HOLDFAST_UNSUPPORTED, "q has K = ", p.K, ", degree ", p.degree, "; expected an expanded key of at most ",
             most_features, " features");
}

Backend Problem::home() const { return home_of(q); }

int64_t Problem::first_state(int64_t s) const {
    if (!packed()) return s ? s * states_of(0) : 0;
    int64_t first = 0;
    for (int64_t before = 0; before < s; before++) first += states_of(before);
    return first;
}

int64_t Problem::longest() const {
    int64_t longest = 0;
    for (int64_t s = 0; s < N; s++) longest = std::max(longest, length(s));
    return longest;
}

int64_t Problem::long_sequences() const {
    const int64_t tokens = longest();
    return packed() && tokens ? T / tokens : N;
}

RowAlignment Problem::row_alignment(Backend backend) const {
    RowAlignment rows;
    for (const Tensor *t : {&q, &k, &v, &out}) {
        if (t->empty()) continue;
        uint64_t places = 0;  // what rows start at are sums of multiples of these
        if (q.on_host() && backend != Backend::cpu) {
            places = (uint64_t)(t->shape[3] * t->dtype.bytes());
        } else {
            places = (uint64_t)(uintptr_t)t->data;
            for (int axis = 0; axis < 3; axis++)
                if (t->shape[axis] > 1) places |= (uint64_t)(t->stride[axis] * t->dtype.bytes());
        }
        const int64_t bytes = (int64_t)(places & -places);  // 0: nothing limits it
        if (bytes && bytes < rows.bytes) rows = {bytes, t->name};
    }
    return rows;
}

/// Along `axis`, as far as `extent`. Those of a step's rows are not the caller's, of which none is time.
static void check_kernel_stride(const Tensor &t, int axis, int64_t extent, const char *name_of_axis = nullptr) {
    const int64_t most = std::numeric_limits<int32_t>::max() / std::max<int64_t>(extent, 1);
    if (t.rank && !t.empty() && extent > 1 && (t.stride[axis] > most || t.stride[axis] < -most))
        fail(HOLDFAST_UNSUPPORTED, t.name, " has stride ", t.stride[axis],
             name_of_axis ? name_of_axis : " on axis " + std::to_string(axis), "; expected at most ", most, " either way");
}
constexpr char between_heads[] = " between heads that share keys";

void check_kernel_strides(const Problem &p, int64_t tokens) {
    for (const Tensor *t : {&p.q, &p.k, &p.v, &p.out}) check_kernel_stride(*t, 1, std::min(tokens, p.T));
    for (const Tensor *t : {&p.q, &p.out}) check_kernel_stride(*t, 2, p.group(), between_heads);
    if (p.log_decay.rank == 3) check_kernel_stride(p.log_decay, 1, std::min(tokens, p.T));
    for (const Tensor *t : {&p.initial_state, &p.final_state, &p.states})
        check_kernel_stride(*t, 2, p.D), check_kernel_stride(*t, 3, p.V);
}

void check_kernel_strides(const BackwardProblem &p, int64_t tokens) {
    check_kernel_strides(static_cast<const Problem &>(p), tokens);
    for (const Tensor *t : {&p.dout, &p.dq, &p.dk, &p.dv}) check_kernel_stride(*t, 1, std::min(tokens, p.T));
    for (const Tensor *t : {&p.dout, &p.dq}) check_kernel_stride(*t, 2, p.group(), between_heads);
    if (p.dlog_decay.rank == 3) check_kernel_stride(p.dlog_decay, 1, std::min(tokens, p.T));
    for (const Tensor *t : {&p.dfinal_state, &p.dinitial_state})
        check_kernel_stride(*t, 2, p.D), check_kernel_stride(*t, 3, p.V);
}

void announce(const holdfast_context &c, const char *call, const Variant &variant, const char *why, const Problem &p,
              const std::string &how, int64_t pieces) {
    if (!c.verbose) return;
    std::ostringstream line;
    line << call << ": " << variant.name << " (" << why << "), B " << p.B << ", T " << p.T << ", H " << p.H
         << (p.Hk == p.H ? "" : ", Hk " + std::to_string(p.Hk)) << ", K " << p.K << ", V " << p.V << ", " << how << ", "
         << workers(c, variant, p.q, pieces);
    c.verbose(c.verbose_user, line.str().c_str());
}

}  // namespace holdfast
