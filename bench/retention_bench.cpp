// Times compiled variants that this machine runs, through the public API: one benchmark per row of variants.inc, length
// (all but steps; parallel: up to 4096) or batch size (steps: one, and as many as make states of a quarter gigabyte) and number of
// threads; at K = 256 and V = 512 with RetNet's numbers of heads too. Long calls have fewer heads than asked for: as many as a
// gigabyte of tensors holds, of power retention as take seconds. Before the clock starts, the variant that really ran and its
// result are checked; either one wrong fails the benchmark and the program.
//
//     retention_bench [--heads=8] [--threads=1,<cores>] [--targets=best|all|NAME,...] [Google Benchmark's options]
//
// best, the default: those rows in full that calls on the CPU take here. Other rows of the CPU, slower at every length, for 256
// tokens or one batch entry on one thread; none of GPUs, which may be software: PoCL, lavapipe, the stand-in for Metal.
//
// Batch entries and heads are the same thing to the chunkwise kernel, so B is 1. Not here: peers (`holdfast bench`).
//
// Counters, per call:
//     GFLOP/s         useful operations: for a chunk of L tokens, L (L + 1) (K + V) for the scores that count and their
//                     products with values, and 4 L K V for reading and writing the state; in the parallel form all T
//                     tokens are one chunk; of the power kernel 4 L D (V + 1). A final state of power retention beside the
//                     parallel form, which is only written, takes 2 T D (V + 1). Of gradients L (L + 1) (3 K + 2 V), and
//                     10 L K V with the states, which are computed again; of power retention 10 L D (V + 1)
//     square_GFLOP/s  the same with the masked half of each chunk counted too: 2 L L (K + V)
//     peak_share      GFLOP/s over the fp32 peak that was measured at the start, on as many threads
//     bf16_peak_share of bf16, where this CPU has products of it: the same over their peak
//     bytes_moved     q, k, v, log_decay and the initial state read once, out and the final state written once
//     copy_share      of rotation, norm and gate: bytes_moved per second over what copying reads and writes, measured once in as
//                     much memory on as many threads
//     update_share    of steps: the same over what changing as much memory in place reads and writes
#include "../tests/reference/backward.h"
#include "../tests/reference/head_norm_gate.h"
#include "../tests/reference/power.h"
#include "../tests/reference/power_backward.h"
#include "../tests/reference/retention.h"
#include "../tests/reference/rotate.h"
#include "../tests/tolerance.h"
#include "peak.h"

#include <benchmark/benchmark.h>
#include <holdfast/holdfast.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using test::Dtype, test::f32, test::f16, test::bf16;

constexpr int64_t lengths[] = {1, 16, 256, 4096, 65536};
constexpr int64_t sample_length = 256;           // of rows that calls do not take
constexpr int64_t longest_parallel = 4096;       // time grows with the square
constexpr double most_bytes = 1 << 30;           // of a call's tensors, and
constexpr double most_operations = 1e11;         // of one of power retention: longer calls, and gradients, have fewer heads
constexpr int64_t retnet_heads[] = {8, 10, 16};  // of K = 256 and V = 512: 1.3, 2.7 and 6.7 billion parameters

constexpr double states_in_memory = 1 << 28;  // bytes: far beyond the caches

struct Variant {
    const char *kernel, *name, *target;
    Dtype dtype;
    int chunk, key_size, value_size;  // sizes: 0 is any
    bool round_operands;
    int degree;  // 0: any
    bool is(const char *name) const { return !std::strcmp(kernel, name); }
};
constexpr Variant variants[] = {
#define HOLDFAST_VARIANT(kernel, name, dtype, chunk, key_size, value_size, target, row_alignment, round_operands, degree) \
    {#kernel, #name, #target, dtype, chunk, key_size, value_size, round_operands, degree},
#include "variants.inc"
#undef HOLDFAST_VARIANT
};

/// At which a row is timed: one for any of power retention at 2.
int degree_of(const Variant &row) {
    const bool power = row.is("parallel_backward") || !std::strncmp(row.kernel, "power", 5);
    return !power ? 1 : row.degree ? row.degree : 2;
}

struct Shape {
    int64_t T, H, K, V;
    Dtype dtype;
    int64_t element() const { return dtype == f32 ? 4 : 2; }  // bytes, of q, k, v and out
    double bytes() const { return (double)(T * H * (element() * (2 * K + 2 * V) + 4) + 4 * 2 * H * K * V); }
    bool operator==(const Shape &o) const { return std::tie(T, H, K, V, dtype) == std::tie(o.T, o.H, o.K, o.V, o.dtype); }
};

/// Operations of one call in chunks of `chunk`.
struct Operations {
    double useful = 0, square = 0;
    Operations(const Shape &s, int64_t chunk) {
        for (int64_t t = 0; t < s.T; t += chunk) {
            const double L = std::min(chunk, s.T - t), state = 4 * L * s.K * s.V;
            useful += s.H * (L * (L + 1) * (s.K + s.V) + state);
            square += s.H * (2 * L * L * (s.K + s.V) + state);
        }
    }
};

/// A compact tensor and its DLPack description. Aligned to cache lines, which std::vector would not be.
struct Tensor {
    std::vector<int64_t> shape;
    int64_t size = 1;
    DLTensor view{};
    explicit Tensor(std::vector<int64_t> extents, const Dtype &dtype = f32) : shape(std::move(extents)) {
        for (int64_t extent : shape) size *= extent;
        constexpr size_t line = 64;
        const size_t bytes = size * (dtype == f32 ? sizeof(float) : sizeof(uint16_t));
        memory.reset(std::aligned_alloc(line, (bytes + line - 1) / line * line));
        if (!memory) throw std::bad_alloc();
        view.data = memory.get(), view.shape = shape.data(), view.ndim = (int)shape.size();
        view.dtype = {(uint8_t)(dtype == bf16 ? kDLBfloat : kDLFloat), (uint8_t)(dtype == f32 ? 32 : 16), 1};
        view.device = {kDLCPU, 0};
    }
    float *data() { return (float *)memory.get(); }
    const float *data() const { return (const float *)memory.get(); }
    uint16_t *bits() { return (uint16_t *)memory.get(); }
    /// Numbers repeat after a prime number of them: no two rows near each other are alike, and a gigabyte takes little time.
    static constexpr int64_t period = 1'000'003;
    void fill(std::mt19937 &random, float low, float high) {
        std::uniform_real_distribution<float> number(low, high);
        for (int64_t n = 0; n < size; n++) data()[n] = n < period ? number(random) : data()[n - period];
    }

private:
    struct Free {
        void operator()(void *memory) const { std::free(memory); }
    };
    std::unique_ptr<void, Free> memory;
};

/// q, k, v and out of a call: in fp32, and as they are handed over.
class Stored {
public:
    /// q, k and v, which Tensor::fill() has made, are rounded to the type.
    Stored(const Dtype &dtype, Tensor &q, Tensor &k, Tensor &v, Tensor &out) : dtype(dtype), wide{&q, &k, &v, &out} {
        for (Tensor *x : wide) {
            if (dtype == f32) break;
            narrow.emplace_back(x->shape, dtype);
            uint16_t *bits = narrow.back().bits();
            for (int64_t n = 0; x != &out && n < x->size; n++) {
                const int64_t same = n - Tensor::period;
                bits[n] = same < 0 ? dtype.encode(x->data()[n]) : bits[same];
                x->data()[n] = same < 0 ? (float)dtype.decode(bits[n]) : x->data()[same];
            }
        }
        forget();
    }
    DLTensor *q() { return view(0); }
    DLTensor *k() { return view(1); }
    DLTensor *v() { return view(2); }
    DLTensor *out() { return view(3); }

    /// Make all of out a NaN.
    void forget() {
        std::fill_n(wide[3]->data(), wide[3]->size, std::nanf(""));
        if (!narrow.empty()) std::fill_n(narrow[3].bits(), wide[3]->size, 0xffff);  // a NaN of either type
    }
    /// Put out into its fp32.
    void load() {
        for (int64_t n = 0; !narrow.empty() && n < wide[3]->size; n++)
            wide[3]->data()[n] = (float)dtype.decode(narrow[3].bits()[n]);
    }

private:
    const Dtype dtype;
    Tensor *const wide[4];
    std::vector<Tensor> narrow;  // those of 16 bits
    DLTensor *view(int n) { return narrow.empty() ? &wide[n]->view : &narrow[n].view; }
};

/// The worse one of two errors. NaN is worst.
double worse(double a, double b) { return b > a || std::isnan(b) ? b : a; }

/// Inputs of one shape and type, and what the first and the last head, which forget fastest and slowest, should give. Of long
/// calls what the first and the last tokens should: before the latter everything is forgotten, so that the reference needs no more.
class Problem {
public:
    const Shape shape;
    Tensor q, k, v, log_decay, initial_state, out, final_state;

    explicit Problem(const Shape &s)
        : shape(s), q({1, s.T, s.H, s.K}), k({1, s.T, s.H, s.K}), v({1, s.T, s.H, s.V}), log_decay({1, s.T, s.H}),
          initial_state({1, s.H, s.K, s.V}), out({1, s.T, s.H, s.V}), final_state({1, s.H, s.K, s.V}) {
        std::mt19937 random(1);
        for (Tensor *x : {&q, &k, &v, &initial_state}) x->fill(random, -1.7f, 1.7f);  // variance 1
        stored.emplace(s.dtype, q, k, v, out);
        log_decay.fill(random, 0.5f, 1.5f);  // times RetNet's decay of the head: weak gates hide no error
        for (int64_t n = 0; n < s.T * s.H; n++) log_decay.data()[n] *= std::log1p(-std::exp2(-5.0f - n % s.H));
        const bool at_ends = s.T > 2 * most;
        if (at_ends) std::fill_n(log_decay.data() + (s.T - most) * s.H, s.H, -INFINITY);
        for (int64_t from : at_ends ? std::vector<int64_t>{0, s.T - most} : std::vector<int64_t>{0})
            for (int64_t h : s.H > 1 ? std::vector<int64_t>{0, s.H - 1} : std::vector<int64_t>{0})
                expected.push_back({from, h, reference_of(from, at_ends ? most : s.T, h)});
    }

    holdfast_forward_args args() {
        holdfast_forward_args a{};
        a.struct_size = sizeof a, a.q = stored->q(), a.k = stored->k(), a.v = stored->v(), a.out = stored->out();
        a.log_decay = &log_decay.view, a.initial_state = &initial_state.view, a.final_state = &final_state.view;
        return a;
    }

    void clear_results() {
        stored->forget();
        std::fill_n(final_state.data(), final_state.size, std::nanf(""));
    }

    /// Largest relative RMS errors over what is expected: of out, and of final_state.
    std::pair<double, double> errors() {
        stored->load();
        double of_out = 0, of_state = 0;
        const int64_t row = shape.H * shape.V, state = shape.K * shape.V;
        for (const auto &[from, h, e] : expected) {
            of_out = worse(of_out, relative_rms(out.data() + from * row + h * shape.V, row, e.out, shape.V));
            if (from + (int64_t)e.out.size() / shape.V == shape.T)
                of_state = worse(of_state, relative_rms(final_state.data() + h * state, state, e.state, state));
        }
        return {of_out, of_state};
    }

    /// NaN, which fails every comparison, if there is one.
    static double relative_rms(const float *rows, int64_t stride, const std::vector<double> &expected, int64_t width) {
        double difference = 0, norm = 0;
        for (size_t n = 0; n < expected.size(); n++) {
            const double d = rows[n / width * stride + n % width] - expected[n];
            difference += d * d, norm += expected[n] * expected[n];
        }
        return std::sqrt(difference / norm);
    }

private:
    static constexpr int64_t most = 2048;  // tokens that are checked at each end
    struct Expected {
        int64_t from, h;
        reference::Result result;
    };
    std::optional<Stored> stored;
    std::vector<Expected> expected;

    reference::Result reference_of(int64_t from, int64_t tokens, int64_t h) const {
        const int64_t H = shape.H, K = shape.K, V = shape.V, row = from * H + h;
        reference::Inputs in{1, tokens, 1, K, V};
        in.scale = 1 / std::sqrt((double)K);
        in.q = {q.data() + row * K, {0, H * K, 0, 1}}, in.k = {k.data() + row * K, {0, H * K, 0, 1}};
        in.v = {v.data() + row * V, {0, H * V, 0, 1}}, in.log_decay = {log_decay.data() + row, {0, H, 0, 0}};
        in.initial_state = {initial_state.data() + h * K * V, {0, 0, V, 1}};
        return reference::retention(in);
    }
};

/// One token, and what it should give for the first head and the last of all.
class StepProblem {
public:
    const int64_t B, H, K, V;
    Tensor q, k, v, log_decay, state, out;
    static constexpr int64_t T = 1;

    StepProblem(int64_t B, int64_t H, int64_t K, int64_t V, const Dtype &dtype)
        : B(B), H(H), K(K), V(V), q({B, H, K}), k({B, H, K}), v({B, H, V}), log_decay({B, H}), state({B, H, K, V}),
          out({B, H, V}), dtype(dtype) {
        std::mt19937 random(1);
        for (Tensor *x : {&q, &k, &v}) x->fill(random, -1.7f, 1.7f);
        stored.emplace(dtype, q, k, v, out);
        log_decay.fill(random, -0.05f, 0);
        std::fill_n(state.data(), state.size, 0.0f);  // all of it is there before the clock starts
        for (int64_t head : {(int64_t)0, B * H - 1})
            for (int64_t n = 0; n < K * V; n++) state.data()[head * K * V + n] = (float)(n % 17) / 17 - 0.5f;
        for (int64_t head : {(int64_t)0, B * H - 1}) {
            reference::Inputs in{1, 1, 1, K, V};
            in.scale = 1 / std::sqrt((double)K);
            in.q = {q.data() + head * K, {0, 0, 0, 1}}, in.k = {k.data() + head * K, {0, 0, 0, 1}};
            in.v = {v.data() + head * V, {0, 0, 0, 1}}, in.log_decay = {log_decay.data() + head, {}};
            in.initial_state = {state.data() + head * K * V, {0, 0, V, 1}};
            expected.push_back(reference::retention(in));
        }
    }

    holdfast_step_args args() {
        holdfast_step_args a{};
        a.struct_size = sizeof a, a.q = stored->q(), a.k = stored->k(), a.v = stored->v(), a.out = stored->out();
        a.log_decay = &log_decay.view, a.state = &state.view;
        return a;
    }
    double state_bytes() const { return 2.0 * sizeof(float) * state.size; }  // read and written
    double bytes() const {
        const double element = dtype == f32 ? 4 : 2;
        return state_bytes() + element * (double)(q.size + k.size + v.size + out.size) + sizeof(float) * log_decay.size;
    }

    /// Largest relative RMS errors over the two heads, after one step: of out, and of the state.
    std::pair<double, double> errors() {
        stored->load();
        double of_out = 0, of_state = 0;
        for (int last : {0, 1}) {
            const int64_t head = last * (B * H - 1);
            of_out = worse(of_out, Problem::relative_rms(out.data() + head * V, V, expected[last].out, V));
            of_state = worse(of_state, Problem::relative_rms(state.data() + head * K * V, V, expected[last].state, V));
        }
        return {of_out, of_state};
    }

private:
    const Dtype dtype;
    std::optional<Stored> stored;
    std::vector<reference::Result> expected;
};

/// Rows of features, what is done to them, and what this should give for some tokens.
class RowsProblem {
public:
    enum Call { rotate_halves, rotate_interleaved, rotate_backward, rms_norm, layer_norm, rms_backward, layer_backward };
    static constexpr const char *names[] = {"halves",      "interleaved",        "halves_backward",     "rms_gated",
                                            "layer_gated", "rms_gated_backward", "layer_gated_backward"};
    static const char *kernel(Call call) {
        return call < rms_norm ? "rotate" : call < rms_backward ? "head_norm_gate" : "head_norm_gate_backward";
    }

    RowsProblem(Call call, int64_t T, int64_t H, int64_t size, const Dtype &dtype)
        : call(call), T(T), H(H), size(size), dtype(dtype), x({1, T, H, size}), gate({1, T, H, size}), out({1, T, H, size}),
          factors({size}), dfactors({size}), dout({1, backward() ? T : 1, H, size}), dgate(dout.shape, dtype) {
        std::mt19937 random(1);
        for (Tensor *t : {&x, &gate, &dout}) t->fill(random, -1.7f, 1.7f);
        for (int64_t j = 0; j < size; j++)
            factors.data()[j] = call < rms_norm ? std::pow(10000.0f, -2.0f * j / size) : 1 + 0.1f * j;
        stored.emplace(dtype, x, gate, dout, out);
        angles = factors.view, half = size / 2, angles.shape = &half;
    }

    holdfast_status run(holdfast_context *context) {
        const holdfast_norm norm = call == rms_norm || call == rms_backward ? HOLDFAST_NORM_RMS : HOLDFAST_NORM_LAYER;
        if (call == rotate_backward) {
            const holdfast_rotate_backward_args args = {sizeof args, stored->q(), &angles, nullptr, stored->out(), offset, 0};
            return holdfast_rotate_backward(context, &args);
        }
        if (backward()) {
            const holdfast_head_norm_gate_backward_args args = {
                sizeof args,   stored->q(), stored->k(),    &factors.view, stored->v(),
                stored->out(), &dgate.view, &dfactors.view, norm,          eps};
            return holdfast_head_norm_gate_backward(context, &args);
        }
        if (call < rms_norm) {
            const holdfast_rotate_args args = {
                sizeof args, stored->q(), &angles, nullptr, stored->out(), offset, call == rotate_interleaved};
            return holdfast_rotate(context, &args);
        }
        const holdfast_head_norm_gate_args args = {sizeof args,   stored->q(), stored->k(), &factors.view,
                                                   stored->out(), norm,        eps};
        return holdfast_head_norm_gate(context, &args);
    }
    double bytes() const {
        return (call < rms_norm ? 2.0 : backward() ? 5.0 : 3.0) * (double)(dtype == f32 ? 4 : 2) * (double)x.size;
    }

    /// Largest relative RMS error of a row of the first and the last token.
    std::pair<double, double> errors() {
        stored->load();
        double error = 0;
        for (int64_t row : {(int64_t)0, T * H - 1}) {
            const float *in = x.data() + row * size, *gates = gate.data() + row * size;
            std::vector<double> expected(size);
            for (int64_t j = 0; j < size / 2 && call < rms_norm; j++) {
                const int64_t first = call == rotate_interleaved ? 2 * j : j,
                              second = call == rotate_interleaved ? first + 1 : j + size / 2;
                const auto rotation = reference::rotation(factors.data()[j], offset + row / H);
                const auto turned =
                    std::complex<double>(in[first], in[second]) * (call == rotate_backward ? std::conj(rotation) : rotation);
                expected[first] = turned.real(), expected[second] = turned.imag();
            }
            auto doubles = [&](const float *p) { return std::vector<double>(p, p + size); };
            if (backward()) {
                const reference::NormedRowGradient gradient =
                    reference::head_norm_gate_backward(doubles(in), doubles(gates), doubles(factors.data()),
                                                       doubles(dout.data() + row * size), call == layer_backward, true, eps);
                std::vector<float> dgates(size);
                for (int64_t e = 0; e < size; e++)
                    dgates[e] = dtype == f32 ? dgate.data()[row * size + e] : (float)dtype.decode(dgate.bits()[row * size + e]);
                error = worse(error, Problem::relative_rms(dgates.data(), size, gradient.dgate, size));
                expected = gradient.dx;
            } else if (call >= rms_norm)
                expected = reference::head_norm_gate(doubles(in), doubles(gates), doubles(factors.data()), call == layer_norm,
                                                     true, eps)
                               .out;
            error = worse(error, Problem::relative_rms(out.data() + row * size, size, expected, size));
        }
        return {error, 0};
    }

private:
    const Call call;
    const int64_t T, H, size, offset = 1'000'000;
    const float eps = 1e-6f;
    const Dtype dtype;
    Tensor x, gate, out, factors, dfactors, dout, dgate;  // factors: theta, or weight. out: or dx
    std::optional<Stored> stored;
    DLTensor angles;
    int64_t half;

    bool backward() const { return call >= rms_backward; }
};

/// The problem of this shape. One is kept: benchmarks of a shape are registered one after the other.
Problem &problem(const Shape &shape) {
    static std::unique_ptr<Problem> kept;
    if (!kept || !(kept->shape == shape)) {
        kept.reset();
        kept = std::make_unique<Problem>(shape);
    }
    return *kept;
}

std::map<int, holdfast_bench::Peak> peaks, bf16_peaks;  // by threads
bool failed = false;

std::map<std::pair<size_t, int>, double> copies, updates;  // by bytes and threads

/// Of a variant's errors: of out, and of the state.
std::pair<double, double> allowed_of(const Variant &variant) {
    return {tolerance::relative_rms_of_out(variant.dtype),
            variant.round_operands ? tolerance::relative_rms_of_state(variant.dtype) : tolerance::relative_rms};
}

/// Time call(context), which is to run `variant`, on at most `threads` threads, after one call for which errors_of() says
/// how wrong its out and its state are. Calls per second; nothing if something is wrong.
template<class Call, class Errors>
double calls_per_second(benchmark::State &state, const Variant &variant, int threads, const Call &call, const Errors &errors_of,
                        std::optional<std::pair<double, double>> other_allowed = {}) {
    auto fail = [&](const std::string &text) {
        failed = true;
        state.SkipWithError(text.c_str());
        return 0.0;
    };
    const std::unique_ptr<holdfast_context, void (*)(holdfast_context *)> context(holdfast_context_create(),
                                                                                  holdfast_context_destroy);
    if (!context) return fail("holdfast_context_create: out of memory");
    std::string ran;  // of power retention's parallel form two kernels, where a final state is wanted
    auto remember = [](void *text, const char *message) { *(std::string *)text += std::string(message) + "\n"; };
    holdfast_context_set_verbose(context.get(), remember, &ran);
    if (holdfast_context_set_target(context.get(), variant.target) || holdfast_context_set_threads(context.get(), threads))
        return fail(holdfast_last_error(context.get()));
    if (call(context.get())) return fail(holdfast_last_error(context.get()));
    if (ran.find(std::string(" ") + variant.name + " ") == std::string::npos) return fail("another variant ran: " + ran);
    const auto [error, state_error] = errors_of();
    const auto [allowed, allowed_of_state] = other_allowed ? *other_allowed : allowed_of(variant);
    if (!(error <= allowed && state_error <= allowed_of_state)) {
        std::ostringstream text;
        text << "relative RMS error is " << error << " of out and " << state_error << " of final_state; expected at most "
             << allowed << " and " << allowed_of_state;
        return fail(text.str());
    }
    state.counters["relative_error"] = std::max(error, state_error);
    holdfast_context_set_verbose(context.get(), nullptr, nullptr);

    const auto start = std::chrono::steady_clock::now();
    for (auto _ : state)
        if (call(context.get())) return fail(holdfast_last_error(context.get()));
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    return state.iterations() / seconds.count();
}

benchmark::Counter bytes_counter(double bytes) {
    return benchmark::Counter(bytes, benchmark::Counter::kDefaults, benchmark::Counter::kIs1024);
}

void retention(benchmark::State &state, const Variant &variant, const Shape &shape, int threads) {
    Problem &p = problem(shape);
    holdfast_forward_args args = p.args();
    const bool parallel = variant.is("parallel");
    args.form = parallel ? HOLDFAST_FORM_PARALLEL : variant.is("recurrent") ? HOLDFAST_FORM_RECURRENT : HOLDFAST_FORM_CHUNKWISE;
    if (!parallel) args.chunk_size = variant.chunk;
    p.clear_results();
    auto allowed = allowed_of(variant);
    if (shape.T == 1 && variant.round_operands) allowed.first = tolerance::relative_rms_of_one_token(variant.dtype);
    const double rate = calls_per_second(
        state, variant, threads, [&](holdfast_context *c) { return holdfast_forward(c, &args); }, [&] { return p.errors(); },
        allowed);
    const Operations operations(shape, parallel ? shape.T : variant.chunk);
    const int at_work = (int)std::min<int64_t>(threads, shape.H);
    state.counters["GFLOP/s"] = operations.useful * rate * 1e-9;
    state.counters["square_GFLOP/s"] = operations.square * rate * 1e-9;
    state.counters["peak_share"] = operations.useful * rate / peaks.at(at_work).flops;
    const double bf16_peak = bf16_peaks.at(at_work).flops;
    if (variant.dtype == test::bf16 && bf16_peak > 0) state.counters["bf16_peak_share"] = operations.useful * rate / bf16_peak;
    state.counters["bytes_moved"] = bytes_counter(shape.bytes());
}

/// Power retention, normalized, in chunks or from all weights. The outs of the first head's first tokens are checked; of more the
/// reference would take long. With a final state, what is before the last tokens is forgotten, and those and the state are checked too.
void power(benchmark::State &state, const Variant &variant, const Shape &s, int degree, int threads, bool final_state = false) {
    constexpr int64_t first = 256, last = 64;
    const bool parallel = variant.is("parallel");
    const int64_t D = holdfast_state_size(s.K, degree, HOLDFAST_EXPANSION_TIGHT), end = std::max<int64_t>(s.T - last, 0);
    Tensor states({1, final_state ? s.H : 1, D, s.V}), sums({1, final_state ? s.H : 1, D});
    Tensor q({1, s.T, s.H, s.K}), k({1, s.T, s.H, s.K}), v({1, s.T, s.H, s.V}), out({1, s.T, s.H, s.V}),
        log_decay({1, s.T, s.H});
    std::mt19937 random(1);
    for (Tensor *x : {&q, &k, &v}) x->fill(random, degree % 2 ? 0.2f : -1.7f, 1.7f);  // odd degrees keep the sign of q.k
    Stored stored(s.dtype, q, k, v, out);
    log_decay.fill(random, -0.01f, 0);
    if (final_state && end > 0) std::fill_n(log_decay.data() + end * s.H, s.H, -INFINITY);
    const float none = 0;
    auto reference_of = [&](int64_t from, int64_t tokens, bool of_state) {
        reference::PowerInputs in{1, tokens, 1, 1, s.K, s.V, degree, true};
        auto rows = [&](const Tensor &x, int64_t size) {
            return reference::Strided{x.data() + from * s.H * size, {0, s.H * size, 0, 1}};
        };
        in.q = rows(q, s.K), in.k = rows(k, s.K), in.v = rows(v, s.V), in.log_decay = rows(log_decay, 1);
        in.initial_state = in.initial_keys = {&none, {}}, in.states = of_state;
        return reference::power(in);
    };
    const reference::PowerResult expected = reference_of(0, std::min(s.T, first), false),
                                 expected_last = reference_of(end, final_state ? s.T - end : 0, true);
    holdfast_forward_args args{};
    args.struct_size = sizeof args, args.q = stored.q(), args.k = stored.k(), args.v = stored.v(), args.out = stored.out();
    args.log_decay = &log_decay.view, args.degree = degree;
    args.normalize = HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS;
    if (parallel)
        args.form = HOLDFAST_FORM_PARALLEL;
    else
        args.chunk_size = variant.chunk;
    if (final_state) args.final_state = &states.view, args.final_sum_of_keys = &sums.view;
    const double rate = calls_per_second(
        state, variant, threads, [&](holdfast_context *c) { return holdfast_forward(c, &args); },
        [&] {
            stored.load();
            const int64_t row = s.H * s.V;
            double of_out = Problem::relative_rms(out.data(), row, expected.out, s.V), of_state = 0;
            if (final_state) {
                of_out = worse(of_out, Problem::relative_rms(out.data() + end * row, row, expected_last.out, s.V));
                of_state = Problem::relative_rms(states.data(), s.V, expected_last.state, s.V);
                of_state = worse(of_state, Problem::relative_rms(sums.data(), D, expected_last.keys, D));
            }
            return std::pair(of_out, of_state);
        });
    double operations = final_state ? 2.0 * s.H * s.T * D * (s.V + 1) : 0;
    for (int64_t t = 0, chunk = parallel ? s.T : variant.chunk; t < s.T; t += chunk) {
        const double L = (double)std::min<int64_t>(chunk, s.T - t), of_states = parallel ? 0 : 4 * L * D * (s.V + 1);
        operations += s.H * (L * (L + 1) * (s.K + s.V) + of_states);
    }
    state.counters["GFLOP/s"] = operations * rate * 1e-9;
    state.counters["peak_share"] = operations * rate / peaks.at((int)std::min<int64_t>(threads, s.H)).flops;
}

/// holdfast_backward: of degree 1 with states, of power retention, normalized, with states or all pairs of tokens.
/// After its first tokens, and before its last, the first head forgets all: the gradients there are those of sequences of their
/// own, for which the reference takes little time.
class GradientProblem {
public:
    GradientProblem(const Variant &variant, const Shape &s)
        : s(s), states(!variant.is("parallel_backward")), degree(degree_of(variant)),
          D(holdfast_state_size(s.K, degree, HOLDFAST_EXPANSION_TIGHT)), dtype(s.dtype), q({1, s.T, s.H, s.K}),
          k({1, s.T, s.H, s.K}), v({1, s.T, s.H, s.V}), out({1, s.T, s.H, s.V}), dout({1, s.T, s.H, s.V}), unused({1, 1, 1, 1}),
          log_decay({1, s.T, s.H}), dlog_decay({1, s.T, s.H}), dq(q.shape, dtype), dk(k.shape, dtype), dv(v.shape, dtype),
          dfinal_state({1, s.H, D, s.V}), dfinal_sum({1, s.H, D}), dinitial_state({1, s.H, D, s.V}), dinitial_sum({1, s.H, D}) {
        std::mt19937 random(1);
        for (Tensor *x : {&q, &k}) x->fill(random, degree == 3 ? 0.2f : -1.7f, 1.7f);  // odd degrees keep the sign of q.k
        for (Tensor *x : {&v, &dout}) x->fill(random, -1.7f, 1.7f);
        for (Tensor *x : {&dfinal_state, &dfinal_sum}) std::fill_n(x->data(), x->size, 0.0f);
        log_decay.fill(random, -0.01f, 0);
        if (s.T > most) log_decay.data()[most * s.H] = log_decay.data()[(s.T - most) * s.H] = -INFINITY;
        stored.emplace(dtype, q, k, v, out);
        stored_dout.emplace(dtype, dout, unused, unused, unused);
    }

    /// Where out is normalized the gradient reads it.
    holdfast_status forward() {
        if (degree == 1) return HOLDFAST_OK;
        holdfast_forward_args a{};
        a.struct_size = sizeof a, a.q = stored->q(), a.k = stored->k(), a.v = stored->v(), a.out = stored->out();
        a.log_decay = &log_decay.view, a.degree = degree, a.normalize = HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS;
        const holdfast_status status = holdfast_forward(nullptr, &a);
        stored->load();
        return status;
    }
    holdfast_backward_args args(const Variant &variant) {
        holdfast_backward_args a{};
        a.struct_size = sizeof a, a.q = stored->q(), a.k = stored->k(), a.v = stored->v(), a.log_decay = &log_decay.view;
        a.dout = stored_dout->q(), a.dq = &dq.view, a.dk = &dk.view, a.dv = &dv.view, a.dlog_decay = &dlog_decay.view;
        a.degree = degree, a.form = states ? HOLDFAST_FORM_CHUNKWISE : HOLDFAST_FORM_PARALLEL;
        if (states) a.dfinal_state = &dfinal_state.view, a.dinitial_state = &dinitial_state.view, a.chunk_size = variant.chunk;
        if (degree == 1) return a;
        a.normalize = HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS, a.out = stored->out();
        if (states) a.dfinal_sum_of_keys = &dfinal_sum.view, a.dinitial_sum_of_keys = &dinitial_sum.view;
        return a;
    }

    /// Largest relative RMS errors of the first head's first and last tokens: of dq, dk and dv, and of dlog_decay.
    std::pair<double, double> errors() {
        double of_rows = 0, of_decays = 0;
        for (int64_t from : {(int64_t)0, std::max<int64_t>(s.T - most, 0)}) {
            const int64_t tokens = std::min(most, s.T), K = s.K, V = s.V;
            auto rows = [&](Tensor &x, int64_t size) {
                return reference::Strided{x.data() + from * s.H * size, {0, s.H * size, 0, 1}};
            };
            auto fill = [&](auto &in) {
                in.q = rows(q, K), in.k = rows(k, K), in.v = rows(v, V), in.log_decay = rows(log_decay, 1);
                in.initial_state = {&none, {}}, in.scale = 1 / std::sqrt((double)K);
            };
            std::vector<double> want[4];
            if (degree == 1) {
                reference::Inputs in{1, tokens, 1, K, V};
                fill(in);
                reference::Gradients r = reference::retention_backward(in, rows(dout, V), {});
                want[0] = std::move(r.q), want[1] = std::move(r.k), want[2] = std::move(r.v), want[3] = std::move(r.log_decay);
            } else {
                reference::PowerInputs in{1, tokens, 1, 1, K, V, degree, true};
                fill(in);
                in.initial_keys = {&none, {}}, in.states = false;
                const reference::Strided nothing{&none, {}};
                reference::PowerGradients r = reference::power_backward(in, rows(dout, V), nothing, nothing, rows(out, V));
                want[0] = std::move(r.dq), want[1] = std::move(r.dk), want[2] = std::move(r.dv);
                want[3] = std::move(r.dlog_decay);
            }
            int n = 0;
            for (auto [x, size] : {std::pair(&dq, K), {&dk, K}, {&dv, V}}) {
                std::vector<float> got;
                for (int64_t t = from; t < from + tokens; t++)
                    for (int64_t d = 0; d < size; d++) {
                        const int64_t at = t * s.H * size + d;
                        got.push_back(dtype == f32 ? x->data()[at] : (float)dtype.decode(x->bits()[at]));
                    }
                of_rows = worse(of_rows, Problem::relative_rms(got.data(), size, want[n++], size));
            }
            of_decays = worse(of_decays, Problem::relative_rms(dlog_decay.data() + from * s.H, s.H, want[3], 1));
        }
        return {of_rows, of_decays};
    }
    static constexpr int64_t most = 64;  // tokens that are checked at each end

    double operations(int64_t chunk) const {
        double sum = 0;
        for (int64_t t = 0, length = states ? chunk : s.T; t < s.T; t += length) {
            const double L = (double)std::min<int64_t>(length, s.T - t), of_states = 10 * L * (double)D * (s.V + (degree > 1));
            sum += s.H * (L * (L + 1) * (3 * s.K + 2 * s.V) + (states ? of_states : 0));
        }
        return sum;
    }

private:
    const Shape s;
    const bool states;
    const int degree;
    const int64_t D;
    const Dtype dtype;
    const float none = 0;
    Tensor q, k, v, out, dout, unused, log_decay, dlog_decay, dq, dk, dv;
    Tensor dfinal_state, dfinal_sum, dinitial_state, dinitial_sum;
    std::optional<Stored> stored, stored_dout;
};

void gradient(benchmark::State &state, const Variant &variant, const Shape &shape, int threads) {
    GradientProblem p(variant, shape);
    if (p.forward()) {
        failed = true;
        return state.SkipWithError(holdfast_last_error(nullptr));
    }
    const holdfast_backward_args args = p.args(variant);
    const double of_rows = tolerance::relative_rms_of_gradient_of_rows(variant.dtype);
    const double of_decays = variant.round_operands
                                 ? tolerance::relative_rms_of_rounded_gates(variant.dtype, GradientProblem::most)
                                 : tolerance::relative_rms_of_gradient;
    const double rate = calls_per_second(
        state, variant, threads, [&](holdfast_context *c) { return holdfast_backward(c, &args); }, [&] { return p.errors(); },
        std::pair(of_rows, of_decays));
    const double operations = p.operations(variant.chunk);
    state.counters["GFLOP/s"] = operations * rate * 1e-9;
    state.counters["peak_share"] = operations * rate / peaks.at((int)std::min<int64_t>(threads, shape.H)).flops;
}

/// Counters of a kernel that moves so many bytes a call, over memory of `size`, which it changes `in_place`.
void bandwidth(benchmark::State &state, double bytes, size_t size, double rate, int threads, bool in_place) {
    const std::pair<size_t, int> memory(size, threads);
    auto &known = in_place ? updates : copies;
    if (!known.count(memory))
        known[memory] = in_place ? holdfast_bench::measure_update(size, threads) : holdfast_bench::measure_copy(size, threads);
    state.counters["bytes_moved"] = bytes_counter(bytes);
    state.counters["GB/s"] = bytes * rate * 1e-9;
    state.counters[in_place ? "update_share" : "copy_share"] = bytes * rate / known.at(memory);
}

void step(benchmark::State &state, const Variant &variant, int64_t B, int64_t H, int64_t K, int64_t V, int threads) {
    StepProblem p(B, H, K, V, variant.dtype);
    holdfast_step_args args = p.args();
    const double rate = calls_per_second(
        state, variant, threads, [&](holdfast_context *c) { return holdfast_step(c, &args); }, [&] { return p.errors(); });
    bandwidth(state, p.bytes(), (size_t)p.state_bytes() / 2, rate, threads, true);
}

/// One token of power retention, normalized, checked for the first head.
void power_step(benchmark::State &state, const Variant &variant, int64_t B, int64_t H, int64_t K, int64_t V, int degree,
                int threads) {
    const int64_t D = holdfast_state_size(K, degree, HOLDFAST_EXPANSION_TIGHT);
    Tensor q({B, H, K}), k({B, H, K}), v({B, H, V}), out({B, H, V}), log_decay({B, H}), states({B, H, D, V}), keys({B, H, D});
    std::mt19937 random(1);
    for (Tensor *x : {&q, &k, &v}) x->fill(random, 0.2f, 1.7f);  // the sum of weights stays away from 0
    Stored stored(variant.dtype, q, k, v, out);
    log_decay.fill(random, -0.05f, 0);
    for (Tensor *x : {&states, &keys})
        for (int64_t n = 0; n < x->size; n++) x->data()[n] = (float)(n % 17) / 17;
    reference::PowerInputs in{1, 1, 1, 1, K, V, degree, true};
    in.q = {q.data(), {0, 0, 0, 1}}, in.k = {k.data(), {0, 0, 0, 1}}, in.v = {v.data(), {0, 0, 0, 1}};
    in.log_decay = {log_decay.data(), {}}, in.initial_state = {states.data(), {0, 0, V, 1}};
    in.initial_keys = {keys.data(), {0, 0, 1}};
    const reference::PowerResult expected = reference::power(in);
    holdfast_step_args args{};
    args.struct_size = sizeof args, args.q = stored.q(), args.k = stored.k(), args.v = stored.v(), args.out = stored.out();
    args.log_decay = &log_decay.view, args.state = &states.view, args.sum_of_keys = &keys.view, args.degree = degree;
    args.normalize = HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS;
    const double rate = calls_per_second(
        state, variant, threads, [&](holdfast_context *c) { return holdfast_step(c, &args); },
        [&] {
            stored.load();
            return std::pair(Problem::relative_rms(out.data(), V, expected.out, V),
                             Problem::relative_rms(states.data(), V, expected.state, V));
        });
    bandwidth(state, 2.0 * sizeof(float) * (double)(states.size + keys.size), (size_t)states.size * sizeof(float), rate,
              threads, true);
}

void rows(benchmark::State &state, const Variant &variant, RowsProblem::Call call, int64_t T, int64_t H, int64_t size,
          int threads) {
    RowsProblem p(call, T, H, size, variant.dtype);
    const double rate =
        calls_per_second(state, variant, threads, [&](holdfast_context *c) { return p.run(c); }, [&] { return p.errors(); });
    bandwidth(state, p.bytes(), (size_t)p.bytes(), rate, threads, false);
}

using Size = std::pair<int, int>;             // K, V
const Size untuned[] = {{64, 64}, {80, 80}};  // at which rows for any size are timed, where the target has none for just these

/// Whether to time the row at that size: calls of that size must run it when its target is forced.
bool serves(const Variant &row, Size size) {
    if (row.key_size) return Size(row.key_size, row.value_size) == size;
    return std::find(std::begin(untuned), std::end(untuned), size) != std::end(untuned) &&
           std::none_of(std::begin(variants), std::end(variants), [&](const Variant &other) {
               return !std::strcmp(other.kernel, row.kernel) && !std::strcmp(other.target, row.target) &&
                      other.dtype == row.dtype && Size(other.key_size, other.value_size) == size;
           });
}

/// Every size at which some row is timed.
std::vector<Size> sizes() {
    std::vector<Size> list(std::begin(untuned), std::end(untuned));
    for (const Variant &v : variants) {
        const Size size(v.key_size, v.value_size);
        if (v.key_size && std::find(list.begin(), list.end(), size) == list.end()) list.push_back(size);
    }
    return list;
}

/// Calls on GPUs are made for some kernels only.
bool on_cpu(const Variant &row) {
    holdfast_backend cpu{};
    cpu.struct_size = sizeof cpu;
    holdfast_backend_at(0, &cpu);
    return (" " + std::string(cpu.targets) + " ").find(" " + std::string(row.target) + " ") != std::string::npos;
}

bool runs_here(const Variant &row) {
    for (int n = 0; n < holdfast_variant_count(); n++) {
        holdfast_variant listed{};
        holdfast_variant_at(nullptr, n, &listed);
        if (!std::strcmp(listed.name, row.name)) return listed.runs_here;
    }
    return false;
}

/// What is timed of a row: nothing, one short call, or all.
enum class Part { none, sample, all };

/// `targets` as --targets has them; `size`: nothing for kernels that have none.
Part part_of(const Variant &row, Size size, const std::vector<std::string> &targets) {
    auto named = [&](const char *name) { return std::find(targets.begin(), targets.end(), name) != targets.end(); };
    if (!runs_here(row)) return Part::none;
    if (!named("best")) return named("all") || named(row.target) ? Part::all : Part::none;
    if (!on_cpu(row)) return Part::none;
    for (const Variant &other : variants)  // those of the best target come first
        if (!std::strcmp(other.kernel, row.kernel) && other.dtype == row.dtype && degree_of(other) == degree_of(row) &&
            (size == Size() || serves(other, size)) && on_cpu(other) && runs_here(other))
            return !std::strcmp(other.target, row.target) ? Part::all : Part::sample;
    return Part::none;
}

double features(int K, int degree) { return (double)holdfast_state_size(K, degree, HOLDFAST_EXPANSION_TIGHT); }

/// Of so many heads the share that may be, one at least.
int64_t heads_within(double share, int64_t heads) { return std::clamp<int64_t>((int64_t)(share * (double)heads), 1, heads); }

std::string cpu_name() {
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);)
        if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
    return "unknown";
}

std::vector<std::string> parse_list(const std::string &text) {
    std::vector<std::string> list;
    std::istringstream stream(text);
    for (std::string item; std::getline(stream, item, ',');) list.push_back(item);
    return list;
}

}  // namespace

int main(int argc, char **argv) {
    int heads = 8;
    std::vector<std::string> targets = {"best"};
    std::vector<int> threads = {1};
    if (const int cores = (int)std::thread::hardware_concurrency(); cores > 1) threads.push_back(cores);
    char short_runs[] = "--benchmark_min_time=0.1";  // there are hundreds; what the caller says comes later and wins
    std::vector<char *> arguments(argv, argv + argc);
    arguments.insert(arguments.begin() + 1, short_runs);
    int count = (int)arguments.size();
    benchmark::Initialize(&count, arguments.data());
    for (int n = 1; n < count; n++) {
        const std::string arg = arguments[n], option = arg.substr(0, arg.find('=') + 1), value = arg.substr(option.size());
        try {
            if (option == "--heads=")
                heads = std::stoi(value);
            else if (option == "--threads=") {
                threads.clear();
                for (const std::string &item : parse_list(value)) threads.push_back(std::stoi(item));
            } else if (option == "--targets=")
                targets = parse_list(value);
            else
                throw std::invalid_argument(arg);
            if (heads < 1 || threads.empty() || *std::min_element(threads.begin(), threads.end()) < 1 || targets.empty())
                throw std::invalid_argument(arg);
        } catch (const std::exception &) {
            std::fprintf(stderr,
                         "%s: cannot use '%s'; expected --heads=N, --threads=N,..., --targets=NAME,..., or --benchmark_...\n",
                         argv[0], arg.c_str());
            return 2;
        }
    }

    benchmark::AddCustomContext("cpu", cpu_name());
    benchmark::AddCustomContext("cpu_features", holdfast_cpu_features());
    benchmark::AddCustomContext("holdfast_version", holdfast_version());
    auto add = [](const std::ostringstream &name, std::function<void(benchmark::State &)> run) {
        benchmark::RegisterBenchmark(name.str().c_str(), std::move(run))->UseRealTime()->Unit(benchmark::kMicrosecond);
    };
    // Threads that have no head share one's columns of values, by other variants: of fewer heads than asked for they get none.
    std::set<int> at_work;  // threads of which the peak is wanted
    auto few = [&](int at_most, int64_t H) { return H < heads && at_most > H; };
    auto add_of_heads = [&](const Variant &row, const Shape &shape, int at_most, const std::string &more,
                            std::function<void(benchmark::State &)> run) {
        std::ostringstream name;
        name << row.name << "/T:" << shape.T << "/H:" << shape.H << "/K:" << shape.K << "/V:" << shape.V << more
             << "/threads:" << at_most;
        at_work.insert((int)std::min<int64_t>(at_most, shape.H));
        add(name, std::move(run));
    };
    for (const Size &size : sizes()) {
        const int K = size.first, V = size.second;
        auto each_row = [&](const char *kernel, const Dtype &dtype, bool of_sample, auto &&add_row) {
            for (const Variant &row : variants) {
                if (!row.is(kernel) || !(row.dtype == dtype) || !serves(row, size)) continue;
                const Part part = part_of(row, size, targets);
                if (part == Part::all)
                    for (int at_most : threads) add_row(row, at_most);
                else if (part == Part::sample && of_sample)
                    add_row(row, threads.front());
            }
        };
        const bool retnet = size == Size(256, 512);
        for (int64_t T : lengths)
            for (const Dtype &dtype : test::all_dtypes) {
                Shape shape = {T, heads, K, V, dtype};
                shape.H = heads_within(most_bytes / shape.bytes(), heads);
                std::vector<int64_t> all_heads = {shape.H};
                for (int64_t H : retnet_heads)
                    if (retnet && T == 4096 && heads > 1 && H != heads) all_heads.push_back(H);
                for (int64_t H : all_heads) {
                    shape.H = H;
                    for (const char *kernel : {"chunkwise", "parallel", "recurrent"})
                        each_row(kernel, dtype, T == sample_length, [&](const Variant &row, int at_most) {
                            if ((row.is("parallel") && T > longest_parallel) || few(at_most, H)) return;
                            if (row.is("recurrent") && (row.chunk == 0 || T < row.chunk)) return;  // steps are below
                            add_of_heads(row, shape, at_most, "",
                                         [=, &row](benchmark::State &state) { retention(state, row, shape, at_most); });
                        });
                    for (const char *kernel : {"chunkwise_backward", "power_backward", "parallel_backward"})
                        each_row(kernel, dtype, T == sample_length, [&](const Variant &row, int at_most) {
                            if ((T != 256 && T != 4096) || !on_cpu(row)) return;
                            const int degree = degree_of(row);
                            Shape s = shape;
                            if (row.is("power_backward"))
                                s.H = heads_within(most_operations / (10.0 * T * (V + 1) * H * features(K, degree)), H);
                            if (few(at_most, s.H)) return;
                            add_of_heads(row, s, at_most, degree == 1 ? "" : "/degree:" + std::to_string(degree),
                                         [=, &row](benchmark::State &state) { gradient(state, row, s, at_most); });
                        });
                }
            }
        for (int64_t T : lengths)
            for (const Dtype &dtype : test::all_dtypes) {
                each_row("parallel", dtype, T == sample_length, [&](const Variant &row, int at_most) {  // as auto takes it
                    const Shape shape = {T, heads, K, V, dtype};
                    if (T > longest_parallel || at_most > shape.H || !on_cpu(row)) return;
                    for (bool final_state : {false, true})
                        add_of_heads(row, shape, at_most, final_state ? "/degree:2/final_state:1" : "/degree:2",
                                     [=, &row](benchmark::State &state) { power(state, row, shape, 2, at_most, final_state); });
                });
                each_row("power", dtype, T == sample_length, [&](const Variant &row, int at_most) {
                    const int degree = degree_of(row);
                    Shape shape = {T, heads, K, V, dtype};
                    const double operations = 4.0 * T * (V + 1) * heads * features(K, degree);
                    if (T > 4096)
                        shape.H = heads_within(std::min(most_bytes / shape.bytes(), most_operations / operations), heads);
                    if (at_most > shape.H || !on_cpu(row)) return;  // columns of values would go to other variants
                    add_of_heads(row, shape, at_most, "/degree:" + std::to_string(degree),
                                 [=, &row](benchmark::State &state) { power(state, row, shape, degree, at_most); });
                });
            }
        for (const Dtype &dtype : test::all_dtypes)
            for (bool one : {true, false})
                each_row("power_step", dtype, one, [&](const Variant &row, int at_most) {
                    if (!on_cpu(row)) return;
                    const int degree = degree_of(row);
                    const double states = sizeof(float) * (double)heads * V * features(K, degree);
                    const int64_t B = one ? 1 : (int64_t)std::ceil(states_in_memory / states);
                    std::ostringstream name;
                    name << row.name << "/B:" << B << "/H:" << heads << "/K:" << K << "/V:" << V << "/degree:" << degree
                         << "/threads:" << at_most;
                    add(name, [=, &row](benchmark::State &state) { power_step(state, row, B, heads, K, V, degree, at_most); });
                });
        for (int64_t B : {(int64_t)1, (int64_t)std::ceil(states_in_memory / (sizeof(float) * (double)heads * K * V))})
            for (const Dtype &dtype : test::all_dtypes)
                each_row("recurrent", dtype, B == 1, [&](const Variant &row, int at_most) {
                    if (row.chunk) return;
                    std::ostringstream name;
                    name << row.name << "/B:" << B << "/H:" << heads << "/K:" << K << "/V:" << V << "/threads:" << at_most;
                    add(name, [=, &row](benchmark::State &state) { step(state, row, B, heads, K, V, at_most); });
                });
    }
    for (const Variant &row : variants)
        for (RowsProblem::Call call :
             {RowsProblem::rotate_halves, RowsProblem::rotate_interleaved, RowsProblem::rotate_backward, RowsProblem::rms_norm,
              RowsProblem::layer_norm, RowsProblem::rms_backward, RowsProblem::layer_backward})
            for (int size : {64, 128})
                for (int64_t T : {256, 4096, 65536})
                    for (int at_most : threads) {
                        if (!row.is(RowsProblem::kernel(call)) || !on_cpu(row)) continue;
                        if (T == 65536 && size != 64) continue;  // in memory all are alike
                        const Part part = part_of(row, {}, targets);
                        const bool in_sample = T == sample_length && at_most == threads.front();
                        if (part == Part::none || (part == Part::sample && !in_sample)) continue;
                        std::ostringstream name;
                        name << row.name << "/" << RowsProblem::names[call] << "/T:" << T << "/H:" << heads << "/size:" << size
                             << "/threads:" << at_most;
                        add(name, [=, &row](benchmark::State &state) { rows(state, row, call, T, heads, size, at_most); });
                    }
    for (int n : at_work) {
        peaks[n] = holdfast_bench::measure_peak(n), bf16_peaks[n] = holdfast_bench::measure_bf16_peak(n);
        for (const auto &[kind, peak] : {std::pair("peak", peaks[n]), {"bf16_peak", bf16_peaks[n]}})
            benchmark::AddCustomContext(std::string(kind) + "_GFLOP/s of " + std::to_string(n) + " threads, " + peak.unit,
                                        std::to_string(peak.flops * 1e-9));
    }
    const size_t ran = benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
    return failed || ran == 0;  // a filter that fits nothing is a mistake
}
