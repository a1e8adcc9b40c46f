// What a holdfast_context holds, and how work runs on it: threads, workspace, and the hooks that kernels call back.
#pragma once
#include "holdfast/holdfast.h"
#include "device.h"
#include "variants.h"

#include <atomic>
#include <cstddef>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace holdfast {

/// Where memory comes from: the caller's functions, or the library's own.
struct Allocator {
    holdfast_allocate allocate;
    holdfast_deallocate deallocate;
    void *user;
};

/// Memory of one thread of a call. Kernels get it as their user_context: they allocate from it and leave error texts in it.
/// Blocks are kept when freed, since each call of a kernel asks for the same ones again.
class Workspace {
public:
    explicit Workspace(const Allocator &allocator) : allocator(allocator) {}
    Workspace(const Workspace &) = delete;
    ~Workspace();
    void *allocate(size_t bytes);  // null when memory is short; aligned for every vector unit
    void free(void *memory);
    std::string error;  // of the kernel that failed last: the first text, which says what was wrong

    DeviceCall *device = nullptr;  // of the call that is under way, if that is one on a GPU
    DeviceMemory device_memory;    // kept for the next one

private:
    struct Block {
        void *memory;
        size_t bytes;
        bool used;
    };
    Allocator allocator;
    std::vector<Block> blocks;  // by size
};

}  // namespace holdfast

struct holdfast_context {
    holdfast_context();
    std::string error;
    const holdfast::Target *target = nullptr;   // forced; null: HOLDFAST_TARGET, or the best
    std::optional<holdfast::Backend> backend;   // forced; none: where the tensors are
    void *device = nullptr, *stream = nullptr;  // as holdfast_context_set_device and _set_stream took them
    int threads = 0;                            // 0: one per core
    holdfast_parallel_for parallel_for = nullptr;
    void *parallel_for_user = nullptr;
    holdfast::Allocator allocator;
    holdfast_verbose verbose = nullptr;
    void *verbose_user = nullptr;

    /// Threads that a call with `items` pieces of work uses.
    int threads_for(int64_t items) const;
    /// The same, of one with work for all of them.
    int all_threads() const { return threads_for(std::numeric_limits<int64_t>::max()); }

    /// Call work(workspace, item) once for each of `items`, on threads_for(items) threads. The first failure ends the call.
    void for_each(int64_t items, const std::function<void(holdfast::Workspace &, int64_t)> &work);

    /// Call work(workspace) on this thread, with a workspace that has device memory if one is idle.
    void on_gpu(const std::function<void(holdfast::Workspace &)> &work);

    std::mutex idle_mutex;
    std::vector<std::unique_ptr<holdfast::Workspace>> idle, idle_of_gpu;  // workspaces that no call uses
};

namespace holdfast {

/// `context`, or the process's default one.
holdfast_context &resolve(holdfast_context *context);

/// What a call whose tensors are on `home` runs on: a target or backend that is forced, else `home`. Host tensors can go
/// anywhere, others only to their own backend. Throws TARGET_UNAVAILABLE, UNSUPPORTED.
Choice choose_backend(const holdfast_context &context, Backend home);

/// Run `body(context)`, turn what it throws into a status, and keep the text for holdfast_last_error.
holdfast_status guarded(holdfast_context *context, const std::function<void(holdfast_context &)> &body);

}  // namespace holdfast
