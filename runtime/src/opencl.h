// What is particular to OpenCL: opencl.cpp.
#pragma once
#include "backend.h"

#include <cstdint>

namespace holdfast::opencl {

/// Called by availability().
Availability probe();

/// The cl_context of a cl_command_queue.
void *context_of(void *queue);

/// What a sub-buffer's offset must be a multiple of, in bytes; `context` null: on the library's own device.
int64_t offset_alignment(void *context);

}  // namespace holdfast::opencl
