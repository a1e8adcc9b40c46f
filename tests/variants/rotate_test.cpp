// Every compiled variant of rotate, called directly, on every case of rotate_call.h. What this machine cannot run is skipped, with
// the reason, unless HOLDFAST_REQUIRED_BACKENDS has it.
#include "../rotate_call.h"
#include "variant.h"

namespace {
using namespace test;

const std::vector variants = rows({
#include <variants/rotate.inc>
});
using Variant = decltype(variants)::value_type;

class Rotate : public OfVariants<Variant> {};

TEST_P(Rotate, MatchesReference) {
    const Variant &variant = GetParam();
    for (const RotateCase &c : rotate_cases(variant.on_cpu())) RotateCall(c, variant.dtype).expect_reference(variant.run());
}

HOLDFAST_INSTANCES(Rotate, variants);

}  // namespace
