/* LLVM's thread sanitizer, which instruments the kernels, calls these; GCC's
 * library has them from version 13 on only. The plain functions are
 * intercepted, so nothing is lost. */
#include <string.h>

void *__tsan_memcpy(void *to, const void *from, size_t bytes) {
  return memcpy(to, from, bytes);
}
void *__tsan_memmove(void *to, const void *from, size_t bytes) {
  return memmove(to, from, bytes);
}
void *__tsan_memset(void *to, int value, size_t bytes) {
  return memset(to, value, bytes);
}
