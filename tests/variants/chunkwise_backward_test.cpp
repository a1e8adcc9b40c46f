// Every compiled variant of chunkwise_backward, called directly, on every case of kernel_call.h. What this machine cannot run is
// skipped, with the reason; a GPU backend that HOLDFAST_REQUIRED_BACKENDS names may not be.
#include "../backward_call.h"
#include "missing.h"

#include <holdfast/holdfast.h>
#include <kernels.h>

namespace {
using namespace test;
using Buffer = halide_buffer_t;

struct Variant {
    const char *name;
    Dtype dtype;
    int chunk;
    Size size;  // 0: any
    const char *backend;
    bool rounds_operands;
    int (*run)(const void *user_context, Buffer *q, Buffer *k, Buffer *v, Buffer *log_decay, Buffer *state_in, Buffer *dout,
               Buffer *dstate_out, Buffer *chunks, int32_t count, float scale, int32_t want_dq, int32_t want_dk,
               int32_t want_dv, int32_t want_dlog_decay, int32_t want_dstate, Buffer *dq, Buffer *dk, Buffer *dv,
               Buffer *dlog_decay, Buffer *dstate_in);
};
#define HOLDFAST_VARIANT(kernel, name, dtype, chunk, key_size, value_size, target, row_alignment, round_operands, ...) \
    {#name, dtype, chunk, {key_size, value_size}, backend_of(#target), round_operands, name},
const std::vector<Variant> variants = {
#include <variants/chunkwise_backward.inc>
};
#undef HOLDFAST_VARIANT
void PrintTo(const Variant &v, std::ostream *stream) { *stream << v.name; }

struct Instance {
    Variant variant;
    Size size;
    KernelCase kernel_case;
};
std::string name(const Instance &i) {
    std::string size;
    if (!i.variant.size.K) size = "_K" + std::to_string(i.size.K) + "_V" + std::to_string(i.size.V);
    return i.variant.name + size + "_" + i.kernel_case.name;
}
void PrintTo(const Instance &i, std::ostream *stream) { *stream << name(i); }

std::vector<Instance> instances() {
    std::vector<Instance> list;
    for (const Variant &variant : variants) {
        std::vector<Size> sizes(std::begin(odd_sizes), std::end(odd_sizes));
        if (variant.size.K && variant.size.V) sizes = {variant.size};
        for (Size size : sizes) {
            // GPUs' stand-ins are slow, as in chunkwise_test.cpp; of the forward's stages they have met all cases there.
            const bool all = variant.backend == std::string("cpu");
            if (!all && (size.K < 5 || (!(variant.dtype == f32) && size.K != 33))) continue;
            const bool few = !all && size.K >= 64;
            for (const KernelCase &c : kernel_cases(variant.chunk))
                if (!c.states_alone &&
                    (all || c.name == "packed" || (c.name == "gates_resets" && !few) || c.name == "layout_padded"))
                    list.push_back({variant, size, c});
        }
    }
    return list;
}

class ChunkwiseBackward : public testing::TestWithParam<Instance> {};

TEST_P(ChunkwiseBackward, MatchesReference) {
    const Instance &instance = GetParam();
    const Variant &variant = instance.variant;
    const std::string missing = reason_to_skip(variant);
    if (!missing.empty()) GTEST_SKIP() << "this machine lacks " << missing;
    if (const std::string reason = not_on(variant.backend, instance.kernel_case.layout); !reason.empty())
        GTEST_SKIP() << reason;
    halide_set_error_handler([](void *, const char *text) { ADD_FAILURE() << text; });
    std::vector<Wants> wants = {{}};  // what is left out does not depend on the size, of which the reference takes its time
    const bool large = instance.size.K * instance.size.V > 64 * 64;
    if (!large && (instance.kernel_case.name == "packed" || instance.kernel_case.name == "groups"))
        for (const Wants &some : some_wants()) wants.push_back(some);
    for (const Wants &w : wants)
        BackwardCall(instance.kernel_case, variant.chunk, instance.size, variant.dtype, w, variant.rounds_operands)
            .expect_reference([&](auto &&...arguments) { return variant.run(nullptr, arguments...); });
}

INSTANTIATE_TEST_SUITE_P(, ChunkwiseBackward, testing::ValuesIn(instances()),
                         [](const auto &info) { return name(info.param); });

// What the project holds of gradients, with weak gates, where errors that cross chunks show: they are not forgotten.
class Accuracy : public testing::TestWithParam<Variant> {};

TEST_P(Accuracy, RelativeErrors) {
    const Variant &variant = GetParam();
    const std::string missing = reason_to_skip(variant);
    if (!missing.empty()) GTEST_SKIP() << "this machine lacks " << missing;
    const bool large = variant.size.K * variant.size.V > 64 * 64;  // of which the reference takes its time
    const int64_t T = large ? 256 : 1024, H = large ? 1 : 4;
    for (Gates gates : {Gates::per_head, Gates::weak}) {
        SCOPED_TRACE(name(gates));
        BackwardCall call({name(gates), {T}, 1, H, Layout::compact, gates, 0}, variant.chunk, variant.size, variant.dtype);
        const auto error = call.relative_errors([&](auto &&...arguments) { return variant.run(nullptr, arguments...); });
        EXPECT_LE(error.rows, tolerance::relative_rms_of_gradient_of_rows(variant.dtype));
        EXPECT_LE(error.decays, variant.rounds_operands ? tolerance::relative_rms_of_rounded_gates(variant.dtype, T)
                                                        : tolerance::relative_rms_of_gradient);
        EXPECT_LE(error.states, tolerance::relative_rms_of_gradient);
    }
}

std::vector<Variant> accurate_variants() {
    std::vector<Variant> list;
    for (const Variant &v : variants)
        if ((v.dtype == f32 || v.rounds_operands) && v.size.K && v.backend == std::string("cpu")) list.push_back(v);
    return list;
}
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(Accuracy);
INSTANTIATE_TEST_SUITE_P(, Accuracy, testing::ValuesIn(accurate_variants()), [](const auto &info) { return info.param.name; });

}  // namespace
