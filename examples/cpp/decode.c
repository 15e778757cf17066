/* One new token of two requests over a paged KV cache, from C. */
#include <blasst/blasst.h>
#include <stdio.h>
#include <stdlib.h>

enum { kBatch = 2, kHeads = 8, kKvHeads = 2, kDim = 64, kPages = 6, kPageSize = 16 };

static float random_number(void) { return (float)rand() / (float)RAND_MAX - 0.5f; }

/* [outer, tokens, heads, element], all contiguous. */
static blasst_view view(float* data, int64_t outer, int64_t tokens, int64_t heads) {
  blasst_view v = {0};
  v.data = data;
  v.elements = outer * tokens * heads * kDim;
  v.stride_request = tokens * heads * kDim;
  v.stride_token = heads * kDim;
  v.stride_head = kDim;
  return v;
}

int main(void) {
  static float q[kBatch * kHeads * kDim], out[kBatch * kHeads * kDim];
  static float k[kPages * kPageSize * kKvHeads * kDim], v[kPages * kPageSize * kKvHeads * kDim];
  for (size_t i = 0; i < sizeof q / sizeof *q; ++i) q[i] = random_number();
  for (size_t i = 0; i < sizeof k / sizeof *k; ++i) k[i] = random_number(), v[i] = random_number();
  const int32_t page_table[kBatch][3] = {{4, 1, 0}, {2, 5, 3}};
  const int32_t lengths[kBatch] = {33, 48};
  const float threshold = 0.01f;

  blasst_attention_params p;
  blasst_attention_params_init(&p);
  p.problem.batch = kBatch;
  p.problem.heads = kHeads;
  p.problem.kv_heads = kKvHeads;
  p.problem.head_dim = p.problem.value_dim = kDim;
  p.problem.query_length = 1;
  p.problem.q = view(q, kBatch, 1, kHeads);
  p.problem.out = view(out, kBatch, 1, kHeads);
  p.problem.kv.layout = BLASST_LAYOUT_PAGED;
  p.problem.kv.k = view(k, kPages, kPageSize, kKvHeads);
  p.problem.kv.v = view(v, kPages, kPageSize, kKvHeads);
  p.problem.kv.pages = kPages;
  p.problem.kv.page_size = kPageSize;
  p.problem.kv.page_table = page_table[0];
  p.problem.kv.page_table_stride = 3;
  p.problem.kv.lengths = lengths;
  p.decision.test.kind = BLASST_TEST_RELATIVE;
  p.decision.test.values = &threshold;
  if (blasst_decode(&p) != BLASST_OK) {
    fprintf(stderr, "%s\n", blasst_last_error());
    return 1;
  }
  printf("out[0] of the requests: %g, %g\n", out[0], out[kHeads * kDim]);
  return 0;
}
