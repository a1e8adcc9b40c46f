// Every compiled variant of recurrent, called directly, on every case of step_call.h. What this machine cannot run is
// skipped, with the reason; a GPU backend that HOLDFAST_REQUIRED_BACKENDS names may not be.
#include "../step_call.h"
#include "variant.h"

#include <iostream>

namespace {
using namespace test;

const std::vector variants = rows({
#include <variants/recurrent.inc>
});
using Variant = decltype(variants)::value_type;
using Instance = Called<Variant>;

std::vector<Instance> instances() {
    std::vector<Instance> list;
    for (const Variant &variant : variants) {
        std::vector<Size> sizes(std::begin(odd_sizes), std::end(odd_sizes));
        if (variant.size.K && variant.size.V) sizes = {variant.size};
        for (Size size : sizes) list.push_back({variant, size});
    }
    return list;
}

class Recurrent : public OfVariants<Instance> {};

TEST_P(Recurrent, MatchesReference) {
    const Instance &instance = GetParam();
    const Variant &variant = instance.variant;
    for (const StepCase &c : step_cases(std::max(variant.chunk, 1))) {
        std::string reason = not_on(variant.backend, c.layout);
        if (!variant.on_cpu() && c.B * c.H == 0) reason = "Halide's runtime has no memory of no bytes on a GPU";
        if (!reason.empty()) {
            std::cout << "case " << c.name << " is not run: " << reason << "\n";
            continue;
        }
        StepCall(c, instance.size, variant.dtype).expect_reference(variant.run());
    }
}

HOLDFAST_INSTANCES(Recurrent, instances());

}  // namespace
