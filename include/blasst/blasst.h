/* blasst: attention made sparse by softmax thresholding (BLASST, arXiv 2512.12087).
 *
 * The C interface, and the parameter structs that the C++ interface (blasst.hpp) shares. Compiles
 * as C11 and as C++20. In C, start from the blasst_*_params_init of each struct; in C++ the members
 * carry the same defaults.
 *
 * Sizes and strides count elements, lengths count tokens. Index arrays are int32. Nothing is
 * written when a call fails.
 *
 * On the CPU a call computes in the default floating-point environment on all of its threads (round
 * to nearest, subnormals kept, no traps), whatever its caller's is, which comes back. `threads` of 0
 * are the processors that the process may use, its control groups' quota among the limits. Threads
 * are kept for the next call and end when they had nothing to do for some seconds; one that cannot
 * be started costs speed only. Calls from several threads take turns. A forked child may call, too.
 *
 * Pointers are to host memory, or, with BLASST_BACKEND_CUDA_SM90, all to memory of the current
 * device: tensors, index arrays, thresholds, sinks, bands, reports, workspace. A call then enqueues
 * its work on `stream`, allocates nothing and can be captured in a graph; each launch reads the
 * arrays anew. Values in device arrays are not checked: index arrays must be valid, and a threshold
 * that is none (NaN, below 0) skips nothing, one above 1 counts as 1. What that backend does not do
 * is BLASST_UNSUPPORTED, with a message.
 */
#ifndef BLASST_BLASST_H_
#define BLASST_BLASST_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define BLASST_API __declspec(dllexport)
#else
#define BLASST_API __attribute__((visibility("default")))
#endif

/* In C++ a member carries its default; C has blasst_*_params_init. */
#ifdef __cplusplus
#define BLASST_ENUM(name) enum name : int32_t
#define BLASST_DEFAULT(value) = value
extern "C" {
#else
#define BLASST_ENUM(name) enum name
#define BLASST_DEFAULT(value)
#endif

typedef BLASST_ENUM(blasst_status){
    BLASST_OK = 0,
    BLASST_INVALID_ARGUMENT = 1, /* the message says what was passed and what is accepted */
    BLASST_UNSUPPORTED = 2,      /* valid, but this build or backend does not do it */
    BLASST_OUT_OF_MEMORY = 3,
    BLASST_INTERNAL = 4,
} blasst_status;

typedef BLASST_ENUM(blasst_backend){
    BLASST_BACKEND_CPU = 0,
    BLASST_BACKEND_CUDA_SM90 = 1,
} blasst_backend;

/* On the cpu, processors' bfloat16 dot products (instruction set avx512_bf16) take subnormal
 * numbers, those below 1.2e-38, as 0. */
typedef BLASST_ENUM(blasst_dtype){
    BLASST_FLOAT32 = 0,
    BLASST_FLOAT16 = 1,
    BLASST_BFLOAT16 = 2,
} blasst_dtype;

/* In which order the key tiles of a query tile are visited. */
typedef BLASST_ENUM(blasst_order){
    BLASST_FORWARD = 0,    /* 0, 1, 2, ...: the paper's */
    BLASST_REVERSE = 1,    /* the last tile back to the first */
    BLASST_SINK_FIRST = 2, /* tile 0 if it is visible, then the last tile back */
} blasst_order;

/* When a visited key tile is dropped. "Row maximum" is over the valid keys of one row in the tile,
 * of the scores as softmax sees them (scaled, soft-capped). */
typedef BLASST_ENUM(blasst_test){
    BLASST_TEST_NONE = 0,         /* never: dense attention */
    BLASST_TEST_RELATIVE = 1,     /* row maximum - running maximum < ln(threshold) in every row */
    BLASST_TEST_SCALE_FACTOR = 2, /* relative, with threshold = min(1, value / key length) */
    BLASST_TEST_ABSOLUTE = 3,     /* row maximum < value in every row */
} blasst_test;

/* A [request, token, head, element] view; the last dimension is contiguous. */
typedef struct blasst_view {
  void* data BLASST_DEFAULT(nullptr); /* element [0, 0, 0, 0]; inputs are only read */
  int64_t elements BLASST_DEFAULT(0); /* from data to the end of its buffer; the view must fit */
  int64_t stride_request BLASST_DEFAULT(0); /* dense: request to request; paged: page to page;
                                               ragged: not used */
  int64_t stride_token BLASST_DEFAULT(0);
  int64_t stride_head BLASST_DEFAULT(0);
} blasst_view;

/* Keys and values, in one of three layouts, chosen by which pointers are set:
 *   dense   k [batch, key_length, kv_heads, head_dim]; lengths optional (a cache not yet full)
 *   ragged  k [total keys, kv_heads, head_dim], cu_seqlens
 *   paged   k [pages, page_size, kv_heads, head_dim], page_table and lengths
 * and the same for v with value_dim. */
typedef struct blasst_keys_values {
  blasst_view k;
  blasst_view v;
  /* Dense: tokens a request has room for. cuda, ragged or paged: no request has more keys; 0: what
   * fits in k or in the page table. */
  int64_t key_length BLASST_DEFAULT(0);
  const int32_t* lengths BLASST_DEFAULT(nullptr); /* [batch] end of the keys in use */
  /* cuda, dense: [batch] first key in use: padding on the left. Positions count from it. */
  const int32_t* starts BLASST_DEFAULT(nullptr);
  const int32_t* cu_seqlens
      BLASST_DEFAULT(nullptr); /* [batch + 1] first key of each request, from 0 */
  const int32_t* page_table BLASST_DEFAULT(nullptr); /* [batch, page_table_stride] page ids */
  int64_t page_table_stride BLASST_DEFAULT(0);       /* page ids from one request to the next */
  int64_t page_size BLASST_DEFAULT(0);               /* tokens a page, 1 to 256 */
  int64_t pages BLASST_DEFAULT(0);                   /* pages in k and v */
} blasst_keys_values;

/* Which keys a query may see. Query i of a request with Lq queries and Lk keys stands at position
 * p = i + Lk - Lq (bottom-right aligned) and sees key j if all that is set allows the distance p -
 * j. */
typedef struct blasst_mask {
  int32_t causal BLASST_DEFAULT(0);        /* 1: p - j >= 0 */
  int64_t window_left BLASST_DEFAULT(-1);  /* p - j <= window_left; -1: no limit */
  int64_t window_right BLASST_DEFAULT(-1); /* j - p <= window_right; -1: no limit */
  const int64_t* bands
      BLASST_DEFAULT(nullptr); /* [heads, 2] first and last distance p - j, inclusive */
  /* [heads, query tiles of all requests, key tiles] 1: visit, 0: leave out. Tile shape as
   * blasst_prefill_tile_shape says; decode: [kv_heads, batch, key tiles]. */
  const uint8_t* blocks BLASST_DEFAULT(nullptr);
  int64_t blocks_stride_head BLASST_DEFAULT(0);
  int64_t blocks_stride_query_tile
      BLASST_DEFAULT(0); /* at least the key tiles of the longest request */
} blasst_mask;

/* The tile test's thresholds: values[request * stride_request + head * stride_head + place *
 * stride_place]; a stride of 0 shares a value. Relative: 0 to 1. Scale factor: finite, >= 0.
 * Absolute: any but NaN.
 *
 * A query tile's place is where it stands in its request: the position (see blasst_mask) of its
 * first row divided by the rows of a query tile, in decode by the keys of a key tile; rounded down,
 * 0 to places - 1. */
typedef struct blasst_tile_test {
  blasst_test kind BLASST_DEFAULT(BLASST_TEST_NONE);
  const float* values BLASST_DEFAULT(nullptr);
  int64_t stride_request BLASST_DEFAULT(0);
  int64_t stride_head BLASST_DEFAULT(0);
  int64_t stride_place BLASST_DEFAULT(0);
  int64_t places BLASST_DEFAULT(1); /* query tiles beyond the last place have the last one's */
} blasst_tile_test;

/* Bins of a gap histogram. A tile's gap is the largest, over its rows, of row maximum - running
 * maximum (natural log). Bin 0: below -BLASST_GAP_RANGE; then equal widths up to 0; last bin: 0 and
 * above, the first tile of a row and NaN included. */
#define BLASST_GAP_BINS 514
#define BLASST_GAP_RANGE 32.0

/* What a call reports beside its output; null: not wanted. "Rows" is batch * query_length, or the
 * total of cu_seqlens_q. */
typedef struct blasst_report {
  /* [heads, rows] ln of the softmax denominator: the kept tiles' keys and the head's sink. A row
   * without a key whose score is above -inf has output 0 and the sink alone as its LSE, so that
   * blasst_merge keeps the sink; without sinks its LSE is -inf. A row not in use (query_lengths)
   * has LSE -inf, with sinks too. */
  float* lse BLASST_DEFAULT(nullptr);
  /* [heads, rows] upper bound on the probability that dense softmax gives to the keys of skipped
   * tiles, at most 1; the error of an output row is at most 2 * bound * max |v|. Exact up to
   * float32 rounding. */
  float* dropped_mass_bound BLASST_DEFAULT(nullptr);
  int64_t* tiles_visitable BLASST_DEFAULT(nullptr); /* [batch, heads] */
  int64_t* tiles_skipped BLASST_DEFAULT(nullptr);   /* [batch, heads] */
  /* One bit a tile, 1 = kept: [heads, query tiles of all requests, words], decode [kv_heads, batch,
   * words]; bit j % 32 of word j / 32 is key tile j; words = ceil(key tiles of the longest request
   * / 32); cuda: of key_length keys. */
  uint32_t* tile_bits BLASST_DEFAULT(nullptr);
  /* [heads, BLASST_GAP_BINS] visited tiles by gap. In decode the query heads of a KV head decide
   * together and share one gap. */
  uint64_t* gap_histogram BLASST_DEFAULT(nullptr);
  /* [heads, query tiles of all requests, tile_maxima_stride], decode [kv_heads, batch,
   * tile_maxima_stride]: the largest score of each visited tile, what the absolute test looks at;
   * -inf where no tile is visited or no row has a valid score; NaN where a score is NaN. */
  float* tile_maxima BLASST_DEFAULT(nullptr);
  int64_t tile_maxima_stride BLASST_DEFAULT(0); /* at least the key tiles of the longest request */
} blasst_report;

/* Prefill: many query rows a request. Dense q [batch, query_length, heads, head_dim], or ragged
 * q [rows, heads, head_dim] with cu_seqlens_q. */
typedef struct blasst_prefill_params {
  blasst_backend backend BLASST_DEFAULT(BLASST_BACKEND_CPU);
  blasst_dtype dtype BLASST_DEFAULT(BLASST_FLOAT32); /* of q, k, v and out */
  int64_t batch BLASST_DEFAULT(1);
  int64_t heads BLASST_DEFAULT(0); /* query heads, a multiple of kv_heads */
  int64_t kv_heads BLASST_DEFAULT(0);
  int64_t head_dim BLASST_DEFAULT(0);     /* 16 to 256, a multiple of 8 */
  int64_t value_dim BLASST_DEFAULT(0);    /* the same range */
  int64_t query_length BLASST_DEFAULT(0); /* dense q: rows a request; cuda, ragged q: the most */
  const int32_t* cu_seqlens_q
      BLASST_DEFAULT(nullptr); /* ragged q: [batch + 1] first row of each request */
  blasst_view q;
  blasst_view out; /* value_dim elements a head; must not share memory with the inputs */
  blasst_keys_values kv;
  float scale BLASST_DEFAULT(0);              /* score = scale * q.k; 0: 1 / sqrt(head_dim) */
  float softcap BLASST_DEFAULT(0);            /* c > 0: score = c * tanh(scale * q.k / c); 0: off */
  const float* sinks BLASST_DEFAULT(nullptr); /* [heads] logits that join the denominator */
  blasst_mask mask;
  blasst_order order BLASST_DEFAULT(BLASST_SINK_FIRST);
  blasst_tile_test test;
  blasst_report report;
  int32_t threads BLASST_DEFAULT(0);        /* cpu: 0: all processors */
  void* workspace BLASST_DEFAULT(nullptr);  /* cpu: null: the call allocates what it needs */
  size_t workspace_bytes BLASST_DEFAULT(0); /* at least blasst_prefill_workspace_bytes */
  int64_t rows BLASST_DEFAULT(0);           /* cuda, ragged q: the last of cu_seqlens_q */
  void* stream BLASST_DEFAULT(nullptr);     /* cuda: a cudaStream_t */
  /* cuda, dense q: [batch] rows in use of each request, from the first; null: all. With this or
   * kv.starts, rows not in use, and causal rows before every key, are padding: they get output 0,
   * and query tiles begin at the first row that is none. */
  const int32_t* query_lengths BLASST_DEFAULT(nullptr);
} blasst_prefill_params;

/* Decode: the last query_length (1 to 16) positions of each request, q [batch, query_length, heads,
 * head_dim]. The query heads of a KV head form one query tile and decide together. Long KV is cut
 * into splits of visited tiles (blasst_decode_tile_shape). A split's tiles are also tested against
 * the scores of the first BLASST_SEED_TILES tiles that the query tile visits, of those that lie
 * before the split: no split but the one that begins the visit starts blind, a row's first keys are
 * never skipped, and the result does not depend on the number of threads. */
#define BLASST_SEED_TILES 4
typedef struct blasst_decode_params {
  blasst_backend backend BLASST_DEFAULT(BLASST_BACKEND_CPU);
  blasst_dtype dtype BLASST_DEFAULT(BLASST_FLOAT32);
  int64_t batch BLASST_DEFAULT(1);
  int64_t heads BLASST_DEFAULT(0);
  int64_t kv_heads BLASST_DEFAULT(0);
  int64_t head_dim BLASST_DEFAULT(0);
  int64_t value_dim BLASST_DEFAULT(0);
  int64_t query_length BLASST_DEFAULT(1); /* 1 to 16 */
  blasst_view q;
  blasst_view out;
  blasst_keys_values kv;
  float scale BLASST_DEFAULT(0);
  float softcap BLASST_DEFAULT(0);
  const float* sinks BLASST_DEFAULT(nullptr);
  blasst_mask mask; /* causal: among the query positions */
  blasst_order order BLASST_DEFAULT(BLASST_SINK_FIRST);
  blasst_tile_test test;
  blasst_report report;
  int32_t threads BLASST_DEFAULT(0);
  void* workspace BLASST_DEFAULT(nullptr);
  size_t workspace_bytes BLASST_DEFAULT(0); /* at least blasst_decode_workspace_bytes */
  void* stream BLASST_DEFAULT(nullptr);     /* cuda: a cudaStream_t */
} blasst_decode_params;

/* Gradients of prefill. The forward's decisions are taken over, never taken again: a tile that it
 * skipped is absent, contributes exactly zero to every gradient and costs nothing. Each is rounded
 * once, from float32 sums; the sums' order does not depend on the number of threads.
 *
 * Members named as in blasst_prefill_params are the forward's. A page that is used twice has no
 * gradient (BLASST_UNSUPPORTED). */
typedef struct blasst_backward_params {
  blasst_backend backend BLASST_DEFAULT(BLASST_BACKEND_CPU);
  blasst_dtype dtype BLASST_DEFAULT(BLASST_FLOAT32); /* of all tensors but lse, sinks and dsinks */
  int64_t batch BLASST_DEFAULT(1);
  int64_t heads BLASST_DEFAULT(0);
  int64_t kv_heads BLASST_DEFAULT(0);
  int64_t head_dim BLASST_DEFAULT(0);
  int64_t value_dim BLASST_DEFAULT(0);
  int64_t query_length BLASST_DEFAULT(0);
  const int32_t* cu_seqlens_q BLASST_DEFAULT(nullptr);
  blasst_view q;
  blasst_keys_values kv;
  blasst_view out;                           /* as prefill wrote it */
  blasst_view dout;                          /* gradient of out, of its shape */
  const float* lse BLASST_DEFAULT(nullptr);  /* [heads, rows] as prefill reported it */
  const float* dlse BLASST_DEFAULT(nullptr); /* [heads, rows] gradient of lse; null: zero */
  /* As prefill reported them; null: every visible tile was kept (no test, no skip). */
  const uint32_t* tile_bits BLASST_DEFAULT(nullptr);
  float scale BLASST_DEFAULT(0);
  float softcap BLASST_DEFAULT(0);
  const float* sinks BLASST_DEFAULT(nullptr);
  blasst_mask mask;
  blasst_view dq; /* gradient of q, of its shape. No gradient shares memory with another tensor. */
  blasst_view dk; /* of k, in k's layout; zero where k holds no request's key */
  blasst_view dv; /* of v, likewise */
  float* dsinks BLASST_DEFAULT(nullptr); /* [heads] gradient of sinks; null: not wanted */
  int32_t threads BLASST_DEFAULT(0);
  void* workspace BLASST_DEFAULT(nullptr);
  size_t workspace_bytes BLASST_DEFAULT(0); /* at least blasst_backward_workspace_bytes */
} blasst_backward_params;

/* The tiles that decisions are taken on. */
typedef struct blasst_tile_shape {
  int64_t query_rows;  /* rows of one head a query tile; decode: heads / kv_heads * query_length */
  int64_t keys;        /* keys a key tile */
  int64_t split_tiles; /* decode: tiles of the visit sequence a split; 0: never split */
  /* decode: a visit longer than most_splits * split_tiles has splits of ceil(tiles / most_splits)
   * tiles; 0: no limit */
  int64_t most_splits BLASST_DEFAULT(0);
} blasst_tile_shape;

/* One attention over two sets of keys, from an attention over each: a prompt in chunks, or KV in
 * two places. Row by row, in float32:
 *   lse = ln(e^lse_a + e^lse_b)
 *   out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b
 * A part whose LSE is -inf adds nothing; two of them give output 0 and LSE -inf. A part without a
 * key but with a sink has output 0 and the sink as its LSE: it adds to the denominator alone. Each
 * call decides on its own tiles. A sink belongs in one of the two only. Rows are [batch,
 * query_length], or all of a ragged q with batch 1. */
typedef struct blasst_merge_params {
  blasst_backend backend BLASST_DEFAULT(BLASST_BACKEND_CPU);
  blasst_dtype dtype BLASST_DEFAULT(BLASST_FLOAT32); /* of out_a, out_b and out */
  int64_t batch BLASST_DEFAULT(1);
  int64_t query_length BLASST_DEFAULT(0);
  int64_t heads BLASST_DEFAULT(0);
  int64_t value_dim BLASST_DEFAULT(0);
  blasst_view out_a;
  blasst_view out_b;
  const float* lse_a BLASST_DEFAULT(nullptr); /* [heads, batch * query_length] as reported */
  const float* lse_b BLASST_DEFAULT(nullptr);
  blasst_view out;                      /* may be out_a or out_b, exactly */
  float* lse BLASST_DEFAULT(nullptr);   /* a buffer of its own; null: not wanted */
  int32_t threads BLASST_DEFAULT(0);    /* cpu: 0: all processors */
  void* stream BLASST_DEFAULT(nullptr); /* cuda: a cudaStream_t */
} blasst_merge_params;

/* What blasst_check_pages found, and which three numbers come with it. */
typedef BLASST_ENUM(blasst_page_fault){
    BLASST_PAGES_GOOD = 0, BLASST_PAGE_ID = 1, /* request, index in its page table, page id */
    BLASST_PAGE_LENGTH = 2, /* request, its length, the most keys that it has room for */
} blasst_page_fault;

/* Fill *params with the defaults above. */
BLASST_API void blasst_prefill_params_init(blasst_prefill_params* params);
BLASST_API void blasst_decode_params_init(blasst_decode_params* params);
BLASST_API void blasst_backward_params_init(blasst_backward_params* params);
BLASST_API void blasst_merge_params_init(blasst_merge_params* params);

BLASST_API blasst_status blasst_prefill(const blasst_prefill_params* params);
BLASST_API blasst_status blasst_decode(const blasst_decode_params* params);
BLASST_API blasst_status blasst_backward(const blasst_backward_params* params);
BLASST_API blasst_status blasst_merge(const blasst_merge_params* params);

/* cuda: looks on the device for what an attention call over paged keys cannot report: a page id
 * that is none of the pages (it reads as zeros) and a length beyond the page table (it is cut).
 * Enqueues on `stream`, a cudaStream_t, a kernel that writes to `found`, on the device, a
 * blasst_page_fault and three numbers that describe the first fault, by request, then by index. On
 * the cpu every call checks its pages itself. */
BLASST_API blasst_status blasst_check_pages(const blasst_keys_values* kv, int64_t batch,
                                            int32_t* found, void* stream);

BLASST_API blasst_status blasst_prefill_workspace_bytes(const blasst_prefill_params* params,
                                                        size_t* bytes);
BLASST_API blasst_status blasst_decode_workspace_bytes(const blasst_decode_params* params,
                                                       size_t* bytes);
BLASST_API blasst_status blasst_backward_workspace_bytes(const blasst_backward_params* params,
                                                         size_t* bytes);

BLASST_API blasst_status blasst_prefill_tile_shape(const blasst_prefill_params* params,
                                                   blasst_tile_shape* shape);
BLASST_API blasst_status blasst_decode_tile_shape(const blasst_decode_params* params,
                                                  blasst_tile_shape* shape);

/* What the last failed call of this thread reported; "" after none. Valid until the next call. */
BLASST_API const char* blasst_last_error(void);

/* "major.minor.patch" */
BLASST_API const char* blasst_version(void);

#ifdef __cplusplus
}
#endif

#endif /* BLASST_BLASST_H_ */
