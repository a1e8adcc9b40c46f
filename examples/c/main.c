/* Retention of two sequences and three heads from C: fill in tensors, call,
 * compare with the formula, print what ran. */
#include <holdfast/holdfast.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { B = 2, T = 100, H = 3, K = 16, V = 8 };

static float q[B][T][H][K], k[B][T][H][K], v[B][T][H][V], out[B][T][H][V],
    log_decay[H], state[B][H][K][V];

/* A tensor over one of the arrays: compact, fp32, on the CPU. */
static DLTensor tensor(void *data, int rank, int64_t *shape) {
  DLTensor t;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.device.device_type = kDLCPU;
  t.ndim = rank;
  t.dtype.code = kDLFloat;
  t.dtype.bits = 32;
  t.dtype.lanes = 1;
  t.shape = shape;
  return t;
}

static void fill(float *x, size_t count) {
  for (size_t n = 0; n < count; n++)
    x[n] = 2.0f * (float)rand() / (float)RAND_MAX - 1.0f;
}

static void print(void *user, const char *message) {
  (void)user;
  printf("%s\n", message);
}

/* Largest difference between out and S_t = exp(log_decay) S_{t-1} + k_t^T v_t,
 * out_t = K^-1/2 q_t S_t, token by token. */
static double largest_difference(void) {
  double largest = 0;
  for (int b = 0; b < B; b++)
    for (int h = 0; h < H; h++) {
      double S[K][V] = {{0}};
      for (int t = 0; t < T; t++)
        for (int e = 0; e < V; e++) {
          double sum = 0;
          for (int d = 0; d < K; d++) {
            S[d][e] = exp(log_decay[h]) * S[d][e] +
                      (double)k[b][t][h][d] * v[b][t][h][e];
            sum += q[b][t][h][d] * S[d][e] / sqrt(K);
          }
          largest = fmax(largest, fabs(sum - out[b][t][h][e]));
        }
    }
  return largest;
}

int main(void) {
  fill(&q[0][0][0][0], sizeof q / sizeof(float));
  fill(&k[0][0][0][0], sizeof k / sizeof(float));
  fill(&v[0][0][0][0], sizeof v / sizeof(float));
  for (int h = 0; h < H; h++)
    log_decay[h] = logf(1 - exp2f(-5.0f - (float)h));

  int64_t keys[] = {B, T, H, K}, values[] = {B, T, H, V}, heads[] = {H},
          states[] = {B, H, K, V};
  DLTensor tq = tensor(q, 4, keys), tk = tensor(k, 4, keys),
           tv = tensor(v, 4, values), tg = tensor(log_decay, 1, heads);
  DLTensor tout = tensor(out, 4, values), tstate = tensor(state, 4, states);

  holdfast_forward_args args = {.struct_size = sizeof args};
  args.q = &tq;
  args.k = &tk;
  args.v = &tv;
  args.log_decay = &tg;
  args.out = &tout;
  args.final_state = &tstate;

  holdfast_context *context = holdfast_context_create();
  if (!context)
    return EXIT_FAILURE;
  holdfast_context_set_verbose(context, print, NULL);
  const holdfast_status status = holdfast_forward(context, &args);
  if (status != HOLDFAST_OK)
    fprintf(stderr, "%s: %s\n", holdfast_status_name(status),
            holdfast_last_error(context));
  holdfast_context_destroy(context);
  if (status != HOLDFAST_OK)
    return EXIT_FAILURE;

  const double difference = largest_difference();
  printf("holdfast %s on a CPU with %s: largest difference %.1e\n",
         holdfast_version(), holdfast_cpu_features(), difference);
  return difference < 1e-4 ? EXIT_SUCCESS : EXIT_FAILURE;
}
