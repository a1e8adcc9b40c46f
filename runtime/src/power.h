// Power retention, and any degree whose outputs are normalised, on the CPU: power.cpp.
#pragma once
#include "context.h"
#include "problem.h"

namespace holdfast {

/// Compute `p` on the CPU for the public function `call` ("forward"), in chunks or token by token; p.form or, where that is
/// automatic, the better one. Throws UNSUPPORTED for another form.
void run_power(holdfast_context &context, const char *call, const Problem &p, const Choice &choice);

/// The variant of the kernel "power" or "power_step" for `p` and so many of its values.
const Variant &power_variant(const char *kernel, const Problem &p, const Choice &choice, int64_t value_size);

/// Features in a block of a step, of the D of a state: a divisor of that.
int64_t feature_block(int64_t D);

}  // namespace holdfast
