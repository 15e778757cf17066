/* The C interface from C11: defaults, a call whose result is known, errors as status and message.
 */
#include <blasst/blasst.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { kKeys = 100, kHeads = 2, kDim = 16 };

static int failures = 0;

static void check(int holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "FAILED: %s (last error: \"%s\")\n", what, blasst_last_error());
  ++failures;
}

static float q[kHeads * kDim], k[kKeys * kDim], v[kKeys * kDim], out[kHeads * kDim];

static blasst_view view(float* data, int64_t tokens, int64_t heads) {
  blasst_view result = {.data = data,
                        .dtype = BLASST_FLOAT32,
                        .elements = tokens * heads * kDim,
                        .stride_request = tokens * heads * kDim,
                        .stride_token = heads * kDim,
                        .stride_head = kDim};
  return result;
}

/* Equal keys: the output is the mean of V, 0.5 * (kKeys - 1). */
static void expect_mean(const char* what) {
  for (int i = 0; i < kHeads * kDim; ++i) check(fabsf(out[i] - 0.5f * (kKeys - 1)) < 1e-4f, what);
}

static void test_prefill(void) {
  blasst_attention_params p;
  memset(&p, 0xff, sizeof p);
  blasst_attention_params_init(&p);
  check(p.problem.batch == 1 && p.decision.order == BLASST_SINK_FIRST &&
            p.problem.mask.window_left == -1 && !p.problem.q.data,
        "defaults");

  p.problem.heads = kHeads;
  p.problem.kv_heads = 1;
  p.problem.head_dim = p.problem.value_dim = kDim;
  p.problem.query_length = 1;
  p.problem.q = view(q, 1, kHeads);
  p.problem.out = view(out, 1, kHeads);
  p.problem.kv.k = view(k, kKeys, 1);
  p.problem.kv.v = view(v, kKeys, 1);
  p.problem.kv.key_length = kKeys;
  float lse[kHeads];
  p.report.lse = lse;
  check(blasst_prefill(&p) == BLASST_OK, "prefill");
  check(blasst_last_error()[0] == '\0', "no message after a call that worked");
  expect_mean("prefill of equal keys");
  check(fabsf(lse[1] - logf(kKeys)) < 1e-5f, "lse of equal keys");

  blasst_plan plan;
  blasst_plan_init(&plan);
  check(blasst_prefill_plan(&p, &plan) == BLASST_OK && plan.workspace_bytes > 0, "prefill plan");
  check(plan.backend == BLASST_BACKEND_CPU && plan.tile_heads == kHeads && plan.query_tiles == 1 &&
            plan.key_tiles == (kKeys + plan.shape.keys - 1) / plan.shape.keys &&
            plan.tile_words == 1,
        "counts of the prefill plan");

  const float threshold = 2;
  p.decision.test.kind = BLASST_TEST_RELATIVE;
  p.decision.test.values = &threshold;
  check(blasst_prefill(&p) == BLASST_INVALID_ARGUMENT, "threshold 2");
  check(strstr(blasst_last_error(), "is 2; it must be") != NULL, "message of threshold 2");
  check(blasst_prefill(NULL) == BLASST_INVALID_ARGUMENT, "null parameters");
  check(blasst_prefill_plan(&p, NULL) == BLASST_INVALID_ARGUMENT, "null result");
  p.execution.backend = BLASST_BACKEND_CUDA;
  check(blasst_prefill(&p) != BLASST_OK, "a backend that is not there");
}

static void test_decode(void) {
  blasst_attention_params p;
  blasst_attention_params_init(&p);
  p.problem.query_length = 1;
  p.problem.heads = kHeads;
  p.problem.kv_heads = 1;
  p.problem.head_dim = p.problem.value_dim = kDim;
  p.problem.q = view(q, 1, kHeads);
  p.problem.out = view(out, 1, kHeads);
  p.problem.kv.k = view(k, kKeys, 1);
  p.problem.kv.v = view(v, kKeys, 1);
  p.problem.kv.key_length = kKeys;
  memset(out, 0, sizeof out);
  check(blasst_decode(&p) == BLASST_OK, "decode");
  expect_mean("decode of equal keys");

  blasst_plan plan;
  blasst_plan_init(&plan);
  check(blasst_decode_plan(&p, &plan) == BLASST_OK && plan.shape.query_rows == kHeads &&
            plan.tile_heads == 1 && plan.query_tiles == 1,
        "decode plan");
  check(blasst_decode(NULL) == BLASST_INVALID_ARGUMENT, "null parameters");
}

static void test_backward(void) {
  blasst_attention_params f;
  blasst_attention_params_init(&f);
  f.problem.heads = kHeads;
  f.problem.kv_heads = 1;
  f.problem.head_dim = f.problem.value_dim = kDim;
  f.problem.query_length = 1;
  f.problem.q = view(q, 1, kHeads);
  f.problem.out = view(out, 1, kHeads);
  f.problem.kv.k = view(k, kKeys, 1);
  f.problem.kv.v = view(v, kKeys, 1);
  f.problem.kv.key_length = kKeys;
  float lse[kHeads];
  f.report.lse = lse;
  check(blasst_prefill(&f) == BLASST_OK, "prefill for backward");

  static float dout[kHeads * kDim], dq[kHeads * kDim], dk[kKeys * kDim], dv[kKeys * kDim];
  for (int i = 0; i < kHeads * kDim; ++i) dout[i] = 1;
  blasst_backward_params p;
  memset(&p, 0xff, sizeof p);
  blasst_backward_params_init(&p);
  check(p.problem.batch == 1 && p.problem.mask.window_left == -1 && !p.gradients.tile_bits,
        "backward defaults");
  p.problem.heads = kHeads;
  p.problem.kv_heads = 1;
  p.problem.head_dim = p.problem.value_dim = kDim;
  p.problem.query_length = 1;
  p.problem.q = f.problem.q;
  p.problem.kv = f.problem.kv;
  p.problem.out = f.problem.out;
  p.gradients.dout = view(dout, 1, kHeads);
  p.gradients.lse = lse;
  p.gradients.dq = view(dq, 1, kHeads);
  p.gradients.dk = view(dk, kKeys, 1);
  p.gradients.dv = view(dv, kKeys, 1);
  check(blasst_backward(&p) == BLASST_OK, "backward");
  /* Equal keys are equally likely in both heads. */
  for (int i = 0; i < kKeys * kDim; ++i)
    check(fabsf(dv[i] - 2.0f / kKeys) < 1e-6f, "dv of equal keys");
  /* They are zeros, so no query moves the scores; a key's score is worth its value's excess. */
  for (int i = 0; i < kHeads * kDim; ++i) check(dq[i] == 0, "dq of zero keys");
  const float excess = 0.5f * (kKeys - 1) * kDim;
  for (int d = 0; d < kDim; ++d)
    check(fabsf(dk[(kKeys - 1) * kDim + d] - 2 * excess / kKeys / sqrtf(kDim)) < 1e-3f,
          "dk of equal keys");

  blasst_plan plan;
  blasst_plan_init(&plan);
  check(blasst_backward_plan(&p, &plan) == BLASST_OK && plan.workspace_bytes > 0, "backward plan");
  p.gradients.lse = NULL;
  check(blasst_backward(&p) == BLASST_INVALID_ARGUMENT, "null lse");
  check(strstr(blasst_last_error(), "lse is null") != NULL, "message of null lse");
  check(blasst_backward(NULL) == BLASST_INVALID_ARGUMENT, "null parameters");
}

static void test_merge(void) {
  const float lse_a[kHeads] = {0, -INFINITY}, lse_b[kHeads] = {0, 3};
  float a[kHeads * kDim], b[kHeads * kDim], merged[kHeads * kDim], lse[kHeads];
  for (int i = 0; i < kHeads * kDim; ++i) a[i] = 1, b[i] = 3;
  blasst_merge_params p;
  blasst_merge_params_init(&p);
  p.query_length = 1;
  p.heads = kHeads;
  p.value_dim = kDim;
  p.out_a = view(a, 1, kHeads);
  p.out_b = view(b, 1, kHeads);
  p.out = view(merged, 1, kHeads);
  p.lse_a = lse_a;
  p.lse_b = lse_b;
  p.lse = lse;
  check(blasst_merge(&p) == BLASST_OK, "merge");
  check(merged[0] == 2 && merged[kDim] == 3, "merged output");
  check(fabsf(lse[0] - logf(2)) < 1e-6f && lse[1] == 3, "merged lse");
  p.lse_b = NULL;
  check(blasst_merge(&p) == BLASST_INVALID_ARGUMENT, "null lse_b");
  check(strstr(blasst_last_error(), "lse_b is null") != NULL, "message of null lse_b");
  int32_t found[4];
  check(blasst_check_pages(NULL, found, NULL) != BLASST_OK, "null problem");
}

/* A struct whose size the library does not know: of another header, or not initialized. */
static void test_struct_sizes(void) {
  blasst_attention_params p;
  memset(&p, 0, sizeof p);
  check(blasst_prefill(&p) == BLASST_INVALID_ARGUMENT, "parameters of zeros");
  check(strstr(blasst_last_error(), "struct_size of params is 0; this library") != NULL,
        "message of parameters of zeros");
  size_t* const parts[] = {&p.struct_size, &p.problem.struct_size, &p.decision.struct_size,
                           &p.report.struct_size, &p.execution.struct_size};
  for (int i = 0; i < 5; ++i) {
    blasst_attention_params_init(&p);
    *parts[i] += 8;
    check(blasst_decode(&p) == BLASST_INVALID_ARGUMENT, "a larger struct");
    check(strstr(blasst_last_error(), "struct_size of ") != NULL, "message of a larger struct");
  }
  blasst_attention_params_init(&p);
  blasst_plan plan;
  blasst_plan_init(&plan);
  plan.struct_size = 0;
  check(blasst_prefill_plan(&p, &plan) == BLASST_INVALID_ARGUMENT, "a plan of no size");
}

/* At least the CPU, which is the last to be asked. */
static void test_backends(void) {
  const int32_t count = blasst_backend_count();
  blasst_backend_info info;
  blasst_backend_info_init(&info);
  check(count > 0 && blasst_backend_at(count - 1, &info) == BLASST_OK, "the last backend");
  check(info.backend == BLASST_BACKEND_CPU && info.usable && strcmp(info.name, "cpu") == 0, "cpu");
  const char* isa = NULL;
  const char* isas = NULL;
  check(blasst_cpu_isa(&isa) == BLASST_OK && blasst_cpu_isas(&isas) == BLASST_OK, "isas");
  check(strcmp(info.architecture, isa) == 0 && strstr(isas, isa) != NULL, "the isa in use");
  check(blasst_set_cpu_isa("z80") == BLASST_INVALID_ARGUMENT, "an isa that is not there");
  check(blasst_default_threads() > 0, "threads");
  check(blasst_backend_at(count, &info) == BLASST_INVALID_ARGUMENT, "one backend too many");
}

int main(void) {
  for (int i = 0; i < kHeads * kDim; ++i) q[i] = 1;
  for (int i = 0; i < kKeys * kDim; ++i) v[i] = (float)(i / kDim);
  test_prefill();
  test_decode();
  test_backward();
  test_merge();
  test_struct_sizes();
  test_backends();
  int major, minor, patch;
  check(sscanf(blasst_version(), "%d.%d.%d", &major, &minor, &patch) == 3, "version");
  return failures != 0;
}
