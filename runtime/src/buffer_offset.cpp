// Where a buffer of a kernel begins, in elements from where its memory does: schedules/gpu/offsets.cpp. It is in a member of
// halide_buffer_t that Halide has no use for, and zero in buffers that know nothing of it.
#include <HalideRuntime.h>

#include <cstdint>

extern "C" int32_t holdfast_buffer_offset(const halide_buffer_t *buffer) { return (int32_t)(intptr_t)buffer->padding; }
