// Every compiled variant of recurrent, called directly, on every case of step_call.h. What this machine cannot run is
// skipped, with the reason; a GPU backend that HOLDFAST_REQUIRED_BACKENDS names may not be.
#include "../step_call.h"
#include "missing.h"

#include <iostream>
#include <kernels.h>

namespace {
using namespace test;

struct Variant {
    const char *name;
    Dtype dtype;
    Size size;  // 0: any
    int tokens;
    const char *backend;
    int (*run)(const void *user_context, halide_buffer_t *q, halide_buffer_t *k, halide_buffer_t *v, halide_buffer_t *log_decay,
               float scale, halide_buffer_t *state, halide_buffer_t *sum, halide_buffer_t *out);
};
#define HOLDFAST_VARIANT(kernel, name, dtype, chunk, key_size, value_size, target, ...) \
    {#name, dtype, {key_size, value_size}, chunk ? chunk : 1, backend_of(#target), name},
const std::vector<Variant> variants = {
#include <variants/recurrent.inc>
};
#undef HOLDFAST_VARIANT

struct Instance {
    Variant variant;
    Size size;
};
std::string name(const Instance &i) {
    if (i.variant.size.K) return i.variant.name;
    return std::string(i.variant.name) + "_K" + std::to_string(i.size.K) + "_V" + std::to_string(i.size.V);
}
void PrintTo(const Instance &i, std::ostream *stream) { *stream << name(i); }

std::vector<Instance> instances() {
    std::vector<Instance> list;
    for (const Variant &variant : variants) {
        std::vector<Size> sizes(std::begin(odd_sizes), std::end(odd_sizes));
        if (variant.size.K && variant.size.V) sizes = {variant.size};
        for (Size size : sizes) list.push_back({variant, size});
    }
    return list;
}

class Recurrent : public testing::TestWithParam<Instance> {};

TEST_P(Recurrent, MatchesReference) {
    const Instance &instance = GetParam();
    const std::string missing = reason_to_skip(instance.variant), backend = instance.variant.backend;
    if (!missing.empty()) GTEST_SKIP() << "this machine lacks " << missing;
    halide_set_error_handler([](void *, const char *text) { ADD_FAILURE() << text; });
    for (const StepCase &c : step_cases(instance.variant.tokens)) {
        std::string reason = not_on(backend, c.layout);
        if (backend != "cpu" && c.B * c.H == 0) reason = "Halide's runtime has no memory of no bytes on a GPU";
        if (!reason.empty()) {
            std::cout << "case " << c.name << " is not run: " << reason << "\n";
            continue;
        }
        StepCall(c, instance.size, instance.variant.dtype).expect_reference([&](auto &&...arguments) {
            return instance.variant.run(nullptr, arguments...);
        });
    }
}

INSTANTIATE_TEST_SUITE_P(, Recurrent, testing::ValuesIn(instances()), [](const auto &info) { return name(info.param); });

}  // namespace
