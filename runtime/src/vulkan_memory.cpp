// Halide 21 cuts its Vulkan buffers out of blocks of 32 MB, and does it wrong: sizes are rounded up to 32 bytes where drivers may
// want up to 256, so that neighbours overlap, and a region that is used again may get a buffer of its former size. The
// results are wrong numbers and writes outside of the block. Each buffer gets a block of its own here, as large as any driver
// wants it. This definition takes the place of Halide's weak one; docs/testing-without-hardware.md has the evidence.
#include <cstddef>

namespace Halide::Runtime::Internal::Vulkan {

struct VulkanMemoryConfig {  // of Halide 21; 0: no limit
    size_t maximum_pool_size, minimum_block_size, maximum_block_size, maximum_block_count, nearest_multiple;
};
extern VulkanMemoryConfig memory_allocator_config;
VulkanMemoryConfig memory_allocator_config = {0, 0, 0, 0, 256};

}  // namespace Halide::Runtime::Internal::Vulkan
