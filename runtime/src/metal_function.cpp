// Halide 21 (and its main branch of August 2026) makes a function object at each launch on Metal, for the pipeline state, and
// never releases it. Here it is released as soon as the pipeline state has it. This takes the place of the Halide runtime's
// own definition, which is weak; nothing else there looks at the function.
#if HOLDFAST_HAS_METAL
#include <HalideRuntimeMetal.h>

extern "C" {
void objc_msgSend();  // of any type
void *sel_getUid(const char *name);
}

namespace Halide {
namespace Runtime {
namespace Internal {
namespace Metal {

struct mtl_compute_pipeline_state;
struct mtl_function;

mtl_compute_pipeline_state *new_compute_pipeline_state_with_function(halide_metal_device *device, mtl_function *function) {
    using Make = mtl_compute_pipeline_state *(*)(void *device, void *selector, void *function, void **error);
    using Release = void (*)(void *object, void *selector);
    void *error = nullptr;  // kept by its autorelease pool; Halide's caller reports that there is no pipeline state
    auto *state = ((Make)&objc_msgSend)(device, sel_getUid("newComputePipelineStateWithFunction:error:"), function, &error);
    ((Release)&objc_msgSend)(function, sel_getUid("release"));
    return state;
}

}  // namespace Metal
}  // namespace Internal
}  // namespace Runtime
}  // namespace Halide
#endif
