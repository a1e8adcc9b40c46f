// The compiled variants and the choice among them. Everything here comes from the table that the build makes of
// cmake/targets.cmake and cmake/kernels.cmake.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

struct halide_buffer_t;

namespace holdfast {

using ChunkwiseKernel = int(const void *user_context, halide_buffer_t *q, halide_buffer_t *k, halide_buffer_t *v,
                            halide_buffer_t *log_decay, halide_buffer_t *state_in, halide_buffer_t *chunks, int32_t count,
                            float scale, halide_buffer_t *out, halide_buffer_t *state_out);

struct Target {
    const char *name, *backend;
    std::string missing;  // CPU features it needs and this machine lacks; "": it runs here
};

struct Variant {
    const char *kernel, *name, *dtype;
    int chunk, key_size, value_size;  // sizes 0: any
    const Target *target;
    ChunkwiseKernel *run;
};

const std::vector<Target> &targets();    // best first
const std::vector<Variant> &variants();  // best target first

/// The target of that name if this machine runs it. Throws TARGET_UNAVAILABLE; the text begins with `prefix`.
const Target *require_target(const std::string &name, const char *prefix = "");

/// The target that HOLDFAST_TARGET forces, null if it is not set. The variable is read once. Throws like require_target.
const Target *environment_target();

/// The variant to run: the best target that runs here, or `forced`; exact sizes before `any`; the shortest chunk that holds
/// `chunk_size` tokens, else the longest (chunk_size 0: the first listed). Throws UNSUPPORTED when there is none.
const Variant &select_variant(const char *kernel, const char *dtype, int64_t key_size, int64_t value_size,
                              int64_t chunk_size, const Target *forced);

}  // namespace holdfast
