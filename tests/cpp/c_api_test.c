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
  blasst_view result = {data, tokens * heads * kDim, tokens * heads * kDim, heads * kDim, kDim};
  return result;
}

/* Equal keys: the output is the mean of V, 0.5 * (kKeys - 1). */
static void expect_mean(const char* what) {
  for (int i = 0; i < kHeads * kDim; ++i) check(fabsf(out[i] - 0.5f * (kKeys - 1)) < 1e-4f, what);
}

static void test_prefill(void) {
  blasst_prefill_params p;
  memset(&p, 0xff, sizeof p);
  blasst_prefill_params_init(&p);
  check(p.batch == 1 && p.order == BLASST_SINK_FIRST && p.mask.window_left == -1 && !p.q.data,
        "defaults");

  p.heads = kHeads;
  p.kv_heads = 1;
  p.head_dim = p.value_dim = kDim;
  p.query_length = 1;
  p.q = view(q, 1, kHeads);
  p.out = view(out, 1, kHeads);
  p.kv.k = view(k, kKeys, 1);
  p.kv.v = view(v, kKeys, 1);
  p.kv.key_length = kKeys;
  float lse[kHeads];
  p.report.lse = lse;
  check(blasst_prefill(&p) == BLASST_OK, "prefill");
  check(blasst_last_error()[0] == '\0', "no message after a call that worked");
  expect_mean("prefill of equal keys");
  check(fabsf(lse[1] - logf(kKeys)) < 1e-5f, "lse of equal keys");

  blasst_tile_shape shape;
  size_t bytes = 0;
  check(blasst_prefill_tile_shape(&p, &shape) == BLASST_OK && shape.keys > 0, "tile shape");
  check(blasst_prefill_workspace_bytes(&p, &bytes) == BLASST_OK && bytes > 0, "workspace bytes");

  const float threshold = 2;
  p.test.kind = BLASST_TEST_RELATIVE;
  p.test.values = &threshold;
  check(blasst_prefill(&p) == BLASST_INVALID_ARGUMENT, "threshold 2");
  check(strstr(blasst_last_error(), "is 2; it must be") != NULL, "message of threshold 2");
  check(blasst_prefill_workspace_bytes(&p, &bytes) == BLASST_INVALID_ARGUMENT,
        "size of a bad call");
  check(blasst_prefill(NULL) == BLASST_INVALID_ARGUMENT, "null parameters");
  check(blasst_prefill_tile_shape(&p, NULL) == BLASST_INVALID_ARGUMENT, "null result");
  p.backend = BLASST_BACKEND_CUDA_SM90;
  check(blasst_prefill(&p) != BLASST_OK, "a backend that is not there");
}

static void test_decode(void) {
  blasst_decode_params p;
  blasst_decode_params_init(&p);
  check(p.query_length == 1, "decode defaults");
  p.heads = kHeads;
  p.kv_heads = 1;
  p.head_dim = p.value_dim = kDim;
  p.q = view(q, 1, kHeads);
  p.out = view(out, 1, kHeads);
  p.kv.k = view(k, kKeys, 1);
  p.kv.v = view(v, kKeys, 1);
  p.kv.key_length = kKeys;
  memset(out, 0, sizeof out);
  check(blasst_decode(&p) == BLASST_OK, "decode");
  expect_mean("decode of equal keys");

  blasst_tile_shape shape;
  size_t bytes = 0;
  check(blasst_decode_tile_shape(&p, &shape) == BLASST_OK && shape.query_rows == kHeads,
        "tile shape");
  check(blasst_decode_workspace_bytes(&p, &bytes) == BLASST_OK, "workspace bytes");
  check(blasst_decode(NULL) == BLASST_INVALID_ARGUMENT, "null parameters");
}

static void test_backward(void) {
  blasst_prefill_params f;
  blasst_prefill_params_init(&f);
  f.heads = kHeads;
  f.kv_heads = 1;
  f.head_dim = f.value_dim = kDim;
  f.query_length = 1;
  f.q = view(q, 1, kHeads);
  f.out = view(out, 1, kHeads);
  f.kv.k = view(k, kKeys, 1);
  f.kv.v = view(v, kKeys, 1);
  f.kv.key_length = kKeys;
  float lse[kHeads];
  f.report.lse = lse;
  check(blasst_prefill(&f) == BLASST_OK, "prefill for backward");

  static float dout[kHeads * kDim], dq[kHeads * kDim], dk[kKeys * kDim], dv[kKeys * kDim];
  for (int i = 0; i < kHeads * kDim; ++i) dout[i] = 1;
  blasst_backward_params p;
  memset(&p, 0xff, sizeof p);
  blasst_backward_params_init(&p);
  check(p.batch == 1 && p.mask.window_left == -1 && !p.tile_bits, "backward defaults");
  p.heads = kHeads;
  p.kv_heads = 1;
  p.head_dim = p.value_dim = kDim;
  p.query_length = 1;
  p.q = f.q;
  p.kv = f.kv;
  p.out = f.out;
  p.dout = view(dout, 1, kHeads);
  p.lse = lse;
  p.dq = view(dq, 1, kHeads);
  p.dk = view(dk, kKeys, 1);
  p.dv = view(dv, kKeys, 1);
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

  size_t bytes = 0;
  check(blasst_backward_workspace_bytes(&p, &bytes) == BLASST_OK && bytes > 0, "workspace bytes");
  p.lse = NULL;
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
  check(blasst_check_pages(NULL, 1, found, NULL) == BLASST_INVALID_ARGUMENT, "null kv");
}

int main(void) {
  for (int i = 0; i < kHeads * kDim; ++i) q[i] = 1;
  for (int i = 0; i < kKeys * kDim; ++i) v[i] = (float)(i / kDim);
  test_prefill();
  test_decode();
  test_backward();
  test_merge();
  int major, minor, patch;
  check(sscanf(blasst_version(), "%d.%d.%d", &major, &minor, &patch) == 3, "version");
  return failures != 0;
}
