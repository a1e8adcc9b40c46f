/* Holdfast: retention kernels compiled ahead of time. This header is the whole public C API; what is not here is private.
 *
 * In this order: statuses and errors, context, what was compiled, kernels.
 *
 * Simple use: fill a holdfast_forward_args, call holdfast_forward(NULL, &args). A context is for choosing threads, allocator,
 * target, GPU stream, and for reading error texts; NULL stands for the default context everywhere a context is taken.
 *
 * Tensors are DLPack's DLTensor (https://dmlc.github.io/dlpack): the library never frees, keeps or reshapes them; `strides`
 * may be NULL (compact, row-major), `byte_offset` is honoured. Nothing here prints, aborts or throws.
 */
#ifndef HOLDFAST_H
#define HOLDFAST_H

#include <stddef.h>
#include <stdint.h>

#include <dlpack/dlpack.h>

#if defined(_WIN32)
#define HOLDFAST_API __declspec(dllexport)
#else
#define HOLDFAST_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Version ----------------------------------------------------------------------------------------------------- */

#define HOLDFAST_VERSION_MAJOR 0
#define HOLDFAST_VERSION_MINOR 1
#define HOLDFAST_VERSION_PATCH 0

/** Version of the library that is linked, "major.minor.patch". A static string. */
HOLDFAST_API const char *holdfast_version(void);

/* ---- Statuses and errors ----------------------------------------------------------------------------------------- */

/** What a call returns. Numbers never change. On any status but HOLDFAST_OK no tensor has been written, with
 *  exceptions named at their status. */
typedef enum holdfast_status {
    HOLDFAST_OK = 0,
    /** An argument is malformed or contradicts another: null, rank, shape, stride, overlap, a positive or NaN decay, ... */
    HOLDFAST_INVALID_ARGUMENT = 1,
    /** Well formed, but not something this build computes: a dtype, a device, a size beyond its limits, a place in a buffer
     *  that a GPU's API cannot name. */
    HOLDFAST_UNSUPPORTED = 2,
    /** The forced target (HOLDFAST_TARGET or holdfast_context_set_target) or backend is unknown, or this machine cannot run
     *  it; or it cannot run that of the tensors' device: no driver, one that is too old, no device. */
    HOLDFAST_TARGET_UNAVAILABLE = 3,
    /** The allocator returned NULL, or a device has too little memory. Outputs may have been written in part. */
    HOLDFAST_OUT_OF_MEMORY = 4,
    /** A fault of the library or of a caller's thread pool. Outputs may have been written in part. Please report the text. */
    HOLDFAST_INTERNAL_ERROR = 5,
    /** A GPU's driver refused something, or work that was given to it earlier has failed; the text has the driver's words.
     *  Outputs may have been written in part. */
    HOLDFAST_DEVICE_ERROR = 6
} holdfast_status;

/** The status's name, "HOLDFAST_OK" and so on; "unknown status" for other numbers. A static string. */
HOLDFAST_API const char *holdfast_status_name(holdfast_status status);

/* ---- Context ----------------------------------------------------------------------------------------------------- */

/** Options, an error text and reusable workspace. Two contexts share nothing that changes, except that contexts without a
 *  thread pool of their own draw on the process's one pool, which is made for that. A forked process computes on the calling
 *  thread alone, with contexts that no other thread was using when it forked.
 *  Use a context from one thread at a time; different contexts from different threads freely. The default context (NULL)
 *  may be used from any number of threads at once; its options cannot be changed, its error text is kept per thread. */
typedef struct holdfast_context holdfast_context;

/** Create a context with default options; NULL when memory is short. Destroy it with holdfast_context_destroy. */
HOLDFAST_API holdfast_context *holdfast_context_create(void);

/** Free a context and its workspace (with the allocator that made it). NULL is allowed and does nothing. */
HOLDFAST_API void holdfast_context_destroy(holdfast_context *context);

/** Text of the last call on `context` that failed: which argument, what it was, what was expected. "" if none failed yet.
 *  NULL: the last failure of this thread on the default context. Valid until the next call on the same context (NULL: by
 *  the same thread). */
HOLDFAST_API const char *holdfast_last_error(const holdfast_context *context);

/** Force the target whose variants run, by name ("avx512", "cuda", "generic": holdfast_variant_at lists them); NULL goes
 *  back to the default, which is the environment variable HOLDFAST_TARGET where it is set (read once, at the library's
 *  first use) and else the best target of the backend that is in use. Tensors on the CPU may be computed by a GPU's target:
 *  they are then copied there and back, and the call waits for that. Tensors on a GPU need a target of their own backend.
 *  @returns HOLDFAST_INVALID_ARGUMENT for a NULL context, HOLDFAST_TARGET_UNAVAILABLE for an unknown name or a target that
 *  does not run here; the option then stays as it was. A bad HOLDFAST_TARGET fails the calls that would use it. */
HOLDFAST_API holdfast_status holdfast_context_set_target(holdfast_context *context, const char *target);

/** Force the backend whose best target runs, by name ("cpu", "cuda", "metal", "opencl", "vulkan"), also for tensors on the
 *  CPU; NULL goes back to the default, the backend of the device that the tensors are on. A target that is forced must be of
 *  that backend.
 *  @returns HOLDFAST_INVALID_ARGUMENT for a NULL context, HOLDFAST_TARGET_UNAVAILABLE for an unknown name or a backend that
 *  was not compiled or cannot run here; the option then stays as it was. */
HOLDFAST_API holdfast_status holdfast_context_set_backend(holdfast_context *context, const char *backend);

/** CUDA: the CUcontext to work in. NULL (default): that of the stream, else the one that is current on the calling thread if
 *  it is of the tensors' device, else the device's primary context (PyTorch's). Tensors on the CPU go to the device of the context
 *  that is found so, else to the first that will do. Other backends do not look at it.
 *  @returns HOLDFAST_INVALID_ARGUMENT for a NULL context. A CUcontext of another device fails the calls that would use it. */
HOLDFAST_API holdfast_status holdfast_context_set_device(holdfast_context *context, void *device);

/** Where work on a GPU is put: a CUstream (NULL: the default stream) or a cl_command_queue, in order, of the cl_context that
 *  the tensors are of (NULL: a queue of the library, for tensors on the CPU alone). Calls on tensors of a CUDA or OpenCL
 *  device return when their work is in the stream, before it is done. Metal and Vulkan do not look at it: there a call
 *  returns when its work is done. It must be a stream of the backend that the calls run on: OpenCL refuses what is no object of one of
 *  its drivers; a CUstream is not looked at.
 *  @returns HOLDFAST_INVALID_ARGUMENT for a NULL context. A cl_command_queue that is none fails the calls that would use it. */
HOLDFAST_API holdfast_status holdfast_context_set_stream(holdfast_context *context, void *stream);

/** At most this many threads work on a call, the calling one included. 0 (default): one per core that the process may use.
 *  @returns HOLDFAST_INVALID_ARGUMENT for a NULL context, a negative number, or more than 256. */
HOLDFAST_API holdfast_status holdfast_context_set_threads(holdfast_context *context, int threads);

/** A caller's thread pool: must call task(closure, i) once for each i in [0, tasks), from any threads, in any order, and
 *  return 0 after all have finished; another value fails the call with HOLDFAST_INTERNAL_ERROR. Tasks do not throw. */
typedef int (*holdfast_parallel_for)(void *user, int tasks, void (*task)(void *closure, int index), void *closure);

/** Run parallel work on the caller's pool; NULL goes back to the library's. Each call starts as many tasks as
 *  holdfast_context_set_threads allows, so the pool may have fewer or more threads.
 *  @returns HOLDFAST_INVALID_ARGUMENT for a NULL context. */
HOLDFAST_API holdfast_status holdfast_context_set_thread_pool(holdfast_context *context, holdfast_parallel_for parallel_for,
                                                              void *user);

/** Allocate `bytes` aligned to `alignment` (a power of two), or return NULL. May be called from several threads at once. */
typedef void *(*holdfast_allocate)(void *user, size_t bytes, size_t alignment);
/** Free what the matching holdfast_allocate returned; `bytes` is what was asked for. */
typedef void (*holdfast_deallocate)(void *user, void *memory, size_t bytes);

/** Take workspace from the caller's allocator; both NULL go back to the library's own. Workspace held so far is freed first.
 *  Workspace is kept for reuse until the context is destroyed or this function is called, of every size that a call has asked for
 *  when nothing was free that was as large: calls of ever larger T in the parallel form add up. How much one call takes is said at
 *  holdfast_forward and holdfast_backward; it does not depend on T but in the parallel form, and as the latter says.
 *  @returns HOLDFAST_INVALID_ARGUMENT for a NULL context, or when just one of the two is NULL. */
HOLDFAST_API holdfast_status holdfast_context_set_allocator(holdfast_context *context, holdfast_allocate allocate,
                                                            holdfast_deallocate deallocate, void *user);

/** Receives one line per kernel call: which variant runs, why, and on what. `message` is valid during the callback. */
typedef void (*holdfast_verbose)(void *user, const char *message);

/** Set the verbose callback; NULL (default): silence. It is called on the thread that makes the call, before work begins.
 *  @returns HOLDFAST_INVALID_ARGUMENT for a NULL context. */
HOLDFAST_API holdfast_status holdfast_context_set_verbose(holdfast_context *context, holdfast_verbose verbose, void *user);

/* ---- What was compiled, and what runs here ----------------------------------------------------------------------- */

/** One compiled variant of a kernel. Strings are static. */
typedef struct holdfast_variant {
    const char *name;       /**< e.g. "chunkwise_f32_c64_k64_v64_avx512" */
    const char *kernel;     /**< "chunkwise", "parallel", "recurrent", "power", "power_step", "rotate" or "head_norm_gate"; of
                                 gradients "chunkwise_backward", "parallel_backward", "power_backward" or
                                 "head_norm_gate_backward" */
    const char *dtype;      /**< of q, k, v, x, gate and out: "f32", "f16" (float16) or "bf16" (bfloat16) */
    const char *target;     /**< what holdfast_context_set_target takes */
    int32_t chunk;          /**< tokens in a chunk, at most, or, of "recurrent", in a block; 0: the kernel has none */
    int32_t key_size;       /**< K; 0: any */
    int32_t value_size;     /**< V; 0: any */
    int32_t row_alignment;  /**< bytes: it runs calls in which all rows of q, k, v and out, which the last axis makes, start at
                                multiples of this; others run the next variant that takes them. The size of one element:
                                any rows */
    int32_t round_operands; /**< 1 where matrix products read what is not of dtype rounded to it: holdfast_forward */
    int32_t runs_here;      /**< 1 where this machine has the CPU features, or the GPU and its driver, that it needs; else 0 */
    int32_t selected;    /**< 1 where calls of its kernel, dtype and sizes, with the default chunk size, rows as row_alignment
                              says, and tensors on a device of its backend (or that backend forced), run this variant, for
                              all of their tokens or for some: of "recurrent" there may be one for single tokens and one for
                              blocks of them. Or, where threads are left over, one for fewer values that gives the same bits */
    const char *missing; /**< the CPU features that this machine lacks, separated by spaces, or why its backend cannot run;
                              "" where it runs */
    int32_t degree;      /**< of the power of q.k, of kernels that know degrees; 0: any */
} holdfast_variant;

/** Number of variants in this build. */
HOLDFAST_API int holdfast_variant_count(void);

/** Describe variant `index`, counted from 0, best target first, as seen by `context` (its forced target and backend decide
 *  `selected`). For one of a GPU this loads the backend's driver, as holdfast_backend_at does.
 *  @returns HOLDFAST_INVALID_ARGUMENT for an index out of range or a NULL `variant`; HOLDFAST_TARGET_UNAVAILABLE for a bad
 *  HOLDFAST_TARGET (with *variant filled in, `selected` 0). */
HOLDFAST_API holdfast_status holdfast_variant_at(holdfast_context *context, int index, holdfast_variant *variant);

/** What can run kernels: the CPU, or a GPU's API. Set struct_size to sizeof(holdfast_backend); strings are static. */
typedef struct holdfast_backend {
    size_t struct_size;   /**< sizeof(holdfast_backend) */
    const char *name;     /**< "cpu", "cuda", "metal", "opencl", "vulkan": what holdfast_context_set_backend takes */
    int32_t compiled;     /**< 1 where this build has a target of it, else 0 */
    int32_t available;    /**< 1 where it can run here, else 0 */
    const char *missing;  /**< why it cannot; "" where it can */
    int32_t device_count; /**< devices found, also where none of them will do */
    const char *devices;  /**< their names, separated by newlines, in the order of DLPack's device_id on CUDA */
    const char *targets;  /**< its targets in this build, separated by spaces, best first */
} holdfast_backend;

/** Number of backends that the library knows, compiled or not. */
HOLDFAST_API int holdfast_backend_count(void);

/** Describe backend `index`, counted from 0. The first time in a process this loads the backend's driver and looks for
 *  devices: some milliseconds to seconds, once. Nothing else loads a driver, except to force the backend or one of its targets,
 *  to give it tensors, or to describe its variants. May be called from any number of threads at once.
 *  @returns HOLDFAST_INVALID_ARGUMENT for an index out of range, a NULL `backend` or a wrong struct_size (the text is that of
 *  holdfast_last_error(NULL)). A backend that cannot run is no error. */
HOLDFAST_API holdfast_status holdfast_backend_at(int index, holdfast_backend *backend);

/** Features of this CPU that the operating system lets programs use, of those the library knows, separated by spaces, e.g.
 *  "sse41 avx avx2 f16c fma avx512f". A static string. */
HOLDFAST_API const char *holdfast_cpu_features(void);

/* ---- Retention --------------------------------------------------------------------------------------------------- */

/** What out is divided by. */
typedef enum holdfast_normalize {
    HOLDFAST_NORMALIZE_DEFAULT = 0,       /**< the sum of weights for a degree above 1, else nothing */
    HOLDFAST_NORMALIZE_NONE = 1,          /**< nothing (RetNet) */
    HOLDFAST_NORMALIZE_SUM_OF_WEIGHTS = 2 /**< the sum of weights (power retention) */
} holdfast_normalize;

/** How a call is computed. All forms give the same to rounding. */
typedef enum holdfast_form {
    HOLDFAST_FORM_AUTO = 0,      /**< the library's choice, by T and sizes */
    HOLDFAST_FORM_PARALLEL = 1,  /**< from all T x T weights: time and memory quadratic in T */
    HOLDFAST_FORM_CHUNKWISE = 2, /**< weights inside chunks, states between them: linear in T */
    HOLDFAST_FORM_RECURRENT = 3  /**< token by token, as holdfast_step does */
} holdfast_form;

/** Order of the last two axes of states. */
typedef enum holdfast_state_layout {
    HOLDFAST_STATE_KEY_MAJOR = 0,  /**< [..., D, V] */
    HOLDFAST_STATE_VALUE_MAJOR = 1 /**< [..., V, D] */
} holdfast_state_layout;

/** Order of the features of an expanded key phi(k) in states and sums of keys, for a degree above 1. */
typedef enum holdfast_expansion {
    /** The monomials of degree p once each: D = (K + p - 1)! / (p! (K - 1)!). x[a_1] .. x[a_p], a_1 <= .. <= a_p, is feature
     *  C(a_1, 1) + C(a_2 + 1, 2) + .. + C(a_p + p - 1, p), for p = 2 a_1 + a_2 (a_2 + 1) / 2, on both sides times the root of the number
     *  of orders that its factors have (p! / (how often each is there)!). It does not depend on K. */
    HOLDFAST_EXPANSION_TIGHT = 0,
    /** Degree 2 and K a multiple of 16: for Y in 0 .. K/16 - 1, o in 0 .. 16 Y + 15, i in 0 .. 15 the feature x[o] x[16 Y + i], on
     *  the side of keys times 2 where o < 16 Y. D = 128 (K/16) (K/16 + 1). Pairs of one block are there twice, o and i
     *  either way round: of a state that is given the mean of both counts, also for T = 0; for gradients of states that is the same. */
    HOLDFAST_EXPANSION_TILED = 1
} holdfast_expansion;

/** Arguments of holdfast_forward. Set struct_size to sizeof(holdfast_forward_args) and everything not used to zero, best by
 *  `holdfast_forward_args args = {.struct_size = sizeof args};` in C. The struct grows at its end in later versions: the
 *  library accepts an older, shorter one, and a longer one whose unknown part is zero.
 *
 *  B batch, T time, H heads of queries, Hk heads of keys and values, K key size, V value size, D size of an expanded key (K for
 *  degree 1). H is a multiple of Hk: head h of q and out has head h / (H / Hk) of everything else. N sequences: B, or those of
 *  cu_seqlens. B, T, H and N may be 0; Hk where H is; K and V are at least 1. q, k, v, out and weights have one type, float32,
 *  float16 or bfloat16 (kDLFloat of 32 or 16 bits, kDLBfloat of 16); log_decay, the states and the sums of keys are float32
 *  always. All tensors but cu_seqlens are on one device, of a backend of this build: the CPU (kDLCPU, kDLCUDAHost), CUDA
 *  (kDLCUDA, kDLCUDAManaged; data is a device pointer), OpenCL (data is a cl_mem) or Metal (data is an id<MTLBuffer>). There
 *  they are used where they lie, at any byte_offset that their type allows; what is 2^31 elements or more behind the beginning of an
 *  OpenCL or Metal buffer begins at a multiple of CL_DEVICE_MEM_BASE_ADDR_ALIGN or 4 bytes, else HOLDFAST_UNSUPPORTED says so. Every
 *  axis may have any stride, also 0 (inputs) or negative (the CPU and CUDA), except that the last axis of all but log_decay and
 *  cu_seqlens is contiguous. */
typedef struct holdfast_forward_args {
    size_t struct_size;            /**< sizeof(holdfast_forward_args) */
    const DLTensor *q;             /**< queries [B, T, H, K] */
    const DLTensor *k;             /**< keys    [B, T, Hk, K] */
    const DLTensor *v;             /**< values  [B, T, Hk, V] */
    const DLTensor *log_decay;     /**< natural logarithm of the decay, [Hk] or [B, T, Hk], each <= 0; NULL: no decay.
                                         -infinity forgets all that came before. Positive and NaN are refused. */
    const DLTensor *initial_state; /**< [N, Hk, D, V]; NULL: zeros */
    DLTensor *out;                 /**< [B, T, H, V], written */
    DLTensor *final_state;         /**< [N, Hk, D, V], written; NULL: not wanted */
    float scale;                   /**< multiplies q.k, before the power; 0: K^-1/2. Finite. */
    int64_t chunk_size;            /**< work on at most this many tokens at a time; 0: the library's choice. Changes rounding
                                         and speed, nothing else. */
    const DLTensor *workspace;     /**< CUDA: memory for the call alone, uint8 [bytes], compact, on the tensors' device and
                                         aligned to 256 bytes, at least as large as holdfast_workspace_size says; the work in
                                         the stream uses it until it is done. NULL: the context keeps such memory, and
                                         allocates it when it has to grow. Other backends do not look at it. */
    int32_t degree;                /**< p, the power of q.k: 0 (which is 1) to 4 */
    int32_t normalize;             /**< a holdfast_normalize */
    int32_t form;                  /**< a holdfast_form */
    int32_t state_layout;          /**< a holdfast_state_layout, of both states */
    int32_t expansion;             /**< a holdfast_expansion; tight for a degree other than 2 */
    const DLTensor *initial_sum_of_keys; /**< [N, Hk, D], where out is normalized: given just when initial_state is */
    DLTensor *final_sum_of_keys;         /**< [N, Hk, D], written, where out is normalized; NULL: not wanted */
    const DLTensor *cu_seqlens;          /**< packed sequences: [N + 1], int32 or int64, on the CPU. Sequence s has the tokens
                                               cu_seqlens[s] .. cu_seqlens[s + 1] - 1 of the one batch entry, B = 1: from 0 to T,
                                               never falling; N is at least 1. NULL: one sequence per batch entry. */
    DLTensor *weights;                   /**< [B, H, T, T], written: what the values are multiplied by, divided by their sum
                                               where out is. For HOLDFAST_FORM_PARALLEL; NULL: not wanted */
    DLTensor *states; /**< [M, Hk, D, V], written: of each sequence the states after 0, state_interval, 2 state_interval, ..
                                               tokens and after all, one sequence after the other, each T / state_interval, rounded up,
                                               and one more. For degree 1 without normalization, on the CPU, and not for the parallel and
                                               the recurrent form. What holdfast_backward need not compute again; or to go on from anywhere.
                                               Threads beyond heads then share columns of values at most, not a head's tokens.
                                               NULL: not wanted */
    int64_t state_interval; /**< tokens from one of `states` to the next, at least 1; 0 where there are none. What
                                               holdfast_state_interval says is best for gradients */
} holdfast_forward_args;

/** Bytes of workspace that holdfast_forward needs for these arguments on `context`, of which `workspace` itself is not looked
 *  at: they depend on shapes, types and options alone, and are enough wherever the tensors lie and whatever their strides.
 *  0 where the tensors are not computed by CUDA: what a call takes on the CPU, of its context's allocator, holdfast_forward says.
 *  @returns like holdfast_forward, and HOLDFAST_INVALID_ARGUMENT for a NULL `bytes`. Nothing is computed. */
HOLDFAST_API holdfast_status holdfast_workspace_size(holdfast_context *context, const holdfast_forward_args *args,
                                                     size_t *bytes);

/** Retention of every sequence and head (decay first, then write):
 *
 *      S_t = exp(log_decay_t) S_{t-1} + phi(k_t)^T v_t     S: [D, V], S_0 = initial_state, final_state = S_T
 *      s_t = exp(log_decay_t) s_{t-1} + phi(k_t)           s: [D], likewise sum_of_keys, where out is normalized
 *      out_t = scale^p phi(q_t) S_t                        phi(q).phi(k) = (q.k)^p; for p = 1 phi(x) = x
 *      out_t = phi(q_t) S_t / phi(q_t) s_t                 where out is normalized
 *
 *  With a constant decay per head this is RetNet's retention (Sun et al. 2023, "Retentive Network", arXiv:2307.08621);
 *  with a decay per token, gated retention, also known as simple gated linear attention. Time is linear in T, workspace
 *  does not depend on T, except in the parallel form. Inputs of 16 bits are widened as they are read, sums are in fp32, and out
 *  is rounded once, at the end: to the nearest, ties to even, beyond the largest number to infinity. Variants with
 *  round_operands (tensor cores) also round, for products, the weights of tokens within a chunk and states to that type, and
 *  keys to the sum of two numbers of it: out is then within twice the rounding of its own type, as long as fp16's range from
 *  2^-24 to 65504 holds what is rounded, and but for numbers below 2^-126, which on x86 count as 0 there; sums and returned states
 *  stay fp32. A sequence cut anywhere and continued from final_state
 *  gives the same outputs to rounding; the same call on the same machine and target gives the same bits, for any number of
 *  threads.
 *
 *  HOLDFAST_FORM_AUTO is chunkwise, but on the CPU, unless chunk_size is set. For degree 1 without normalization recurrent where no
 *  sequence is longer than a quarter of a chunk, or, where a kernel was compiled for K and V, than three quarters of one, or a half where
 *  H > Hk (three eighths where H = 2 Hk and K V is at most 1024), or where H = Hk, K V is at most 1024 and T K V below 2^22. For a
 *  degree above 1 or normalization whichever form takes least time by a count of its operations and what its kernels reach; parallel
 *  never where there is an initial state or a sequence is longer than 32768 tokens. For degree 2 and K = V = 64 on AVX-512 and AVX2
 *  parallel up to 3776 tokens without states, and with a final one alone from 11 to 1856 (H = Hk).
 *
 *  Power retention (Kumar et al. 2025, arXiv:2507.04239) is degree 2 to 4 and normalization, whose out does not depend on scale. An odd
 *  degree keeps the sign of q.k, and the sum of weights may vanish: out is then infinite or not a number, as a division by it is; so it
 *  is where that sum, over that of q's largest element to the power p, is below the smallest number of float32. phi(k)^T v has to be
 *  within float32, and what is small next to |q|^p |k|^p v is lost in a state.
 *
 *  Workspace on the CPU, for each thread, G heads of queries to one of keys; of V the columns that it works on, where threads share a
 *  head's. Besides, once for the call, a copy of all initial states where final_state is initial_state and threads share a head's
 *  tokens, and of all initial sums of keys where the final ones are in their place and threads share a head's tokens or columns.
 *  Degree 1 without normalization, chunkwise: the states of the heads that it works on in turn, as many as 640 KiB hold but at least
 *  one, one state more, and what the kernel has of up to 8 chunks of a head (12 of 16 bits): their states and a few copies of their
 *  rows. Recurrent: V floats for each of up to 256 tokens, of 32 KiB in all but at least one, for T = 1 of each head; and where
 *  final_state is not wanted or value-major, states, for T > 1 as many as 512 KiB hold but at least one.
 *  A degree above 1 or normalization, chunkwise: D (V + 1) floats, a state and its sum of keys; 5 D for the table of features; and for
 *  the rows of a chunk 64 (1 + G) (3 K + 2 V + 8) at most. Recurrent: G V for each block of features, D / 64 or about as many (for a
 *  prime D above 127 D), (3 + G) D and G (K + V), for as many heads as have 512 KiB of states but at least one; 6 D for the table; and
 *  D (V + 1) where states are not advanced in place: final_state or, if normalized, final_sum_of_keys is not wanted, or states are
 *  value-major or tiled.
 *  Parallel, K and V rounded up to 32, T to 64: T (K + V) floats, a copy of one head's keys and values; T^2 / 32 for decays, of blocks
 *  of tokens; K V + 64 (2 K + 3 V + 128). With an initial state D (V + 71) more, the state and a block of rows expanded; with a final
 *  state K (V + 1) more, for a degree above 1 as much as chunkwise. At K = V = 64, degree 2 and T = 256 that is 0.2 MiB, with a final
 *  state 0.7 and with both 1.8.
 *
 *  T = 0: final_state = initial_state. Not-a-numbers and infinities in q, k, v stay in their sequence and head (those of k and v
 *  reach all heads of queries that share it), but may reach earlier tokens of the same chunk.
 *
 *  Aliasing: inputs may share memory with one another. Outputs overlap no other tensor, except that final_state may
 *  be exactly initial_state (the same elements in the same places), and final_sum_of_keys initial_sum_of_keys: they are then
 *  advanced in place.
 *
 *  On a GPU: one launch sequence for the whole problem, as far as 2^31 bytes and 2^15 batch entries or heads of queries reach, else
 *  one for each part of it. log_decay is not looked at, so positive ones are computed with. Workspace grows with T: the states
 *  between all chunks. For a degree above 1 or
 *  normalization, one launch sequence for each chunk of all batch entries or of a packed sequence, and workspace for one of them. The
 *  recurrent form, which is taken when it is asked for, is two launches for up to 64 tokens of all batch entries or of a packed
 *  sequence, for each token where heads share keys (what holdfast_step says for a degree above 1 or normalization), and one to put the
 *  initial state where it will be advanced. States
 *  are read and written where they lie in either layout; value-major ones by lines that each serve 32 rows of them. In the tiled
 *  order they are converted before the first launch and after the last, four launches that read and write each state once more, and
 *  workspace for the tight ones.
 *  On CUDA, given a workspace and after the first call in a CUcontext
 *  of the same sizes (which loads kernels), a call copies, allocates and waits for nothing, and may be captured in a graph, with the
 *  cu_seqlens of then. Calls on Metal, OpenCL and Vulkan are made one after the other in a process, whatever their contexts; those on
 *  CUDA run side by side. A process that has used a GPU and forks must not use it in the child.
 *
 *  @returns HOLDFAST_OK; HOLDFAST_INVALID_ARGUMENT; HOLDFAST_UNSUPPORTED (another dtype, a device of no backend of
 *  this build, an extent of 2^31 or more, D V above 2^25, a stride along T or K that a few chunks carry beyond 2^31
 *  elements, or, on the CPU, one of q or out that carries the heads that share keys beyond that, for a degree above 1 or normalization
 *  beyond 2^30; of a degree above 1 on the CPU, D V above 2^28, in the recurrent form D V H / Hk of 2^30 or more, or D degree! of
 *  2^31 or more, and in the parallel form none of these where no state is given or wanted; on a GPU, that one chunk of one head, or its
 *  state, carries beyond 2^31 bytes);
 *  HOLDFAST_TARGET_UNAVAILABLE; HOLDFAST_OUT_OF_MEMORY; HOLDFAST_DEVICE_ERROR; HOLDFAST_INTERNAL_ERROR.
 *  holdfast_last_error(context) has the text. Tensors as a whole may be larger than 2^31 bytes, but not those on the CPU that a GPU
 *  computes, each of which is copied to one buffer. Thread-safety: that of the context. */
HOLDFAST_API holdfast_status holdfast_forward(holdfast_context *context, const holdfast_forward_args *args);

/** D, the size of an expanded key and the rows of a state: K = `key_size` elements, `degree` 0 (which is 1) to 4, a
 *  holdfast_expansion. 0 where there is no such expansion, or D is beyond 2^53. */
HOLDFAST_API int64_t holdfast_state_size(int64_t key_size, int32_t degree, int32_t expansion);

/** The state_interval of holdfast_forward that suits gradients of rows of K = `key_size` and V = `value_size` elements of `dtype`: the
 *  least power of two with which `states`, but for two of a head, are at most an eighth of what q, k, v, out and their gradients take,
 *  where all heads have keys of their own, and at least 256, or 128 where a state takes more than 32 KiB. 256 for float32 at
 *  K = V = 64 (a 32nd), 128 at 128. 0 for sizes below 1, of 2^31 or more, or another dtype. */
HOLDFAST_API int64_t holdfast_state_interval(int64_t key_size, int64_t value_size, DLDataType dtype);

/** Copy states [N, Hk, D, V] or sums of keys [N, Hk, D] of degree 2 from the order `from_expansion` of features to the order
 *  `to_expansion`: phi(q) S stays the same to rounding. Both are float32, on the CPU, of any strides, and share no memory; key_size is
 *  K, a multiple of 16. Any other tensors' states go in and out in the order that their call names, so this is for exchange with other
 *  programs.
 *  @returns HOLDFAST_OK, HOLDFAST_INVALID_ARGUMENT, HOLDFAST_UNSUPPORTED. Thread-safety: that of the context. */
HOLDFAST_API holdfast_status holdfast_convert_state(holdfast_context *context, int64_t key_size, const DLTensor *from,
                                                    int32_t from_expansion, DLTensor *to, int32_t to_expansion);

/** Arguments of holdfast_step. As with holdfast_forward_args: set struct_size to sizeof(holdfast_step_args) and everything not
 *  used to zero; the struct grows at its end.
 *
 *  B batch, H heads of queries, Hk of keys and values, K key size, V value size, D size of an expanded key. Devices, extents,
 *  types and strides are as for holdfast_forward_args. One token of [B, T, H, K] tensors is a view of them, with a stride of T H K
 *  along B. */
typedef struct holdfast_step_args {
    size_t struct_size;        /**< sizeof(holdfast_step_args) */
    const DLTensor *q;         /**< queries [B, H, K] */
    const DLTensor *k;         /**< keys    [B, Hk, K] */
    const DLTensor *v;         /**< values  [B, Hk, V] */
    const DLTensor *log_decay; /**< natural logarithm of the decay, [Hk] or [B, Hk], each <= 0; NULL: no decay.
                                     -infinity forgets all that came before. Positive and NaN are refused. */
    DLTensor *state;           /**< [B, Hk, D, V], read and written */
    DLTensor *out;             /**< [B, H, V], written */
    float scale;               /**< multiplies q.k, before the power; 0: K^-1/2. Finite. */
    DLTensor *sum_of_keys;     /**< [B, Hk, D], read and written: given just where out is normalized */
    int32_t degree;            /**< p, the power of q.k: 0 (which is 1) to 4 */
    int32_t normalize;         /**< a holdfast_normalize */
    int32_t state_layout;      /**< a holdfast_state_layout */
    int32_t expansion;         /**< a holdfast_expansion; tight for a degree other than 2 */
    const DLTensor *workspace; /**< as in holdfast_forward_args, at least as large as holdfast_step_workspace_size says */
} holdfast_step_args;

/** Bytes of workspace that holdfast_step needs for these arguments, as holdfast_workspace_size says it of holdfast_forward: some
 *  V floats for each batch entry and head; for a degree above 1 or normalization about D (V H / Hk / 64 + 1) for each batch entry and
 *  head of keys, and D V for the tiled expansion. */
HOLDFAST_API holdfast_status holdfast_step_workspace_size(holdfast_context *context, const holdfast_step_args *args,
                                                          size_t *bytes);

/** Retention, recurrent form, of every batch entry and head: one token, the state advanced in place (decay first, then
 *  write). What a model does for each token that it generates.
 *
 *      S <- exp(log_decay) S + phi(k)^T v          S: [D, V], `state`
 *      s <- exp(log_decay) s + phi(k)              s: [D], `sum_of_keys`, where out is normalized
 *      out = scale^p phi(q) S                      of the new state
 *      out = phi(q) S / phi(q) s                   where out is normalized
 *
 *  The same as holdfast_forward with T = 1 and `state` as both states, on the CPU to the bit; as holdfast_forward of many tokens
 *  at once to rounding. Each state is read and written once; of heads of queries that share it, all but one read it
 *  again, block by block from cache for a degree above 1 or normalization. On the CPU a value-major state is turned over and back,
 *  in workspace. After the first call a context allocates nothing more on the CPU, where one thread works on up to half a megabyte
 *  of states; the same call on the same machine and target gives the same bits, for any number of threads.
 *
 *  On a GPU: what holdfast_forward says of log_decay, of CUDA's calls given a workspace and of those of other backends goes for
 *  steps too. A step is two launches for the whole problem, without a log_decay three; for a degree above 1 or normalization some more,
 *  once for all batch entries where their heads lie in a row and log_decay is of each, else once for each entry. A value-major state is
 *  advanced where it lies. One in the tiled order is converted and back, four launches more: it is read and written three times, not
 *  once, and takes workspace for the tight one.
 *
 *  Aliasing: q, k, v and log_decay may share memory with one another. state, sum_of_keys and out overlap no other tensor.
 *
 *  @returns HOLDFAST_OK; HOLDFAST_INVALID_ARGUMENT; HOLDFAST_UNSUPPORTED (another dtype, a device of no backend of this
 *  build, an extent of 2^31 or more, D V above 2^25, of a degree above 1 on the CPU above 2^28, D V H / Hk of 2^30 or more or
 *  D degree! of 2^31 or more, a stride along D that carries a state beyond 2^31 elements, on a GPU 2^31 bytes, or D V H / Hk of
 *  2^31 or more there, or one between heads that share keys as for holdfast_forward); HOLDFAST_TARGET_UNAVAILABLE;
 *  HOLDFAST_OUT_OF_MEMORY; HOLDFAST_DEVICE_ERROR; HOLDFAST_INTERNAL_ERROR. holdfast_last_error(context) has the text. On the last
 *  three the state may have been advanced in part. Thread-safety: that of the context. */
HOLDFAST_API holdfast_status holdfast_step(holdfast_context *context, const holdfast_step_args *args);

/** Arguments of holdfast_backward. As with holdfast_forward_args: set struct_size to sizeof(holdfast_backward_args) and everything not
 *  used to zero; the struct grows at its end.
 *
 *  Letters, devices, extents, offsets and strides are as for holdfast_forward_args. q, k, v, out, dout, dq, dk and dv have one type,
 *  float32, float16 or bfloat16; all else is float32. A gradient has the shape of what it is of. */
typedef struct holdfast_backward_args {
    size_t struct_size;                  /**< sizeof(holdfast_backward_args) */
    const DLTensor *q;                   /**< queries [B, T, H, K] */
    const DLTensor *k;                   /**< keys    [B, T, Hk, K] */
    const DLTensor *v;                   /**< values  [B, T, Hk, V] */
    const DLTensor *log_decay;           /**< as in holdfast_forward_args, [Hk] or [B, T, Hk]; NULL: no decay */
    const DLTensor *initial_state;       /**< [N, Hk, D, V]; NULL: zeros */
    const DLTensor *initial_sum_of_keys; /**< [N, Hk, D], where out is normalized: given just when initial_state is */
    const DLTensor *out;          /**< [B, T, H, V], as holdfast_forward wrote it: where it is normalized, else only checked,
                                               and may be NULL */
    const DLTensor *dout;         /**< [B, T, H, V], gradient of out; NULL: zeros */
    const DLTensor *dfinal_state; /**< [N, Hk, D, V], gradient of final_state; NULL: zeros */
    const DLTensor *dfinal_sum_of_keys; /**< [N, Hk, D], of final_sum_of_keys, where out is normalized; NULL: zeros */
    DLTensor *dq;                       /**< [B, T, H, K], written; NULL: not wanted, and the same for all that follow */
    DLTensor *dk;                       /**< [B, T, Hk, K], written */
    DLTensor *dv;                       /**< [B, T, Hk, V], written */
    DLTensor *dlog_decay;               /**< [Hk] or [B, T, Hk], as log_decay, which is then given; written */
    DLTensor *dinitial_state;           /**< [N, Hk, D, V], written, also where initial_state is NULL */
    DLTensor *dinitial_sum_of_keys;     /**< [N, Hk, D], written, where out is normalized */
    float scale;                        /**< as it was in holdfast_forward, and so are degree, normalize and cu_seqlens */
    int64_t chunk_size;         /**< work on at most this many tokens at a time; 0: the library's choice. Changes rounding,
                                               speed and memory, nothing else. */
    const DLTensor *workspace;  /**< as in holdfast_forward_args, at least as large as holdfast_backward_workspace_size says */
    int32_t degree;             /**< p, the power of q.k: 0 (which is 1) to 4 */
    int32_t normalize;          /**< a holdfast_normalize */
    int32_t form;               /**< a holdfast_form */
    int32_t state_layout;       /**< a holdfast_state_layout, of the initial state and of all gradients of states */
    int32_t expansion;          /**< a holdfast_expansion, likewise; tight for a degree other than 2 */
    const DLTensor *cu_seqlens; /**< packed sequences, as in holdfast_forward_args; NULL: one per batch entry */
    const DLTensor *states; /**< as holdfast_forward wrote them for the same arguments, which saves computing them again: see
                                               below; NULL: not given */
    int64_t state_interval; /**< as it was there */
} holdfast_backward_args;

/** Bytes of workspace that holdfast_backward needs for these arguments, as holdfast_workspace_size says it of holdfast_forward.
 *  @returns like holdfast_backward, and HOLDFAST_INVALID_ARGUMENT for a NULL `bytes`. Nothing is computed. */
HOLDFAST_API holdfast_status holdfast_backward_workspace_size(holdfast_context *context, const holdfast_backward_args *args,
                                                              size_t *bytes);

/** Gradients of holdfast_forward: of a loss whose derivatives by out, final_state and final_sum_of_keys are given. From the last
 *  token to the first, with S_t and s_t as holdfast_forward has them, a_t = exp(log_decay_t) and J(x) the derivative of phi at x, [D, K]
 *  (for p = 1 the identity):
 *
 *      dn_t = scale^p dout_t,  dm_t = 0                             of phi(q_t) S_t and phi(q_t) s_t
 *      dn_t = dout_t / m_t,    dm_t = -(out_t . dout_t) / m_t       where out is normalized, m_t = phi(q_t) s_t
 *      dS_t = a_{t+1} dS_{t+1} + phi(q_t)^T dn_t                    from dfinal_state, which stands for a_{T+1} dS_{T+1}
 *      ds_t = a_{t+1} ds_{t+1} + phi(q_t) dm_t                      likewise from dfinal_sum_of_keys
 *      dq_t = J(q_t)^T (S_t dn_t + s_t dm_t)
 *      dk_t = J(k_t)^T (dS_t v_t + ds_t)
 *      dv_t = dS_t^T phi(k_t)
 *      dlog_decay_t = a_t (<dS_t, S_{t-1}> + <ds_t, s_{t-1}>)       per head: the sum over batch and time
 *      dinitial_state = a_1 dS_1,  dinitial_sum_of_keys = a_1 ds_1
 *
 *  dS_t, ds_t and with them dk, dv and dlog_decay are sums over the heads of queries that share a key. A gradient that is NULL is not
 *  wanted: it costs nothing, and the others keep their bits, but that those of states decide with HOLDFAST_FORM_AUTO and _PARALLEL
 *  whether a degree above 1 goes by chunks. For dq alone no gradient of states is carried back over the sequence.
 *  Without dout nothing is computed of queries, and dq is zero; without dfinal_state and dfinal_sum_of_keys too all gradients are zero,
 *  and no kernel computes any. Where log_decay is -infinity dlog_decay is 0. It is as exact as the terms that it is made of: where all
 *  log decays are strong, g, within some 1.5e-7 sqrt(C) / exp(g) of itself, C the tokens of a chunk; per head, where errors of a
 *  chunk's tokens add up, within 2.5e-7 C / exp(g), which is 1e-5 at g = -0.25 for C = 32.
 *
 *  Inputs of 16 bits are widened as they are read, sums are in fp32, and each gradient is rounded once; that of a decay per head is
 *  summed in fp64. A normalized `out` of 16 bits is read as it was rounded: what is made of dm_t is wrong by as much, also dlog_decay,
 *  which is stored in fp32 (in bf16 by 2e-3 to 3e-3 of the gradient's root mean square). Variants with round_operands also round,
 *  for products, weights within a chunk and their gradients, and states and theirs, one factor of each term: dq, dk and dv are then
 *  within twice the rounding of their type, dlog_decay within one of the terms that it is a sum of, and dinitial_state stays fp32.
 *  A sequence cut in two, the gradients of the second part's initial state and sum of keys given to the first part as those of its
 *  final ones, has the gradients of the whole to rounding. The same call on the same machine and target gives the same bits, for
 *  any number of threads.
 *
 *  What is computed, where: the gradient is the same in every form, so it is computed from all T x T weights, without any state, for
 *  HOLDFAST_FORM_PARALLEL and a degree above 1 or normalization where no state, sum of keys, or gradient of one is given or
 *  wanted, and for HOLDFAST_FORM_AUTO on the CPU, unless chunk_size is set, where besides no sequence is longer than
 *  2 D (V + 1) (1 + Hk / H) / (K + V), three times that on AVX-512 and AVX2 where no kernel was compiled for K, V and the degree (at K =
 *  V = 64, degree 2 and H = Hk 4225 tokens); else chunk by chunk from the last to the first, also for HOLDFAST_FORM_RECURRENT.
 *
 *  Memory: nothing that holdfast_forward computes on its way has to be kept, and nothing of size T x T is on a CPU, but two floats for
 *  each pair of blocks of 64 tokens in the parallel form. States are computed again, first of all, and kept in workspace until the
 *  walk back is done: for degree 1 without normalization one for some chunks (at K = V = 64 for 256 tokens, 16 floats a token and
 *  head), of the heads that are worked on at the time. `states` that are given save that (a fifth of the time), where their rows
 *  are contiguous along V, and state_interval is at most so many tokens or a multiple of a chunk; others are not looked at. For a
 *  degree above 1 or normalization a gradient of states and as many of the states between chunks as with those of all threads fit
 *  into a quarter of the call's tensors, but s a thread, at least, for up to (s + 1) (s + 2) (s + 3) / 6 chunks; others are
 *  computed a second time, and where that is not enough a third, which takes 6 to 8% longer. The parallel form keeps rows in fp32
 *  and the scores of a block of them, about T ((2 + G) K + 2 V + 64) floats a thread, G heads of queries to one of keys, K + V less
 *  of 16 bits on AVX-512 and AVX2, and what it has of pairs of blocks. Threads beyond one for each sequence and head of keys have
 *  nothing to do.
 *
 *  T = 0: dinitial_state = dfinal_state, and dlog_decay per head is 0. Not-a-numbers and infinities stay in their sequence and group of
 *  heads, but for dlog_decay per head, which is of all sequences.
 *
 *  Aliasing: inputs may share memory with one another. Outputs overlap no other tensor, except that dinitial_state may be exactly
 *  dfinal_state (the same elements in the same places), and dinitial_sum_of_keys dfinal_sum_of_keys.
 *
 *  On a GPU, for degree 1 without normalization: a launch sequence for all batch entries, heads and chunks, as far as 2^31 bytes and
 *  2^15 batch entries or heads of queries reach, else for as many as they do. States between all chunks, what each adds to them,
 *  their gradients, and the weights and rows of all chunks are memory of the call, up to 4 K V (T / C + 1) + T (G (2 C + K) + 2 K + V)
 *  floats for each sequence and head of keys, G heads of queries to it, C = 64 tokens of a chunk for float32 at K = V = 64, else 32; and
 *  nothing is computed twice. A head that is too large for that takes several such
 *  sequences, of some of its tokens each, from the last to the first, and before them, for dq and dlog_decay, one like those of
 *  holdfast_forward for each to make the state that it begins with. For a degree above 1 or normalization: a launch sequence for each
 *  chunk, forward and back, with states kept or computed again as above, of all heads at a time in the place of threads; packed
 *  sequences one after the other. From all weights: three times T x T floats a head and sums of a 32nd of T x T, of as many heads at a
 *  time as 2^31 bytes hold of T x T; HOLDFAST_FORM_AUTO goes by chunks. A decay per head has its gradient summed by blocks of 256
 *  tokens, in fp32. What holdfast_forward says of log_decay, of tensors there and of streams goes for this call too.
 *
 *  HOLDFAST_UNSUPPORTED so far: on a GPU the parallel form where the T x T floats of a group of heads are more than 2^31 bytes, and
 *  dlog_decay per head where those of all tokens are.
 *
 *  @returns as holdfast_forward, HOLDFAST_UNSUPPORTED also for a stride between heads that share keys, of q, out, dout or dq, beyond
 *  2^31 elements for all of them. holdfast_last_error(context) has the text. Thread-safety: that of the context. */
HOLDFAST_API holdfast_status holdfast_backward(holdfast_context *context, const holdfast_backward_args *args);

/* ---- Around retention -------------------------------------------------------------------------------------------- */

/** Arguments of holdfast_rotate. Set struct_size to sizeof(holdfast_rotate_args) and everything not used to zero; the struct
 *  grows at its end.
 *
 *  B batch, T time, H heads, K features. B, T and H may be 0; K is even and at least 2. x and out have one type, float32, float16
 *  or bfloat16. Devices, offsets and strides are as for holdfast_forward_args; the last axis of x, theta and out is contiguous. */
typedef struct holdfast_rotate_args {
    size_t struct_size;        /**< sizeof(holdfast_rotate_args) */
    const DLTensor *x;         /**< queries or keys [B, T, H, K] */
    const DLTensor *theta;     /**< float32 [K/2]: how far each pair turns from one position to the next, in radians. Finite. */
    const DLTensor *positions; /**< of each token, int64 or int32, [T] or [B, T]; NULL: offset + t */
    DLTensor *out;             /**< [B, T, H, K], written */
    int64_t offset;            /**< position of the first token, for positions of NULL; else 0 */
    int32_t interleaved;       /**< pairs are 1: features 2 j and 2 j + 1; 0: features j and j + K/2 */
} holdfast_rotate_args;

/** Rotary position embedding (RoPE, the rotary half of xPos): each pair j of features of each token and head is turned.
 *
 *      angle = theta_j position
 *      out_0 = x_0 cos(angle) - x_1 sin(angle)
 *      out_1 = x_1 cos(angle) + x_0 sin(angle)
 *
 *  Conventional tables: theta_j = 10000^(-j / (K/2 - 1)) with interleaved pairs (RetNet's reference), theta_j = 10000^(-2 j / K)
 *  with halves (most others). The angle is exact for every position of 64 bits, also a negative one, and every theta: cos and sin
 *  are off by 1.7e-7 at most. The product is in fp32 and rounded once to the type of out. Position 0 leaves x as it is. The same
 *  call on the same machine and target gives the same bits, for any number of threads, and so does a call for some of its tokens
 *  or heads alone.
 *
 *  Aliasing: out may be exactly x (the same elements in the same places); else it overlaps no other tensor.
 *
 *  On the CPU one thread works on up to half a megabyte of x and out. After the first call a context allocates nothing more.
 *  On a GPU: one launch for up to 2^15 batch entries and tokens of each, in 2^31 bytes; what holdfast_forward says of CUDA's calls
 *  goes for this one without any workspace. theta is not looked at there: what is not finite is computed with.
 *
 *  @returns HOLDFAST_OK; HOLDFAST_INVALID_ARGUMENT; HOLDFAST_UNSUPPORTED (another dtype, a device of no backend of this build, an
 *  extent of 2^31 or more, a stride that carries the heads of a token beyond 2^29 elements); HOLDFAST_TARGET_UNAVAILABLE;
 *  HOLDFAST_OUT_OF_MEMORY; HOLDFAST_DEVICE_ERROR; HOLDFAST_INTERNAL_ERROR. holdfast_last_error(context) has the text.
 *  Thread-safety: that of the context. */
HOLDFAST_API holdfast_status holdfast_rotate(holdfast_context *context, const holdfast_rotate_args *args);

/** Arguments of holdfast_rotate_backward: those of holdfast_rotate with the gradients of out and x in their places. */
typedef struct holdfast_rotate_backward_args {
    size_t struct_size;        /**< sizeof(holdfast_rotate_backward_args) */
    const DLTensor *dout;      /**< gradient of out [B, T, H, K] */
    const DLTensor *theta;     /**< as in holdfast_rotate_args, and so are the others */
    const DLTensor *positions; /**< [T] or [B, T]; NULL: offset + t */
    DLTensor *dx;              /**< gradient of x [B, T, H, K], written */
    int64_t offset;
    int32_t interleaved;
} holdfast_rotate_backward_args;

/** The gradient of holdfast_rotate with respect to x: each pair is turned by the opposite angle.
 *
 *      angle = theta_j position
 *      dx_0 = dout_0 cos(angle) + dout_1 sin(angle)
 *      dx_1 = dout_1 cos(angle) - dout_0 sin(angle)
 *
 *  The same kernels with the sine of the other sign: angles are as exact, for every position of 64 bits, and rotating x and then out
 *  by the same arguments gives x to rounding. dx may be exactly dout (the same elements in the same places); else it overlaps no
 *  other tensor. Everything else is as for holdfast_rotate: shapes, types, devices, strides, bits, threads, launches.
 *
 *  @returns like holdfast_rotate. Thread-safety: that of the context. */
HOLDFAST_API holdfast_status holdfast_rotate_backward(holdfast_context *context, const holdfast_rotate_backward_args *args);

/** What holdfast_head_norm_gate takes from each row and divides it by. */
typedef enum holdfast_norm {
    HOLDFAST_NORM_RMS = 0,  /**< nothing; the root of the mean of the squares (RetNet's reference) */
    HOLDFAST_NORM_LAYER = 1 /**< the mean; the standard deviation (layer norm of each head: group norm) */
} holdfast_norm;

/** Arguments of holdfast_head_norm_gate. Set struct_size to sizeof(holdfast_head_norm_gate_args) and everything not used to zero;
 *  the struct grows at its end.
 *
 *  B batch, T time, H heads, V features. B, T and H may be 0; V is at least 1. x, gate and out have one type, float32, float16 or
 *  bfloat16. Devices, offsets and strides are as for holdfast_forward_args; the last axis of all is contiguous. */
typedef struct holdfast_head_norm_gate_args {
    size_t struct_size;     /**< sizeof(holdfast_head_norm_gate_args) */
    const DLTensor *x;      /**< outputs of retention [B, T, H, V] */
    const DLTensor *gate;   /**< [B, T, H, V]; NULL: no gate */
    const DLTensor *weight; /**< float32, [V] for all heads or [H, V]; NULL: ones */
    DLTensor *out;          /**< [B, T, H, V], written */
    int32_t norm;           /**< a holdfast_norm */
    float eps;              /**< added to the mean square, or to the variance; finite, at least 0 */
} holdfast_head_norm_gate_args;

/** The norm of each head after retention, then the swish gate, row by row of V features:
 *
 *      y = x / sqrt(mean(x^2) + eps)                          HOLDFAST_NORM_RMS
 *      y = (x - mean(x)) / sqrt(variance(x) + eps)            HOLDFAST_NORM_LAYER; the variance of the row, divided by V
 *      out = y weight gate / (1 + exp(-gate))
 *
 *  All of it is in fp32 and rounded once to the type of out. The variance is that of what the mean leaves, and the mean that of the
 *  distances to the first feature: rows far from 0 lose nothing. Squares that fp32 cannot hold, of features beyond 1.8e19, give 0;
 *  a row of zeros with eps = 0 gives not-a-numbers. The same call on the same machine and target gives the same bits, for any number
 *  of threads, and so does a call for some of its tokens or heads alone.
 *
 *  Aliasing: out may be exactly x or exactly gate (the same elements in the same places); else it overlaps no other tensor.
 *
 *  Threads, memory and launches are as for holdfast_rotate.
 *
 *  @returns HOLDFAST_OK; HOLDFAST_INVALID_ARGUMENT; HOLDFAST_UNSUPPORTED (another dtype, a device of no backend of this build, an
 *  extent of 2^31 or more, a stride that carries the heads of a token beyond 2^29 elements); HOLDFAST_TARGET_UNAVAILABLE;
 *  HOLDFAST_OUT_OF_MEMORY; HOLDFAST_DEVICE_ERROR; HOLDFAST_INTERNAL_ERROR. holdfast_last_error(context) has the text.
 *  Thread-safety: that of the context. */
HOLDFAST_API holdfast_status holdfast_head_norm_gate(holdfast_context *context, const holdfast_head_norm_gate_args *args);

/** Arguments of holdfast_head_norm_gate_backward. Set struct_size to sizeof(holdfast_head_norm_gate_backward_args) and everything not
 *  used to zero; the struct grows at its end.
 *
 *  Extents, devices, offsets and strides are as for holdfast_head_norm_gate_args. x, gate, dout, dx and dgate have one type, float32,
 *  float16 or bfloat16; weight and dweight are float32. A gradient that is NULL is not wanted, and costs nothing. */
typedef struct holdfast_head_norm_gate_backward_args {
    size_t struct_size;     /**< sizeof(holdfast_head_norm_gate_backward_args) */
    const DLTensor *x;      /**< what holdfast_head_norm_gate got [B, T, H, V] */
    const DLTensor *gate;   /**< likewise [B, T, H, V]; NULL: no gate */
    const DLTensor *weight; /**< likewise, float32, [V] or [H, V]; NULL: ones */
    const DLTensor *dout;   /**< gradient of out [B, T, H, V] */
    DLTensor *dx;           /**< gradient of x [B, T, H, V], written; NULL: not wanted */
    DLTensor *dgate;        /**< gradient of gate [B, T, H, V], written; NULL: not wanted. Only where gate is given */
    DLTensor *dweight;      /**< gradient of weight, of its shape, written; NULL: not wanted. Only where weight is given */
    int32_t norm;           /**< a holdfast_norm */
    float eps;              /**< added to the mean square, or to the variance; finite, at least 0 */
} holdfast_head_norm_gate_backward_args;

/** The gradient of holdfast_head_norm_gate. With y as there, n = y / d the row normed by d = sqrt(mean(x^2) + eps), of layer norm
 *  sqrt(variance(x) + eps), p = 1 / (1 + exp(-gate)) and s = gate p, of every row of V features:
 *
 *      u = dout weight s
 *      dx = (u - n mean(u n)) / d                             HOLDFAST_NORM_RMS
 *      dx = (u - mean(u) - n mean(u n)) / d                   HOLDFAST_NORM_LAYER
 *      dgate = dout weight n p (1 + gate (1 - p))
 *      dweight = the sum of dout n s over all tokens and batch entries; of a weight [V] over all heads too
 *
 *  Nothing of the forward call is needed but its inputs. All of it is in fp32; dx and dgate are rounded once to their type. On the
 *  CPU dweight is summed up in fp32 over at most 1024 tokens, and of these sums in double; on a GPU in fp32, of sums over 64 tokens.
 *  The same call on the same machine and target gives the same bits, for any number of threads; so do dx and dgate of some of its
 *  tokens or heads alone. Numbers that fp32 cannot hold are as for holdfast_head_norm_gate.
 *
 *  Aliasing: inputs may share memory with one another. Outputs overlap no other tensor.
 *
 *  On the CPU one thread works on up to half a megabyte of rows, and for dweight on at least 1/256 of all. Workspace is half a
 *  megabyte for each thread (more where one token has more), and for dweight 256 rows [H, V] of doubles at most; after the first call
 *  a context allocates nothing more. On a GPU: a launch for the sums of rows, of layer norm two, and one for the weights; one for
 *  dx, one for dgate, and five for dweight; for up to 2^15 batch entries and tokens of each, in 2^31 bytes, at once. Device memory
 *  of a few floats for each token and head, and for dweight V for each 64 tokens and head, is the context's, which on CUDA
 *  allocates it when it has to grow.
 *
 *  @returns like holdfast_head_norm_gate; HOLDFAST_INVALID_ARGUMENT also for dgate without gate, and dweight without weight.
 *  Thread-safety: that of the context. */
HOLDFAST_API holdfast_status holdfast_head_norm_gate_backward(holdfast_context *context,
                                                              const holdfast_head_norm_gate_backward_args *args);

#ifdef __cplusplus
}
#endif

#endif /* HOLDFAST_H */
