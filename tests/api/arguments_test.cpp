// What holdfast_forward says to bad arguments: every status, a text that names the argument with what it was and what was
// expected, and nothing written.
#include "../forward.h"
#include "bad_argument.h"

#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <tuple>

namespace {
using namespace test;

constexpr int64_t B = 2, T = 5, H = 3, K = 4, V = 6;

/// A good call, to be spoilt. `memory` is one more array to point into.
struct Call {
    Problem p{B, T, H, K, V};
    Forward f = p.forward();
    DLTensor q = f.q.dl(), k = f.k.dl(), v = f.v.dl(), log_decay = f.log_decay.dl(), initial_state = f.initial_state.dl(),
             out = f.out.dl(), final_state = f.final_state.dl();
    Array sums = Array({2, B, H, K}).fill(p.random), all_weights = Array({B, H, T, T}), inside = Array({B * 4, H, K, V});
    Tensor initial_sum_view = Tensor(sums).part(0, 0, 1).without(0), final_sum_view = Tensor(sums).part(0, 1, 2).without(0),
           weights_view = all_weights, states_view = inside;
    DLTensor initial_sum = initial_sum_view.dl(), final_sum = final_sum_view.dl(), weights = weights_view.dl(),
             states = states_view.dl();
    int64_t starts[3] = {0, 2, T}, sequences[1] = {3};
    DLTensor cu_seqlens = {starts, {kDLCPU, 0}, 1, {kDLInt, 64, 1}, sequences, nullptr, 0};
    holdfast_forward_args args = forward_args(&q, &k, &v, &log_decay, &initial_state, &out, &final_state);
    Array memory = Array({4096}).fill(-1.0f);
    std::unique_ptr<Reserved> far;
    Index other_strides;  // for a tensor that needs more than its own

    Call() = default;
    Call(const Call &) = delete;

    DLTensor &tensor(const std::string &name) {
        const std::map<std::string, DLTensor *> all = {{"q", &q},
                                                       {"k", &k},
                                                       {"v", &v},
                                                       {"out", &out},
                                                       {"log_decay", &log_decay},
                                                       {"initial_state", &initial_state},
                                                       {"final_state", &final_state}};
        return *all.at(name);
    }
    /// Put a compact tensor of that shape at `offset` of `memory`.
    void place(DLTensor &x, int64_t offset) {
        x.data = memory.data() + offset;
        x.strides = nullptr;
    }
    /// Put a tensor into the middle of 64 GB where nothing else is.
    void place_far(DLTensor &x) {
        constexpr size_t bytes = (size_t)64 << 30;
        far = std::make_unique<Reserved>(bytes);
        EXPECT_TRUE(*far) << "no address space of 64 GB";
        x.data = far->floats() + bytes / sizeof(float) / 2;
    }
    /// Put compact q, k, v and out of 16 bits an element into `memory`, 1024 bytes apart.
    void narrow(DLDataTypeCode code) {
        int64_t offset = 0;
        for (DLTensor *x : {&q, &k, &v, &out}) {
            x->dtype = {(uint8_t)code, 16, 1};
            x->data = (char *)memory.data() + 1024 * offset++;
            x->strides = nullptr;
        }
    }
    /// A decay per head, where there was one per token.
    void decay_per_head() {
        log_decay.ndim = 1;
        log_decay.shape[0] = H;
        log_decay.strides = nullptr;
    }
    /// One batch entry as two sequences.
    void pack() {
        for (DLTensor *x : {&q, &k, &v, &out, &log_decay}) x->shape[0] = 1;
        args.cu_seqlens = &cu_seqlens;
    }
    /// Out is normalized.
    void sum_up() {
        args.normalize = HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS;
        args.initial_sum_of_keys = &initial_sum, args.final_sum_of_keys = &final_sum;
    }
    /// States after 0, 2, 4 and 5 tokens.
    void want_states() { args.states = &states, args.state_interval = 2; }
    void want_weights() { args.weights = &weights, args.form = HOLDFAST_FORM_PARALLEL; }
    /// One head of keys for all of queries.
    void group() { k.shape[2] = v.shape[2] = log_decay.shape[2] = initial_state.shape[1] = final_state.shape[1] = 1; }
    /// The states with their last two axes changed.
    void value_major() {
        args.state_layout = HOLDFAST_STATE_VALUE_MAJOR;
        for (DLTensor *x : {&initial_state, &final_state}) std::swap(x->shape[2], x->shape[3]), x->strides = nullptr;
    }
    std::vector<const Array *> arrays() const {
        return {&p.q,           &p.k,  &p.v,         &p.log_decay, &p.initial_state, &p.out,
                &p.final_state, &sums, &all_weights, &inside,      &memory};
    }
};

struct Case {
    std::string name;
    holdfast_status status;
    std::string text;  // part of what the library says
    std::function<void(Call &)> spoil;
};
void PrintTo(const Case &c, std::ostream *stream) { *stream << c.name; }

const std::vector<std::pair<std::string, std::string>> tensors = {
    {"q", "BTHK"},          {"k", "BTHK"}, {"v", "BTHV"}, {"out", "BTHV"}, {"log_decay", "BTH"}, {"initial_state", "BHKV"},
    {"final_state", "BHKV"}};
int64_t extent(char axis) { return axis == 'B' ? B : axis == 'T' ? T : axis == 'H' ? H : axis == 'K' ? K : V; }
bool is_output(const std::string &name) { return name == "out" || name == "final_state"; }

std::vector<Case> cases() {
    constexpr holdfast_status invalid = HOLDFAST_INVALID_ARGUMENT, unsupported = HOLDFAST_UNSUPPORTED;
    constexpr int64_t huge = std::numeric_limits<int64_t>::max();
    const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
    std::vector<Case> list;
    auto add = [&](const std::string &name, holdfast_status status, const std::string &text,
                   std::function<void(Call &)> spoil) { list.push_back({name, status, text, std::move(spoil)}); };

    // ---- States inside sequences.
    auto states = [](std::function<void(Call &)> spoil) { return [spoil](Call &c) { c.want_states(), spoil(c); }; };
    add("states_without_interval", invalid, "state_interval is 0 and states is given; expected at least 1",
        states([](Call &c) { c.args.state_interval = 0; }));
    add("states_with_negative_interval", invalid, "state_interval is -3 and states is given; expected at least 1",
        states([](Call &c) { c.args.state_interval = -3; }));
    add("interval_without_states", invalid, "state_interval is 2 and states is NULL; expected 0",
        states([](Call &c) { c.args.states = nullptr; }));
    add("too_few_states", invalid,
        "states [M, Hk, D, V] has M = 7; expected 8, of each sequence T / state_interval, rounded up, and one more",
        states([](Call &c) { c.states.shape[0] = 7; }));
    add("states_of_another_interval", invalid, "states [M, Hk, D, V] has M = 8; expected 12",
        states([](Call &c) { c.args.state_interval = 1; }));
    add("packed_states", invalid, "states [M, Hk, D, V] has M = 8; expected 5", states([](Call &c) { c.pack(); }));
    add("states_of_other_heads", invalid, "states [M, Hk, D, V] has Hk = 2; expected 3",
        states([](Call &c) { c.states.shape[1] = 2; }));
    add("states_of_other_order", invalid, "states [M, Hk, V, D] has D = 6; expected 4",
        states([](Call &c) { c.args.state_layout = HOLDFAST_STATE_VALUE_MAJOR, c.value_major(); }));
    add("states_of_doubles", unsupported, "states", states([](Call &c) { c.states.dtype.bits = 64; }));
    add("states_in_out", invalid, "states", states([](Call &c) { c.states.data = c.out.data; }));
    add("states_in_q", invalid, "states", states([](Call &c) { c.states.data = c.q.data; }));
    add("states_of_one_element", invalid, "states", states([](Call &c) {
            c.other_strides = {0, K * V, V, 1};
            c.states.strides = c.other_strides.data();
        }));
    add("states_of_normalized", unsupported,
        "states is given and out, of degree 1, is normalized; expected degree 1 without normalization, or NULL",
        states([](Call &c) { c.sum_up(); }));
    add("states_of_degree_2", unsupported, "states is given and out, of degree 2, is not normalized; expected degree 1",
        states([](Call &c) {
            c.args.degree = 2, c.args.normalize = HOLDFAST_NORMALIZE_NONE;
            c.args.initial_state = nullptr, c.args.final_state = nullptr;
        }));
    for (holdfast_form form : {HOLDFAST_FORM_PARALLEL, HOLDFAST_FORM_RECURRENT})
        add("states_of_form_" + std::to_string(form), invalid,
            "states is given and form is " + std::to_string(form) + "; expected 2, HOLDFAST_FORM_CHUNKWISE, or 0",
            states([form](Call &c) { c.args.form = form; }));

    // ---- The struct.
    for (size_t size : {(size_t)0, (size_t)1, sizeof(void *), offsetof(holdfast_forward_args, chunk_size),
                        offsetof(holdfast_forward_args, workspace) - 1})
        add("struct_size_" + std::to_string(size), invalid,
            "args.struct_size is " + std::to_string(size) + "; expected sizeof(holdfast_forward_args)",
            [=](Call &c) { c.args.struct_size = size; });
    add("scale_nan", invalid, "scale is nan; expected a finite number", [=](Call &c) { c.args.scale = nan; });
    add("scale_inf", invalid, "scale is inf; expected a finite number", [=](Call &c) { c.args.scale = infinity; });
    add("scale_minus_inf", invalid, "scale is -inf; expected a finite number", [=](Call &c) { c.args.scale = -infinity; });
    add("chunk_size_negative", invalid, "chunk_size is -1; expected at least 0", [](Call &c) { c.args.chunk_size = -1; });
    add("chunk_size_least", invalid, "chunk_size is -9223372036854775808; expected at least 0",
        [](Call &c) { c.args.chunk_size = std::numeric_limits<int64_t>::min(); });

    // ---- Options.
    const std::tuple<const char *, int32_t holdfast_forward_args::*, int32_t> options[] = {
        {"degree", &holdfast_forward_args::degree, 4},
        {"normalize", &holdfast_forward_args::normalize, 2},
        {"form", &holdfast_forward_args::form, 3},
        {"state_layout", &holdfast_forward_args::state_layout, 1},
        {"expansion", &holdfast_forward_args::expansion, 1}};
    for (const auto &[option, field, most] : options)
        for (int32_t value : {-1, most + 1}) {
            const auto where = field;
            add(std::string(option) + (value < 0 ? "_negative" : "_too_large"), invalid,
                std::string(option) + " is " + std::to_string(value) + "; expected 0 to " + std::to_string(most),
                [=](Call &c) { c.args.*where = value; });
        }
    add("tiled_of_degree_1", invalid,
        "expansion is HOLDFAST_EXPANSION_TILED, degree 1 and K of q 4; expected degree 2 and K a multiple of 16",
        [](Call &c) { c.args.expansion = HOLDFAST_EXPANSION_TILED; });
    add("tiled_of_other_K", invalid,
        "expansion is HOLDFAST_EXPANSION_TILED, degree 2 and K of q 4; expected degree 2 and K a multiple of 16",
        [](Call &c) { c.args.expansion = HOLDFAST_EXPANSION_TILED, c.args.degree = 2; });
    // 4 features make 10 monomials of degree 2, 20 of degree 3, 35 of degree 4; 32 in tiles make 128 * 2 * 3.
    for (int32_t degree : {2, 3, 4}) {
        const int64_t size[] = {10, 20, 35};
        add("state_of_degree_" + std::to_string(degree), invalid,
            "initial_state [N, Hk, D, V] has D = 4; expected " + std::to_string(size[degree - 2]) +
                ", the size of q's K features expanded",
            [=](Call &c) { c.args.degree = degree; });
    }
    add("state_of_tiles", invalid, "initial_state [N, Hk, D, V] has D = 4; expected 768, the size of q's K features expanded",
        [](Call &c) {
            c.args.expansion = HOLDFAST_EXPANSION_TILED, c.args.degree = 2, c.q.shape[3] = c.k.shape[3] = 32;
            c.place(c.q, 0), c.place(c.k, 0);
        });
    add("state_too_large_when_expanded", unsupported,
        "q has K = 256 and v has V = 6, degree 4; expected D V, D the size of an expanded key, of at most 268435456",
        [](Call &c) {
            c.q.shape[0] = c.k.shape[0] = c.v.shape[0] = c.out.shape[0] = 0, c.q.shape[3] = c.k.shape[3] = 256;
            c.args.degree = 4;
        });
    add("state_too_large_of_chunks", unsupported, "q has K = 256 and v has V = 6, degree 4; expected D V", [](Call &c) {
        c.args.initial_state = nullptr, c.args.final_state = nullptr;
        c.q.shape[0] = c.k.shape[0] = c.v.shape[0] = c.out.shape[0] = 0, c.q.shape[3] = c.k.shape[3] = 256;
        c.args.degree = 4, c.args.form = HOLDFAST_FORM_CHUNKWISE;
    });
    add("features_beyond_32_bits", unsupported,
        "q has K = 256, degree 4; expected an expanded key of at most 89478485 features", [](Call &c) {
            c.q.shape[0] = c.k.shape[0] = c.v.shape[0] = c.out.shape[0] = 0, c.q.shape[3] = c.k.shape[3] = 256;
            c.v.shape[3] = c.out.shape[3] = 1, c.args.degree = 4;
        });
    add("degree_beyond_all_sizes", unsupported, "q has K = 2147483647 and v has V = 6, degree 4; expected D V", [](Call &c) {
        c.q.shape[0] = c.v.shape[0] = 0, c.q.shape[3] = std::numeric_limits<int32_t>::max(), c.args.degree = 4;
    });
    add("state_of_other_layout", invalid, "initial_state [N, Hk, V, D] has D = 6; expected 4, the K of q",
        [](Call &c) { c.args.state_layout = HOLDFAST_STATE_VALUE_MAJOR; });

    // ---- Heads in groups.
    add("heads_in_no_groups", invalid, "k [B, T, Hk, K] has Hk = 2; expected a divisor of 3, the H of q",
        [](Call &c) { c.k.shape[2] = 2; });
    add("no_heads_of_keys", invalid, "k [B, T, Hk, K] has Hk = 0; expected a divisor of 3, the H of q",
        [](Call &c) { c.k.shape[2] = 0; });
    add("values_of_other_heads", invalid, "v [B, T, Hk, V] has Hk = 3; expected 1, that of k",
        [](Call &c) { c.k.shape[2] = 1; });

    // ---- Packed sequences: here of 2 and 3 tokens.
    auto add_packed = [&](const std::string &name, holdfast_status status, const std::string &text,
                          std::function<void(Call &)> spoil) {
        add("packed_" + name, status, text, [=](Call &c) {
            c.pack();
            spoil(c);
        });
    };
    add_packed("of_two_batch_entries", invalid, "cu_seqlens is given and q [B, T, H, K] has B = 2; expected 1", [](Call &c) {
        for (DLTensor *x : {&c.q, &c.k, &c.v, &c.out, &c.log_decay}) x->shape[0] = 2;
    });
    add_packed("states_of_batch_entries", invalid,
               "initial_state [N, Hk, D, V] has N = 1; expected 2, the sequences of cu_seqlens",
               [](Call &c) { c.initial_state.shape[0] = 1; });
    for (auto [type, text] : {std::pair<DLDataType, const char *>{{kDLFloat, 32, 1}, "float32"}, {{kDLInt, 16, 1}, "int16"}}) {
        const DLDataType other = type;
        add_packed(std::string("by_") + text, unsupported,
                   std::string("cu_seqlens has dtype ") + text + "; expected int32 or int64",
                   [=](Call &c) { c.cu_seqlens.dtype = other; });
    }
    add_packed("rank", invalid, "cu_seqlens has 2 dimensions; expected 1, [N + 1]", [](Call &c) { c.cu_seqlens.ndim = 2; });
    add_packed("none", invalid, "cu_seqlens [N + 1] has N + 1 = 1; expected at least 2",
               [](Call &c) { c.cu_seqlens.shape[0] = 1; });
    add_packed("from_1", invalid, "cu_seqlens[0] is 1; expected 0", [](Call &c) { c.starts[0] = 1; });
    add_packed("falling", invalid, "cu_seqlens[1] is -1; expected 0 to 5", [](Call &c) { c.starts[1] = -1; });
    add_packed("beyond_T", invalid, "cu_seqlens[1] is 6; expected 0 to 5", [](Call &c) { c.starts[1] = 6; });
    add_packed("short_of_T", invalid, "cu_seqlens[2] is 4; expected 5, the T of q", [](Call &c) { c.starts[2] = 4; });

    // ---- Sums of keys.
    for (const bool initial : {true, false}) {
        const std::string who = initial ? "initial_sum_of_keys" : "final_sum_of_keys";
        auto add_sum = [&](const std::string &name, const std::string &text, std::function<void(Call &, DLTensor &)> spoil) {
            add(who + "_" + name, invalid, who + text, [=](Call &c) {
                c.sum_up();
                spoil(c, initial ? c.initial_sum : c.final_sum);
            });
        };
        add_sum("without_sum", " is given and out, of degree 1, is not normalized; expected NULL", [=](Call &c, DLTensor &) {
            c.args.normalize = HOLDFAST_NORMALIZE_DEFAULT;
            if (!initial) c.args.initial_sum_of_keys = nullptr;
        });
        add_sum("of_other_batch", " [N, Hk, D] has N = 1; expected 2, the B of q", [](Call &, DLTensor &x) { x.shape[0] = 1; });
        add_sum("of_other_heads", " [N, Hk, D] has Hk = 2; expected 3, that of k", [](Call &, DLTensor &x) { x.shape[1] = 2; });
        add_sum("of_other_size", " [N, Hk, D] has D = 5; expected 4, the K of q", [](Call &, DLTensor &x) { x.shape[2] = 5; });
    }
    add("initial_state_without_its_sum", invalid,
        "initial_sum_of_keys is NULL and initial_state is given; expected both or neither",
        [](Call &c) { c.sum_up(), c.args.initial_sum_of_keys = nullptr; });
    add("initial_sum_without_its_state", invalid,
        "initial_state is NULL and initial_sum_of_keys is given; expected both or neither",
        [](Call &c) { c.sum_up(), c.args.initial_state = nullptr; });
    add("final_sum_overlaps_final_state", invalid, " overlaps ", [](Call &c) {
        c.sum_up();
        c.place(c.final_state, 1024), c.place(c.final_sum, 1025);
    });

    // ---- Weights.
    for (int32_t form : {HOLDFAST_FORM_AUTO, HOLDFAST_FORM_CHUNKWISE, HOLDFAST_FORM_RECURRENT})
        add("weights_in_form_" + std::to_string(form), invalid,
            "weights is given and form is " + std::to_string(form) + "; expected 1, HOLDFAST_FORM_PARALLEL",
            [=](Call &c) { c.want_weights(), c.args.form = form; });
    add("weights_of_other_time", invalid, "weights [B, H, T, T] has T = 4; expected 5, that of q",
        [](Call &c) { c.want_weights(), c.weights.shape[3] = 4; });
    add("weights_of_other_type", invalid, "weights has dtype float16; expected float32, that of q",
        [](Call &c) { c.want_weights(), c.weights.dtype.bits = 16; });
    add("weights_overlap_out", invalid, "overlaps",
        [](Call &c) { c.want_weights(), c.place(c.out, 1024), c.place(c.weights, 1025); });

    // ---- Missing tensors.
    add("q_null", invalid, "q is NULL; expected a tensor [B, T, H, K]", [](Call &c) { c.args.q = nullptr; });
    add("k_null", invalid, "k is NULL; expected a tensor [B, T, Hk, K]", [](Call &c) { c.args.k = nullptr; });
    add("v_null", invalid, "v is NULL; expected a tensor [B, T, Hk, V]", [](Call &c) { c.args.v = nullptr; });
    add("out_null", invalid, "out is NULL; expected a tensor [B, T, H, V]", [](Call &c) { c.args.out = nullptr; });

    // ---- Each tensor by itself.
    for (const auto &[name, axes] : tensors) {
        const std::string who = name;
        const int rank = (int)axes.size();
        auto add_one = [&](const std::string &what, holdfast_status status, const std::string &text,
                           std::function<void(DLTensor &)> spoil) {
            add(who + "_" + what, status, who + " " + text, [=](Call &c) { spoil(c.tensor(who)); });
        };
        add_one("data_null", invalid, "has NULL data; expected memory for shape [", [](DLTensor &x) { x.data = nullptr; });
        add_one("shape_null", invalid, "has a NULL shape", [](DLTensor &x) { x.shape = nullptr; });
        for (int other : {0, 2, 5, -1})
            add_one("rank_" + std::string(other < 0 ? "negative" : std::to_string(other)), invalid,
                    "has " + std::to_string(other) + " dimensions; expected " +
                        (who == "log_decay" ? "1, [Hk], or 3, [B, T, Hk]" : "4, ["),
                    [=](DLTensor &x) { x.ndim = other; });
        const bool any_dtype = who.size() == 1 || who == "out";
        const std::pair<DLDataType, const char *> dtypes[] = {{{kDLFloat, 64, 1}, "float64"},
                                                              {{kDLUInt, 16, 1}, "uint16"},
                                                              {{kDLBfloat, 32, 1}, "bfloat32"},
                                                              {{kDLInt, 32, 1}, "int32"},
                                                              {{kDLUInt, 8, 1}, "uint8"},
                                                              {{kDLFloat, 32, 4}, "float32 x 4 lanes"},
                                                              {{kDLFloat, 16, 2}, "float16 x 2 lanes"},
                                                              {{77, 32, 1}, "code 77, 32 bits"}};
        for (size_t n = 0; n < std::size(dtypes); n++) {
            const DLDataType type = dtypes[n].first;
            const std::string expected = any_dtype ? "; expected float32, float16 or bfloat16" : "; expected float32";
            add_one("dtype_" + std::to_string(n), unsupported, std::string("has dtype ") + dtypes[n].second + expected,
                    [=](DLTensor &x) { x.dtype = type; });
        }
        // One type for q, k, v and out; fp32 for all else.
        const std::pair<DLDataType, std::string> narrow[] = {{{kDLFloat, 16, 1}, "float16"}, {{kDLBfloat, 16, 1}, "bfloat16"}};
        for (const auto &[type, named] : narrow) {
            const DLDataType other = type;
            if (who == "q")
                add("q_" + named, invalid, "k has dtype float32; expected " + named + ", that of q",
                    [=](Call &c) { c.q.dtype = other; });
            else
                add_one(named, any_dtype ? invalid : unsupported,
                        "has dtype " + named + "; expected float32" + (any_dtype ? ", that of q" : ""),
                        [=](DLTensor &x) { x.dtype = other; });
        }
        for (DLDeviceType device : {kDLROCM, kDLExtDev})
            add_one("device_" + std::to_string(device), unsupported,
                    "is on device type " + std::to_string(device) + "; expected that of a backend of this build: 1 (cpu)",
                    [=](DLTensor &x) { x.device.device_type = device; });
        add_one("byte_offset_odd", invalid,
                "has data and byte_offset 2 that are not the address of a float32; expected a multiple of 4",
                [](DLTensor &x) { x.byte_offset = 2; });
        add_one("byte_offset_beyond_memory", invalid, "has data and byte_offset 18446744073709551612",
                [](DLTensor &x) { x.byte_offset = std::numeric_limits<uint64_t>::max() - 3; });

        for (int axis = 0; axis < rank; axis++) {
            const char letter = axes[axis];
            const std::string at = std::string("_on_") + letter;
            add_one("extent_negative" + at, invalid, "has shape [", [=](DLTensor &x) { x.shape[axis] = -1; });
            add_one("extent_beyond_int32" + at, unsupported, "has shape [",
                    [=](DLTensor &x) { x.shape[axis] = (int64_t)1 << 31; });
            add_one("extent_beyond_all" + at, unsupported, "has shape [", [=](DLTensor &x) { x.shape[axis] = huge; });
            // Most of q's extents make the other tensors wrong.
            if (who != "q")
                for (int64_t other : {extent(letter) + 1, extent(letter) - 1})
                    add(who + "_extent_" + std::to_string(other) + at, invalid,
                        (who == "v" && letter == 'V' ? "out " : who + " ") + "[",
                        [=](Call &c) { c.tensor(who).shape[axis] = other; });
            const std::pair<const char *, int64_t> overflowing[] = {{"most", huge},
                                                                    {"least", std::numeric_limits<int64_t>::min()},
                                                                    {"of_2_61", huge / 4},
                                                                    {"of_minus_2_61", -huge / 4 - 1}};
            for (const auto &[which, stride] : overflowing) {
                const int64_t other = stride;
                add_one("stride_" + std::string(which) + at, invalid, "has ", [=](DLTensor &x) { x.strides[axis] = other; });
            }
            if (is_output(who) && axis < rank - 1)
                add_one("elements_share_memory" + at, invalid,
                        "has stride 0 on axis " + std::to_string(axis) + ", so that its elements share memory",
                        [=](DLTensor &x) { x.strides[axis] = 0; });
        }
        if (who != "log_decay")
            for (int64_t stride : {0, 2, -1})
                add_one("row_stride_" + std::to_string(stride + 1), invalid,
                        "has stride " + std::to_string(stride) + " on its last axis; expected 1",
                        [=](DLTensor &x) { x.strides[rank - 1] = stride; });
    }
    add("out_elements_share_memory_by_one", invalid, "out has stride 17 on axis 1, so that its elements share memory",
        [](Call &c) { c.out.strides[1] = H * V - 1; });
    add("final_state_elements_share_memory_by_one", invalid,
        "final_state has stride 71 on axis 0, so that its elements share memory",
        [](Call &c) { c.final_state.strides[0] = H * K * V - 1; });

    // ---- Extents against one another.
    add("K_0", invalid, "q [B, T, H, K] has K = 0; expected at least 1", [](Call &c) { c.q.shape[3] = c.k.shape[3] = 0; });
    add("V_0", invalid, "v [B, T, Hk, V] has V = 0; expected at least 1", [](Call &c) { c.v.shape[3] = c.out.shape[3] = 0; });
    add("k_says_what_it_was", invalid, "k [B, T, Hk, K] has T = 6; expected 5, that of q", [](Call &c) { c.k.shape[1] = 6; });
    add("out_says_what_it_was", invalid, "out [B, T, H, V] has V = 7; expected 6, that of v",
        [](Call &c) { c.out.shape[3] = 7; });
    add("state_says_what_it_was", invalid, "initial_state [N, Hk, D, V] has D = 6; expected 4, the K of q",
        [](Call &c) { c.initial_state.shape[2] = 6, c.initial_state.shape[3] = 4; });
    add("log_decay_per_head_of_other_heads", invalid, "log_decay [Hk] has Hk = 2; expected 3, that of k",
        [](Call &c) { c.decay_per_head(), c.log_decay.shape[0] = 2; });
    add("state_too_large", unsupported, "q has K = 8192 and v has V = 8192; expected K V of at most ",
        [](Call &c) { c.q.shape[0] = c.v.shape[0] = 0, c.q.shape[3] = c.v.shape[3] = 8192; });
    add("too_many_elements", invalid, "q has shape [", [](Call &c) {
        c.q.strides = nullptr;
        for (int axis = 0; axis < 4; axis++) c.q.shape[axis] = std::numeric_limits<int32_t>::max();
    });

    // ---- Strides that kernels have no room for: beyond 2^31 elements within a few chunks.
    for (const std::string who : {"q", "k", "v", "out", "log_decay", "initial_state", "final_state"})
        for (int64_t stride : {(int64_t)1 << 30, -((int64_t)1 << 30)}) {
            const int axis = who.find("state") == std::string::npos ? 1 : 2;
            add(who + (stride < 0 ? "_stride_too_negative" : "_stride_too_large"), unsupported,
                who + " has stride " + std::to_string(stride) + " on axis " + std::to_string(axis) + "; expected at most ",
                [=](Call &c) {
                    c.place_far(c.tensor(who));
                    c.tensor(who).strides[axis] = stride;
                    c.args.chunk_size = T;  // few tokens, one by one, could lie anywhere
                });
        }

    // ---- Overlap.
    for (const std::string output : {"out", "final_state"})
        for (const auto &[other, axes] : tensors) {
            if (other == output) continue;
            for (int64_t offset : {0, 1, -1}) {
                // The same place is the in-place update, for the state.
                if (output == "final_state" && other == "initial_state" && offset == 0) continue;
                const std::string input = other;
                add(output + "_overlaps_" + input + "_at_" + std::to_string(offset + 1), invalid, " overlaps ", [=](Call &c) {
                    c.place(c.tensor(input), 1024);
                    c.place(c.tensor(output), 1024 + offset);
                });
            }
        }
    add("final_state_half_over_initial_state", invalid,
        "final_state overlaps initial_state in memory; expected separate memory", [](Call &c) {
            c.place(c.initial_state, 1024);
            c.place(c.final_state, 1024 + H * K * V);
        });
    add("final_state_is_initial_state_in_other_order", invalid,
        "final_state overlaps initial_state in memory; expected separate memory", [](Call &c) {
            c.place(c.initial_state, 1024), c.place(c.final_state, 1024);
            c.other_strides = {K * V, B * K * V, V, 1};
            c.final_state.strides = c.other_strides.data();
        });
    add("out_ends_where_q_begins_less_one", invalid, "out overlaps q in memory; expected separate memory", [](Call &c) {
        c.place(c.out, 1024);
        c.place(c.q, 1024 + B * T * H * V - 1);
    });

    // ---- In 16 bits.
    add("float16_at_an_odd_byte", invalid,
        "v has data and byte_offset 1 that are not the address of a float16; expected a multiple of 2", [](Call &c) {
            c.narrow(kDLFloat);
            c.v.byte_offset = 1;
        });
    add("bfloat16_out_ends_where_q_begins_less_one", invalid, "out overlaps q in memory; expected separate memory",
        [](Call &c) {
            c.narrow(kDLBfloat);
            c.q.data = (char *)c.out.data + 2 * (B * T * H * V - 1);
        });
    add("float16_state_ends_where_out_begins_less_one", invalid, "out overlaps final_state in memory; expected separate memory",
        [](Call &c) {
            c.narrow(kDLFloat);
            c.place(c.final_state, 1024);
            c.out.data = (char *)c.final_state.data + 4 * B * H * K * V - 2;
        });

    // ---- Decays.
    auto add_decay = [&](const std::string &name, const std::string &text, float value) {
        add("log_decay_" + name, invalid, "log_decay[1, 2, 0] is " + text + "; expected a number <= 0",
            [=](Call &c) { c.p.log_decay({1, 2, 0}) = value; });
        add("log_decay_per_head_" + name, invalid, "log_decay[2] is " + text + "; expected a number <= 0", [=](Call &c) {
            c.decay_per_head();
            c.p.log_decay({0, 0, 2}) = value;
        });
    };
    add_decay("positive", "0.5", 0.5f);
    add_decay("barely_positive", "1.4013e-45", std::numeric_limits<float>::denorm_min());
    add_decay("inf", "inf", infinity);
    add_decay("nan", "nan", nan);
    return list;
}

class BadArgument : public testing::TestWithParam<Case> {};

TEST_P(BadArgument, IsNamedAndNothingIsWritten) {
    Context context;
    Call call;
    expect_refused(GetParam(), context, call, [&] { return holdfast_forward(context, &call.args); });

    // And the same without a context.
    EXPECT_EQ(holdfast_forward(nullptr, &call.args), GetParam().status);
    EXPECT_EQ(holdfast_last_error(nullptr), context.error());
}

INSTANTIATE_TEST_SUITE_P(, BadArgument, testing::ValuesIn(cases()), [](const auto &info) { return info.param.name; });

// ---- What is not an error.

struct GoodCase {
    std::string name;
    std::function<void(Call &)> change;
};
void PrintTo(const GoodCase &c, std::ostream *stream) { *stream << c.name; }

std::vector<GoodCase> good_cases() {
    const float infinity = std::numeric_limits<float>::infinity();
    constexpr int64_t huge = std::numeric_limits<int64_t>::max();
    return {
        {"nothing_changed", [](Call &) {}},
        {"log_decay_minus_inf", [=](Call &c) { c.p.log_decay({1, 2, 0}) = -infinity; }},
        {"log_decay_minus_zero", [](Call &c) { c.p.log_decay({1, 2, 0}) = -0.0f; }},
        {"groups", [](Call &c) { c.group(); }},
        {"packed", [](Call &c) { c.pack(); }},
        {"value_major", [](Call &c) { c.value_major(); }},
        {"log_decay_not_given", [](Call &c) { c.args.log_decay = nullptr; }},
        {"states_not_given", [](Call &c) { c.args.initial_state = nullptr, c.args.final_state = nullptr; }},
        {"chunk_size_most", [](Call &c) { c.args.chunk_size = huge; }},
        {"other_device_number", [](Call &c) { c.q.device.device_id = 3; }},
        {"q_and_k_overlap", [](Call &c) { c.place(c.q, 1024), c.place(c.k, 1025); }},
        {"state_in_place", [](Call &c) { c.place(c.initial_state, 1024), c.place(c.final_state, 1024); }},
        {"out_ends_where_q_begins", [](Call &c) { c.place(c.out, 1024), c.place(c.q, 1024 + B * T * H * V); }},
        {"float16", [](Call &c) { c.narrow(kDLFloat); }},
        {"bfloat16", [](Call &c) { c.narrow(kDLBfloat); }},
        {"float16_at_byte_2",
         [](Call &c) {
             c.narrow(kDLFloat);
             c.v.byte_offset = 2;
         }},
        {"bfloat16_out_ends_where_q_begins",
         [](Call &c) {
             c.narrow(kDLBfloat);
             c.q.data = (char *)c.out.data + 2 * B * T * H * V;
         }},
        {"float16_out_and_v_are_columns_of_one_array",
         [](Call &c) {
             c.narrow(kDLFloat);
             c.out.data = (char *)c.v.data + 2 * V;
             c.other_strides = {T * H * 2 * V, H * 2 * V, 2 * V, 1};
             c.v.strides = c.out.strides = c.other_strides.data();
         }},
        {"out_and_v_are_columns_of_one_array",
         [](Call &c) {
             c.place(c.v, 1024), c.place(c.out, 1024 + V);
             c.other_strides = {T * H * 2 * V, H * 2 * V, 2 * V, 1};
             c.v.strides = c.out.strides = c.other_strides.data();
         }},
        {"strides_of_extents_of_1",
         [](Call &c) {  // reach nothing, whatever they are
             c.q.shape[1] = c.k.shape[1] = c.v.shape[1] = c.out.shape[1] = c.log_decay.shape[1] = 1;
             c.q.strides[1] = huge, c.k.strides[1] = -huge, c.v.strides[1] = huge / 3, c.out.strides[1] = 0,
             c.log_decay.strides[1] = huge;
         }},
        {"strides_of_empty_tensors",
         [](Call &c) {
             c.q.shape[1] = c.k.shape[1] = c.v.shape[1] = c.out.shape[1] = c.log_decay.shape[1] = 0;
             c.q.strides[0] = huge, c.k.strides[1] = -huge, c.out.strides[2] = 0, c.v.strides[3] = 0,
             c.log_decay.strides[1] = huge;
         }},
        {"states", [](Call &c) { c.want_states(); }},
        {"states_every_huge", [](Call &c) { c.want_states(), c.args.state_interval = huge, c.states.shape[0] = 2 * B; }},
        {"no_data_in_empty_tensors",
         [](Call &c) {
             for (DLTensor *x : {&c.q, &c.k, &c.v, &c.out, &c.log_decay}) x->shape[1] = 0, x->data = nullptr;
         }},
    };
}

class GoodArgument : public testing::TestWithParam<GoodCase> {};

TEST_P(GoodArgument, IsTaken) {
    Context context;
    Call call;
    GetParam().change(call);
    EXPECT_EQ(holdfast_forward(context, &call.args), HOLDFAST_OK) << context.error();
    EXPECT_EQ(context.error(), "");
}

INSTANTIATE_TEST_SUITE_P(, GoodArgument, testing::ValuesIn(good_cases()), [](const auto &info) { return info.param.name; });

// ---- The struct of another version.

TEST(Args, Null) {
    Context context;
    EXPECT_EQ(holdfast_forward(context, nullptr), HOLDFAST_INVALID_ARGUMENT);
    EXPECT_EQ(context.error(), "args is NULL; expected a holdfast_forward_args");
}

TEST(Args, OfTheFirstVersion) {
    Context context;
    Call call, expected;
    ASSERT_EQ(holdfast_forward(context, &expected.args), HOLDFAST_OK);
    call.args.struct_size = offsetof(holdfast_forward_args, degree);
    std::memset((char *)&call.args + call.args.struct_size, 0xff, sizeof call.args - call.args.struct_size);
    EXPECT_EQ(holdfast_forward(context, &call.args), HOLDFAST_OK) << context.error();
    EXPECT_TRUE(same_bits(call.p.out, expected.p.out));
}

struct LaterVersion {
    holdfast_forward_args args;
    unsigned char more[24];
};

TEST(Args, LaterVersionWithoutItsOptionsIsTaken) {
    Context context;
    Call call, expected;
    ASSERT_EQ(holdfast_forward(context, &expected.args), HOLDFAST_OK);
    LaterVersion later = {call.args, {}};
    later.args.struct_size = sizeof later;
    EXPECT_EQ(holdfast_forward(context, &later.args), HOLDFAST_OK) << context.error();
    EXPECT_TRUE(same_bits(call.p.out, expected.p.out));
}

TEST(Args, LaterVersionWithAnOptionIsRefused) {
    for (size_t n : {(size_t)0, sizeof(LaterVersion::more) - 1}) {
        Context context;
        Call call;
        const Array before = call.p.out;
        LaterVersion later = {call.args, {}};
        later.args.struct_size = sizeof later;
        later.more[n] = 1;
        EXPECT_EQ(holdfast_forward(context, &later.args), HOLDFAST_UNSUPPORTED);
        EXPECT_NE(
            context.error().find("byte " + std::to_string(sizeof(holdfast_forward_args) + n) + " is not zero; expected zeros"),
            std::string::npos)
            << context.error();
        EXPECT_TRUE(call.p.out.same_memory(before));
    }
}

}  // namespace
