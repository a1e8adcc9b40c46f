// Every compiled variant of head_norm_gate, called directly, on every case of head_norm_gate_call.h. What this machine cannot run is skipped, with
// the reason, unless HOLDFAST_REQUIRED_BACKENDS has it.
#include "../head_norm_gate_call.h"
#include "variant.h"

namespace {
using namespace test;

const std::vector variants = rows({
#include <variants/head_norm_gate.inc>
});
using Variant = decltype(variants)::value_type;

class HeadNormGate : public OfVariants<Variant> {};

TEST_P(HeadNormGate, MatchesReference) {
    const Variant &variant = GetParam();
    for (const NormCase &c : norm_cases(variant.on_cpu())) NormCall(c, variant.dtype).expect_reference(variant.run());
}

HOLDFAST_INSTANCES(HeadNormGate, variants);

}  // namespace
