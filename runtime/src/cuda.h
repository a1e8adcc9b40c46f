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
/// `device`, else the device's primary context, which stays alive from then on. Throws for one of another device.
CUcontext choose_context(CUcontext context, CUstream stream, int device);

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
void deallocate(CUcontext context, uint64_t memory) noexcept;
void copy_in(uint64_t to, const void *from, size_t bytes, CUstream stream);
void copy_out(void *to, uint64_t from, size_t bytes, CUstream stream);
void wait(CUstream stream);

}  // namespace holdfast::cuda
