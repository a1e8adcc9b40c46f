/* Stands in for NVIDIA's driver (libcuda) under Halide's own CUDA runtime:
 * device memory is a stretch of host memory, and a launch is handed to whoever
 * called standin_start (tests/cuda/device.py). What Halide does not call is
 * left out. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))
enum { success = 0, invalid_value = 1, out_of_memory = 2, not_found = 500 };
typedef int (*launch_function)(const char *kernel, const char *image,
                               const unsigned *grid, const unsigned *block,
                               unsigned shared_bytes, void **parameters);

static struct {
  uint8_t *bytes,
      *state; /* of a byte: 0 not allocated, 1 allocated, 2 written */
  size_t size, used;
  launch_function launch;
} device;

struct function {
  const char *image;
  char name[200];
};

API void standin_start(uint8_t *bytes, uint8_t *state, size_t size,
                       launch_function launch) {
  device.bytes = bytes, device.state = state, device.size = size,
  device.used = 0, device.launch = launch;
}

static size_t offset(uint64_t pointer) {
  return (size_t)(pointer - (uint64_t)(uintptr_t)device.bytes);
}

API int cuInit(unsigned flags) { return flags ? invalid_value : success; }
API int cuDeviceGetCount(int *count) { return *count = 1, success; }
API int cuDeviceGet(int *dev, int ordinal) {
  return *dev = ordinal, ordinal ? invalid_value : success;
}
API int cuDeviceGetName(char *name, int length, int dev) {
  return (void)dev, strncpy(name, "stand-in", length), success;
}
API int cuDeviceTotalMem_v2(size_t *bytes, int dev) {
  return (void)dev, *bytes = device.size, success;
}
API int cuDeviceGetAttribute(int *value, int attribute, int dev) {
  (void)dev;
  *value = attribute == 75 ? 9 : 0; /* compute capability 9.0 */
  return success;
}
API int cuCtxCreate_v2(void **context, unsigned flags, int dev) {
  return (void)flags, (void)dev, *context = &device, success;
}
API int cuCtxDestroy_v2(void *context) { return (void)context, success; }
API int cuCtxPushCurrent_v2(void *context) { return (void)context, success; }
API int cuCtxPopCurrent_v2(void **context) {
  return *context = &device, success;
}
API int cuCtxGetDevice(int *dev) { return *dev = 0, success; }
API int cuCtxGetApiVersion(void *context, unsigned *version) {
  return (void)context, *version = 12000, success;
}
API int cuCtxSynchronize(void) { return success; }
API int cuStreamSynchronize(void *stream) { return (void)stream, success; }
API int cuProfilerStop(void) { return success; }
API int cuPointerGetAttribute(void *result, int attribute, uint64_t pointer) {
  (void)attribute, (void)pointer;
  return *(void **)result = &device, success;
}

API int cuModuleLoadData(void **module, const void *image) {
  return *module = (void *)image, success;
}
API int cuModuleLoadDataEx(void **module, const void *image, unsigned n,
                           int *options, void **values) {
  return (void)n, (void)options, (void)values, *module = (void *)image, success;
}
API int cuModuleUnload(void *module) { return (void)module, success; }
API int cuModuleGetFunction(void **function, void *module, const char *name) {
  struct function *f = malloc(sizeof *f); /* as long as the process lives */
  if (!f || strlen(name) >= sizeof f->name)
    return free(f), not_found;
  f->image = module;
  strcpy(f->name, name);
  return *function = f, success;
}
API int cuFuncSetAttribute(void *function, int attribute, int value) {
  return (void)function,
         attribute == 8 && value <= 227 * 1024 ? success : invalid_value;
}

API int cuMemAlloc_v2(uint64_t *pointer, size_t bytes) {
  const size_t gap =
      512; /* left unallocated behind each, so that what runs over is seen */
  const size_t start = (device.used + 255) / 256 * 256;
  if (start + bytes + gap > device.size)
    return out_of_memory;
  memset(device.state + start, 1, bytes);
  device.used = start + bytes + gap;
  return *pointer = (uint64_t)(uintptr_t)(device.bytes + start), success;
}
API int cuMemFree_v2(uint64_t pointer) { return (void)pointer, success; }
API int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes) {
  memcpy((void *)(uintptr_t)to, from, bytes);
  memset(device.state + offset(to), 2, bytes);
  return success;
}
API int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes) {
  return memcpy(to, (void *)(uintptr_t)from, bytes), success;
}
API int cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) {
  memmove((void *)(uintptr_t)to, (void *)(uintptr_t)from, bytes);
  memmove(device.state + offset(to), device.state + offset(from), bytes);
  return success;
}
API int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes,
                             void *stream) {
  return (void)stream, cuMemcpyHtoD_v2(to, from, bytes);
}
API int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes,
                             void *stream) {
  return (void)stream, cuMemcpyDtoH_v2(to, from, bytes);
}
API int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes,
                             void *stream) {
  return (void)stream, cuMemcpyDtoD_v2(to, from, bytes);
}
API int cuMemcpy3D_v2(const void *copy) { return (void)copy, invalid_value; }

API int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz,
                       unsigned bx, unsigned by, unsigned bz,
                       unsigned shared_bytes, void *stream, void **parameters,
                       void **extra) {
  const struct function *f = function;
  const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  (void)stream, (void)extra;
  if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || bx * by * bz > 1024 ||
      shared_bytes > 227 * 1024)
    return invalid_value;
  return device.launch(f->name, f->image, grid, block, shared_bytes,
                       parameters);
}
