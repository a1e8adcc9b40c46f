// What Halide's runtime asks for while a kernel of a GPU backend runs: memory (all backends) and OpenCL's context and queue.
#include "device.h"

#include "context.h"
#include "cuda.h"

#include <algorithm>
#include <new>

// Halide's own memory functions of each API, which its public ones lead to.
extern "C" {
#define HOLDFAST_MEMORY(api) \
    int halide_##api##_device_malloc(void *user_context, halide_buffer_t *); \
    int halide_##api##_device_free(void *user_context, halide_buffer_t *);
HOLDFAST_MEMORY(metal)
HOLDFAST_MEMORY(opencl)
HOLDFAST_MEMORY(vulkan)
#undef HOLDFAST_MEMORY
}

namespace holdfast {

int DeviceMemory::allocate([[maybe_unused]] void *user_context, Backend backend, [[maybe_unused]] halide_buffer_t *buffer) {
    switch (backend) {
#if HOLDFAST_HAS_METAL
    case Backend::metal: return halide_metal_device_malloc(user_context, buffer);
#endif
#if HOLDFAST_HAS_OPENCL
    case Backend::opencl: return halide_opencl_device_malloc(user_context, buffer);
#endif
#if HOLDFAST_HAS_VULKAN
    case Backend::vulkan: return halide_vulkan_device_malloc(user_context, buffer);
#endif
    default: return halide_error_code_no_device_interface;
    }
}

int DeviceMemory::deallocate([[maybe_unused]] void *user_context, Backend backend, [[maybe_unused]] halide_buffer_t *buffer) {
    switch (backend) {
#if HOLDFAST_HAS_METAL
    case Backend::metal: return halide_metal_device_free(user_context, buffer);
#endif
#if HOLDFAST_HAS_OPENCL
    case Backend::opencl: return halide_opencl_device_free(user_context, buffer);
#endif
#if HOLDFAST_HAS_VULKAN
    case Backend::vulkan: return halide_vulkan_device_free(user_context, buffer);
#endif
    default: return halide_error_code_no_device_interface;
    }
}

void DeviceMemory::move_to(const Place &to) {
    if (!(place == to)) release();
    place = to;
}

void DeviceMemory::release() noexcept {
    if (memory) cuda::deallocate((CUcontext)place.context, place.id, memory);  // waits for the device
    memory = 0, bytes = 0;
    if (pieces.empty()) return;
    std::lock_guard<std::mutex> lock(call_mutex(place.backend));
    Workspace workspace(resolve(nullptr).allocator);
    DeviceCall call{place};
    workspace.device = &call;
    for (Piece &piece : pieces) piece.used = false;
    drop(&workspace, true);
}

void DeviceMemory::drop(void *user_context, bool all) {
    auto leaves = [&](const Piece &piece) {
        if (piece.used || (piece.of_this_call && !all)) return false;
        halide_buffer_t buffer{};
        buffer.device = piece.device, buffer.device_interface = device_interface(place.backend);
        deallocate(user_context, place.backend, &buffer);
        return true;
    };
    pieces.erase(std::remove_if(pieces.begin(), pieces.end(), leaves), pieces.end());
}

void DeviceMemory::begin() {
    for (Piece &piece : pieces) piece.of_this_call = false;
    grown = false;
}

void DeviceMemory::finish(void *user_context) {
    if (grown) drop(user_context, false);
}

uint64_t DeviceMemory::block(size_t wanted) {
    if (wanted > bytes) {
        release();
        memory = cuda::allocate(wanted);
        bytes = wanted;
    }
    return memory;
}

int DeviceMemory::lend(void *user_context, halide_buffer_t *buffer) {
    if (!keeps()) return allocate(user_context, place.backend, buffer);
    const size_t wanted =
        (std::max<size_t>(buffer->size_in_bytes(), 1) + Arena::alignment - 1) / Arena::alignment * Arena::alignment;
    Piece *best = nullptr;
    for (Piece &piece : pieces)
        if (!piece.used && piece.bytes >= wanted && (!best || piece.bytes < best->bytes)) best = &piece;
    if (!best) {
        pieces.reserve(pieces.size() + 1);  // so that nothing throws once there is memory to lose
        halide_dimension_t axis(0, (int32_t)(wanted / 4), 1);
        halide_buffer_t whole{};
        whole.type = halide_type_t(halide_type_uint, 32), whole.dimensions = 1, whole.dim = &axis;
        int rc = allocate(user_context, place.backend, &whole);
        if (rc) {  // perhaps there is room without what nobody uses
            drop(user_context, true);
            ((Workspace *)user_context)->error.clear();
            rc = allocate(user_context, place.backend, &whole);
        }
        if (rc) return rc;
        pieces.push_back({whole.device, wanted, false, false});
        best = &pieces.back(), grown = true;
    }
    best->used = best->of_this_call = true;
    buffer->device = best->device, buffer->device_interface = device_interface(place.backend);
    return 0;
}

void DeviceMemory::take_back(void *user_context, halide_buffer_t *buffer) {
    if (!keeps()) {
        deallocate(user_context, place.backend, buffer);
        return;
    }
    for (Piece &piece : pieces)
        if (piece.device == buffer->device) piece.used = false;
}

static DeviceCall *call_of(void *user_context) { return user_context ? ((Workspace *)user_context)->device : nullptr; }

}  // namespace holdfast

using namespace holdfast;

// These stand in for the weak ones of Halide's runtime.
extern "C" {

int halide_device_malloc(void *user_context, halide_buffer_t *buffer, const halide_device_interface_t *interface) {
    DeviceCall *call = call_of(user_context);
    if (!call || interface != device_interface(call->place.backend)) return halide_error_code_incompatible_device_interface;
    if (buffer->device) return 0;
    try {
        if (!call->arena) return call->memory->lend(user_context, buffer);
        buffer->device = call->arena->allocate(buffer->size_in_bytes());
    } catch (const std::bad_alloc &) {
        buffer->device = 0;
    }
    if (!buffer->device) return halide_error_code_out_of_memory;
    buffer->device_interface = interface;
    return 0;
}

int halide_device_free(void *user_context, halide_buffer_t *buffer) {
    if (!buffer->device_interface) return 0;
    DeviceCall *call = call_of(user_context);
    if (!call) return halide_error_code_incompatible_device_interface;
    if (call->arena)
        call->arena->free(buffer->device);
    else
        call->memory->take_back(user_context, buffer);
    buffer->device = 0, buffer->device_interface = nullptr;
    buffer->set_device_dirty(false);
    return 0;
}

}  // extern "C"
