// CUDA's driver API, loaded at first use, and how kernels of Halide run on it: in the caller's context and stream.
#pragma once
#include "backend.h"

#include <cstddef>
#include <cstdint>

typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;

namespace holdfast::cuda {

/// Called by availability().
Availability probe();

/// The context to work in: `context` if given, else that of `stream`, else the one that is current on this thread if it is of
/// `device`, else the device's primary context, which stays alive from then on. Throws for one of another device. any_device: of the
/// context that is found, else the first that will do.
CUcontext choose_context(CUcontext context, CUstream stream, int device);
constexpr int any_device = -1;

/// Tells a context from a later one at its address, where the driver has a number for it.
unsigned long long id_of(CUcontext context);

/// A number of the calling thread, where the handle stands for a stream of each; else 0.
unsigned long long thread_of(CUstream stream);

/// `context` is current on this thread while this lives.
class Current {
public:
    explicit Current(CUcontext context);
    Current(const Current &) = delete;
    ~Current();

private:
    bool pushed = false;
};

// In the current context. They throw OUT_OF_MEMORY and DEVICE_ERROR with the name of what failed.
uint64_t allocate(size_t bytes);
/// Of the context that had that id.
void deallocate(CUcontext context, unsigned long long id, uint64_t memory) noexcept;
void copy_in(uint64_t to, const void *from, size_t bytes, CUstream stream);
void copy_out(void *to, uint64_t from, size_t bytes, CUstream stream);
void wait(CUstream stream);

}  // namespace holdfast::cuda
