/* The public header in C99 and, as header.cpp, in C++: included twice, every
 * function referred to, no warning (CMakeLists.txt). */
#include <holdfast/holdfast.h>

#include <stdio.h>
#include <string.h>

typedef void (*function)(void);

int main(void) {
  static const function functions[] = {
      (function)holdfast_version,
      (function)holdfast_status_name,
      (function)holdfast_context_create,
      (function)holdfast_context_destroy,
      (function)holdfast_last_error,
      (function)holdfast_context_set_target,
      (function)holdfast_context_set_threads,
      (function)holdfast_context_set_thread_pool,
      (function)holdfast_context_set_allocator,
      (function)holdfast_context_set_verbose,
      (function)holdfast_variant_count,
      (function)holdfast_variant_at,
      (function)holdfast_cpu_features,
      (function)holdfast_forward,
      (function)holdfast_step,
      (function)holdfast_rotate,
      (function)holdfast_rotate_backward,
      (function)holdfast_head_norm_gate,
      (function)holdfast_head_norm_gate_backward,
  };
  size_t n;
  static holdfast_forward_args args;
  static holdfast_step_args step_args;
  args.struct_size = sizeof args;
  if (holdfast_forward(NULL, &args) != HOLDFAST_INVALID_ARGUMENT)
    return 1;
  if (strcmp(holdfast_last_error(NULL),
             "q is NULL; expected a tensor [B, T, H, K]") != 0)
    return 2;
  step_args.struct_size = sizeof step_args;
  if (holdfast_step(NULL, &step_args) != HOLDFAST_INVALID_ARGUMENT)
    return 4;
  for (n = 0; n < sizeof functions / sizeof *functions; n++)
    if (!functions[n])
      return 3;
  printf("holdfast %s, header compiled as %s\n", holdfast_version(),
#ifdef __cplusplus
         "C++"
#else
         "C"
#endif
  );
  return 0;
}
