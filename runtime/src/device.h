// One call on a GPU: where it runs, the memory it may use, and buffers there. Kernels of a GPU backend, and Halide's runtime
// under them, come back here through their user_context for memory, context and queue (device.cpp, cuda.cpp).
//
// On CUDA all memory of a call is cut out of one block, the caller's workspace or one that the holdfast_context keeps: how
// large it must be is found by a rehearsal, which runs the host code of the kernels without launching them. Elsewhere each
// piece is a buffer of its own, kept by the holdfast_context for the next call.
#pragma once
#include "arena.h"
#include "backend.h"
#include "tensor.h"

#include <HalideRuntime.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace holdfast {

/// Where a call runs. Native handles as holdfast_context_set_device and _set_stream take them; Metal takes none.
struct Place {
    Backend backend = Backend::cpu;
    void *context = nullptr;        // CUcontext, cl_context; null: the library's own
    void *stream = nullptr;         // CUstream, cl_command_queue
    unsigned long long id = 0;      // CUDA: tells a context from a later one at the same address
    unsigned long long thread = 0;  // CUDA: whose stream it is, where one handle stands for a stream of each thread
    bool operator==(const Place &other) const {
        return backend == other.backend && context == other.context && stream == other.stream && id == other.id &&
               thread == other.thread;
    }
};

/// Memory of a device that outlives a call: what a holdfast_context keeps.
class DeviceMemory {
public:
    DeviceMemory() = default;
    DeviceMemory(const DeviceMemory &) = delete;
    ~DeviceMemory() { release(); }

    /// Give all of it back if it is not of `place`. Work of earlier calls that uses it is waited for.
    void move_to(const Place &place);
    void release() noexcept;

    /// CUDA: one block of at least that many bytes, in the current context.
    uint64_t block(size_t bytes);

    /// Others: memory for `buffer`, and its return. A status of Halide.
    int lend(void *user_context, halide_buffer_t *buffer);
    void take_back(void *user_context, halide_buffer_t *buffer);

    /// A call begins; it is done, and where it had to allocate, what it had no use for is given back.
    void begin();
    void finish(void *user_context);

    /// Memory that nobody keeps.
    static int allocate(void *user_context, Backend backend, halide_buffer_t *buffer);
    static int deallocate(void *user_context, Backend backend, halide_buffer_t *buffer);

private:
    // Halide 21's Vulkan runtime mixes up regions of a block when some stay in use while their neighbours come and go.
    bool keeps() const { return place.backend != Backend::vulkan; }

    Place place;
    uint64_t memory = 0;
    size_t bytes = 0;
    struct Piece {
        uint64_t device;
        size_t bytes;
        bool used, of_this_call;
    };
    std::vector<Piece> pieces;
    bool grown = false;  // in this call

    /// Give back those that are not in use; of them those of this call only if `all`.
    void drop(void *user_context, bool all);
};

/// What the user_context of a kernel on a GPU leads to (Workspace::device).
struct DeviceCall {
    Place place;
    Arena *arena = nullptr;          // CUDA
    DeviceMemory *memory = nullptr;  // others
    bool rehearsal = false;          // CUDA: nothing reaches the driver
};

}  // namespace holdfast
