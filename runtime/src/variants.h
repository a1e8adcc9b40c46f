// The compiled variants and the choice among them. Everything here comes from the table that the build makes of
// cmake/targets.cmake and cmake/kernels.cmake.
#pragma once
#include "backend.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

struct halide_buffer_t;

namespace holdfast {

using ChunkwiseKernel = int(const void *user_context, halide_buffer_t *q, halide_buffer_t *k, halide_buffer_t *v,
                            halide_buffer_t *log_decay, halide_buffer_t *state_in, halide_buffer_t *chunks, int32_t count,
                            float scale, halide_buffer_t *out, halide_buffer_t *state_out);

using ChunkwiseBackwardKernel = int(const void *user_context, halide_buffer_t *q, halide_buffer_t *k, halide_buffer_t *v,
                                    halide_buffer_t *log_decay, halide_buffer_t *state_in, halide_buffer_t *dout,
                                    halide_buffer_t *dstate_out, halide_buffer_t *chunks, int32_t count, float scale,
                                    int32_t want_dq, int32_t want_dk, int32_t want_dv, int32_t want_dlog_decay,
                                    int32_t want_dstate, halide_buffer_t *dq, halide_buffer_t *dk, halide_buffer_t *dv,
                                    halide_buffer_t *dlog_decay, halide_buffer_t *dstate_in);

using ParallelKernel = int(const void *user_context, halide_buffer_t *q, halide_buffer_t *k, halide_buffer_t *v,
                           halide_buffer_t *log_decay, halide_buffer_t *state_in, halide_buffer_t *keys_in, int32_t first_block,
                           int32_t degree, int32_t normalized, float scale, halide_buffer_t *out, halide_buffer_t *state_out,
                           halide_buffer_t *keys_out, halide_buffer_t *weights);

using ParallelBackwardKernel = int(const void *user_context, halide_buffer_t *q, halide_buffer_t *k, halide_buffer_t *v,
                                   halide_buffer_t *log_decay, halide_buffer_t *out, halide_buffer_t *dout, int32_t degree,
                                   int32_t normalized, float scale, int32_t want_dq, int32_t want_dk, int32_t want_dv,
                                   int32_t want_dlog_decay, halide_buffer_t *dq, halide_buffer_t *dk, halide_buffer_t *dv,
                                   halide_buffer_t *dlog_decay);

using RecurrentKernel = int(const void *user_context, halide_buffer_t *q, halide_buffer_t *k, halide_buffer_t *v,
                            halide_buffer_t *log_decay, float scale, halide_buffer_t *state, halide_buffer_t *sum,
                            halide_buffer_t *out);

using RotateKernel = int(const void *user_context, halide_buffer_t *x, halide_buffer_t *theta, halide_buffer_t *position,
                         int32_t position_bits, uint32_t start, uint32_t start_upper, int32_t backward, halide_buffer_t *out);

using HeadNormGateKernel = int(const void *user_context, halide_buffer_t *x, halide_buffer_t *gate, halide_buffer_t *weight,
                               int32_t layer_norm, int32_t gated, int32_t weighted, float eps, halide_buffer_t *out);

using HeadNormGateBackwardKernel = int(const void *user_context, halide_buffer_t *x, halide_buffer_t *gate,
                                       halide_buffer_t *weight, halide_buffer_t *dout, int32_t layer_norm, int32_t gated,
                                       int32_t weighted, float eps, int32_t want_dx, int32_t want_dgate, int32_t want_dweight,
                                       int32_t add_dweight, halide_buffer_t *dx, halide_buffer_t *dgate,
                                       halide_buffer_t *dweight);

using PowerKernel = int(const void *user_context, halide_buffer_t *q, halide_buffer_t *k, halide_buffer_t *v,
                        halide_buffer_t *log_decay, halide_buffer_t *state_in, halide_buffer_t *keys_in, int32_t degree,
                        int32_t normalize, float scale, halide_buffer_t *out, halide_buffer_t *state_out,
                        halide_buffer_t *keys_out);

using PowerBackwardKernel = int(const void *user_context, halide_buffer_t *q, halide_buffer_t *k, halide_buffer_t *v,
                                halide_buffer_t *log_decay, halide_buffer_t *state_in, halide_buffer_t *keys_in,
                                halide_buffer_t *out, halide_buffer_t *dout, halide_buffer_t *dstate_out,
                                halide_buffer_t *dkeys_out, int32_t degree, int32_t normalize, float scale, int32_t want_dq,
                                int32_t want_dk, int32_t want_dv, int32_t want_dlog_decay, int32_t want_dstate,
                                int32_t want_dkeys, halide_buffer_t *dq, halide_buffer_t *dk, halide_buffer_t *dv,
                                halide_buffer_t *dlog_decay, halide_buffer_t *dstate_in, halide_buffer_t *dkeys_in);

using PowerStepKernel = int(const void *user_context, halide_buffer_t *q, halide_buffer_t *k, halide_buffer_t *v,
                            halide_buffer_t *log_decay, int32_t block, int32_t blocks, int32_t degree, int32_t normalize,
                            float scale, halide_buffer_t *state, halide_buffer_t *sum, halide_buffer_t *keys,
                            halide_buffer_t *keys_before, halide_buffer_t *out);

/// A kernel that makes the chunk table of so many sequences. Its numbers, generators/chunk_table_generator.cpp: chunk, count, slots,
/// before, first_token, first_chunk, the end of each sequence in tokens, and of each in chunks.
constexpr int chunk_table_numbers(int sequences) { return 6 + 2 * sequences; }
template<size_t>
using Number = int32_t;
template<class Index>
struct OfNumbers;
template<size_t... n>
struct OfNumbers<std::index_sequence<n...>> {
    using Kernel = int(const void *user_context, Number<n>... numbers, halide_buffer_t *table);
};
template<int sequences>
using ChunkTableKernel = typename OfNumbers<std::make_index_sequence<chunk_table_numbers(sequences)>>::Kernel;
constexpr int packed_at_once = 64;  // sequences, for packed_chunk_table

struct Target {
    const char *name;
    Backend backend;
    std::string missing_features;  // CPU features it needs and this machine lacks
    bool tiles;                    // it needs permission as well: cpu_features.h
    // GPUs; null on the CPU:
    ChunkTableKernel<1> *chunk_table;
    ChunkTableKernel<packed_at_once> *packed_chunk_table;
    int (*convert_state)(const void *user_context, halide_buffer_t *from, int32_t order, halide_buffer_t *to);
    int (*sum_decays)(const void *user_context, halide_buffer_t *gradients, halide_buffer_t *sums);
    int (*clear_16)(const void *user_context, halide_buffer_t *cleared);
};

struct Variant {
    const char *kernel, *name, *dtype;
    int chunk, key_size, value_size;  // chunk 0: the kernel knows none; sizes 0: any
    int row_alignment;                // rows of q, k, v and out start at multiples of so many bytes
    bool round_operands;              // products read what is not of `dtype` rounded to it
    int degree;                       // 0: any, or the kernel knows none
    const Target *target;
    std::variant<ChunkwiseKernel *, ChunkwiseBackwardKernel *, ParallelKernel *, ParallelBackwardKernel *, RecurrentKernel *,
                 RotateKernel *, HeadNormGateKernel *, HeadNormGateBackwardKernel *, PowerKernel *, PowerStepKernel *,
                 PowerBackwardKernel *>
        run;  // that of `kernel`
};

const std::vector<Target> &targets();  // best first

/// What a target needs and this machine lacks: CPU features, permission to use them, or why its backend cannot run; "": it runs
/// here. Loads the backend's driver, asks for the permission.
const std::string &missing_for(const Target &target);

/// The backend of that name if this build has it and it can run here. Throws TARGET_UNAVAILABLE.
Backend require_backend(const std::string &name);

const std::vector<Variant> &variants();  // best target first

/// The target of that name if this machine runs it. Throws TARGET_UNAVAILABLE; the text begins with `prefix`.
const Target *require_target(const std::string &name, const char *prefix = "");

/// What a call runs on, and why.
struct Choice {
    Backend backend;
    const Target *forced;  // null: the best of the backend
    const char *why;       // for the verbose line
};

/// The target that HOLDFAST_TARGET forces, null if it is not set. The variable is read once. Throws like require_target.
const Target *environment_target();

/// Rows of a call's q, k, v and out start at multiples of so many bytes, a power of two, and `tensor`'s not of twice that.
struct RowAlignment {
    static constexpr int64_t most = 256;  // more than any variant wants
    int64_t bytes = most;
    const char *tensor = "";
};

/// The variant to run: the best target of `backend` that runs here, or `forced`; of its rows the first whose sizes and
/// alignment, and degree, fit the call (exact sizes stand before `any`), or one with another chunk for the same sizes: the shortest chunk
/// that holds `chunk_size` tokens, else the longest (chunk_size 0: the first listed). Throws UNSUPPORTED when there is none.
const Variant &select_variant(const char *kernel, const char *dtype, int64_t key_size, int64_t value_size, int64_t chunk_size,
                              Backend backend, const Target *forced, const RowAlignment &rows = {}, int degree = 0);

/// The variants that select_variant returns for rows of one alignment or another.
std::vector<const Variant *> selectable_variants(const char *kernel, const char *dtype, int64_t key_size, int64_t value_size,
                                                 int64_t chunk_size, Backend backend, const Target *forced);

}  // namespace holdfast
