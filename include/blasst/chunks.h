/* Chunks of keys, and the choice of those a query tile reads: dynamic hierarchical sparse attention
 * (arXiv 2510.24606). The keys of a request are cut into chunks of varying length; a chunk is known
 * by its mean key, a query tile by its mean query, and each query tile reads the chunks that are
 * most like it until its budget is spent. The result is a block mask (blasst_mask.blocks), so keys
 * that are not chosen are not read. On the CPU.
 */
#ifndef BLASST_CHUNKS_H_
#define BLASST_CHUNKS_H_

#include "blasst/blasst.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Rows [rows, heads, head_dim] of one request; the last dimension is contiguous. */
typedef struct blasst_head_rows {
  size_t struct_size BLASST_DEFAULT(sizeof(blasst_head_rows));
  blasst_dtype dtype BLASST_DEFAULT(BLASST_FLOAT32);
  const void* data BLASST_DEFAULT(nullptr);
  int64_t elements BLASST_DEFAULT(0); /* from data to the end of its buffer; the rows must fit */
  int64_t rows BLASST_DEFAULT(0);
  int64_t heads BLASST_DEFAULT(0);
  int64_t head_dim BLASST_DEFAULT(0); /* 16 to 256, a multiple of 8 */
  int64_t stride_row BLASST_DEFAULT(0);
  int64_t stride_head BLASST_DEFAULT(0);
} blasst_head_rows;

/* Says from the keys before and after a position whether a chunk begins there. With y = projection
 * k: l = sum of left[i] y[t - window + i], r = sum of right[i] y[t + i], and the score is
 * weight2 . relu(weight1 [l, r, l - r, l r, cos(l, r)] + bias1) + bias2. */
typedef struct blasst_boundary_predictor {
  size_t struct_size BLASST_DEFAULT(sizeof(blasst_boundary_predictor));
  int64_t inputs BLASST_DEFAULT(0);   /* kv_heads * head_dim of the keys it was trained on */
  int64_t window BLASST_DEFAULT(0);   /* keys on each side, 1 to 64 */
  int64_t features BLASST_DEFAULT(0); /* a multiple of 32, up to 256 */
  int64_t hidden BLASST_DEFAULT(0);   /* a multiple of 32, up to 1024 */
  const float* projection BLASST_DEFAULT(nullptr); /* [inputs, features] */
  const float* left BLASST_DEFAULT(nullptr);       /* [window] */
  const float* right BLASST_DEFAULT(nullptr);      /* [window] */
  const float* weight1 BLASST_DEFAULT(nullptr);    /* [4 * features + 1, hidden] */
  const float* bias1 BLASST_DEFAULT(nullptr);      /* [hidden] */
  const float* weight2 BLASST_DEFAULT(nullptr);    /* [hidden] */
  float bias2 BLASST_DEFAULT(0);
} blasst_boundary_predictor;

typedef BLASST_ENUM(blasst_chunker){
    BLASST_CHUNKS_FIXED = 0,   /* every `most` keys */
    BLASST_CHUNKS_SHIFT = 1,   /* where a key is unlike the one before: cosine, mean of the KV
                                  heads, < threshold */
    BLASST_CHUNKS_TRAINED = 2, /* where the predictor's score is > threshold */
} blasst_chunker;

/* Where a chunk begins: where the chunker says so, if the chunk before has `least` keys by then; at
 * the latest when it has `most`. */
typedef struct blasst_chunk_rule {
  size_t struct_size BLASST_DEFAULT(sizeof(blasst_chunk_rule));
  blasst_chunker chunker BLASST_DEFAULT(BLASST_CHUNKS_FIXED);
  int64_t least BLASST_DEFAULT(1);
  int64_t most BLASST_DEFAULT(64);
  float threshold BLASST_DEFAULT(0);
  const blasst_boundary_predictor* predictor BLASST_DEFAULT(nullptr); /* BLASST_CHUNKS_TRAINED */
} blasst_chunk_rule;

/* The chunks of a request's keys: consecutive, covering all of them. */
typedef struct blasst_chunks {
  size_t struct_size BLASST_DEFAULT(sizeof(blasst_chunks));
  int64_t keys BLASST_DEFAULT(0);
  int64_t count BLASST_DEFAULT(0);
  const int32_t* starts BLASST_DEFAULT(nullptr); /* [count] first key of each, from 0 */
  const float* sums BLASST_DEFAULT(nullptr); /* [count, kv_heads, head_dim] of each one's keys */
} blasst_chunks;

/* How many keys a query tile may read: `keys`, or the share of those that its last row sees. */
typedef struct blasst_chunk_budget {
  size_t struct_size BLASST_DEFAULT(sizeof(blasst_chunk_budget));
  int64_t keys BLASST_DEFAULT(0); /* 0: share */
  double share BLASST_DEFAULT(0); /* 0 to 1 */
} blasst_chunk_budget;

BLASST_API void blasst_head_rows_init(blasst_head_rows* rows);
BLASST_API void blasst_boundary_predictor_init(blasst_boundary_predictor* predictor);
BLASST_API void blasst_chunk_rule_init(blasst_chunk_rule* rule);
BLASST_API void blasst_chunks_init(blasst_chunks* chunks);
BLASST_API void blasst_chunk_budget_init(blasst_chunk_budget* budget);

/* Takes up the keys that are new: `keys` are all of the request's, those of `chunks` first. `next`:
 * the chunks that take the place of the last one of `chunks` (of none, if there are none yet); its
 * arrays are the caller's, to be given back with blasst_chunks_free. The result is the same whether
 * the keys came at once or one by one. A trained boundary is found `window` keys late.
 * threads, here and below: 0: all processors. Results do not depend on it. */
BLASST_API blasst_status blasst_chunks_next(const blasst_chunks* chunks,
                                            const blasst_chunk_rule* rule,
                                            const blasst_head_rows* keys, int32_t threads,
                                            blasst_chunks* next);

/* Frees the arrays that blasst_chunks_next made, and leaves no chunks. */
BLASST_API void blasst_chunks_free(blasst_chunks* chunks);

/* What the chunker compares with its threshold at positions [begin, end) of the keys, to
 * scores[end - begin]: BLASST_CHUNKS_SHIFT from 1 on, BLASST_CHUNKS_TRAINED from `window` to keys -
 * window, both included; NaN elsewhere. */
BLASST_API blasst_status blasst_chunks_scores(const blasst_chunk_rule* rule,
                                              const blasst_head_rows* keys, int64_t begin,
                                              int64_t end, int32_t threads, float* scores);

/* The block mask of a request, causal, its queries at the end of its keys: prefill [heads, query
 * tiles, key tiles], decode (decode = 1) [kv_heads, key tiles]; 1: visit.
 *
 * Key tile 0 and those of the tile's own rows are always chosen; then the chunk that its last row
 * stands in; then the others that lie before it, by (sum of queries / sqrt(rows)) . (sum of keys /
 * sqrt(length)), in decode the largest q . (sum of keys / sqrt(length)) of its rows, greatest
 * first. A chunk takes the key tiles it touches; it is passed over if they exceed the budget,
 * rounded up to whole tiles. */
BLASST_API blasst_status blasst_chunks_select(const blasst_chunks* chunks, int64_t kv_heads,
                                              const blasst_head_rows* queries, int32_t decode,
                                              const blasst_chunk_budget* budget, int32_t threads,
                                              uint8_t* blocks);

#ifdef __cplusplus
}
#endif

#endif /* BLASST_CHUNKS_H_ */
