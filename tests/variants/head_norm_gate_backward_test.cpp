// Every compiled variant of head_norm_gate_backward, called directly, on every case of head_norm_gate_backward_call.h. What this machine cannot run is skipped, with
// the reason, unless HOLDFAST_REQUIRED_BACKENDS has it.
#include "../head_norm_gate_backward_call.h"
#include "variant.h"

namespace {
using namespace test;

const std::vector variants = rows({
#include <variants/head_norm_gate_backward.inc>
});
using Variant = decltype(variants)::value_type;

class HeadNormGateBackward : public OfVariants<Variant> {};

TEST_P(HeadNormGateBackward, MatchesReference) {
    const Variant &variant = GetParam();
    for (const NormBackwardCase &c : norm_backward_cases(variant.on_cpu()))
        NormBackwardCall(c, variant.dtype).expect_reference(variant.run());
}

HOLDFAST_INSTANCES(HeadNormGateBackward, variants);

}  // namespace
