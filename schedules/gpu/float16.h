// fp16 for GPU APIs whose kernels are not promised such a type: OpenCL and Vulkan have it as an extension that many drivers
// lack. There a pass over the final IR of a pipeline makes every fp16 number the 16-bit integer with its bits, and conversions
// from and to fp32, all that our kernels do with them (generators/dtypes.h), arithmetic of 32-bit integers.
#pragma once
#include "Halide.h"

#include <memory>

namespace holdfast::gpu {

std::unique_ptr<Halide::Internal::IRMutator> float16_as_integers();

}  // namespace holdfast::gpu
