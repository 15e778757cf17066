/* blasst: attention made sparse by softmax thresholding (BLASST, arXiv 2512.12087).
 *
 * The C interface, and the structs that the C++ interface (blasst.hpp) shares. Compiles as C11 and
 * as C++20. In C, start from the blasst_*_init of each struct; in C++ the members carry the same
 * defaults.
 *
 * A call's parameters have four parts: the problem (shapes, tensors, mask), the decision (which
 * tiles are dropped), the report (what is wanted beside the output) and the execution (backend,
 * threads or stream, workspace). Every struct that is passed by pointer, and every part, begins
 * with its size; docs/abi.md says how they grow.
 *
 * Sizes and strides count elements, lengths count tokens. Index arrays are int32. Nothing is
 * written when a call fails.
 *
 * On the CPU a call computes in the default floating-point environment on all of its threads (round
 * to nearest, subnormals kept, no traps), whatever its caller's is, which comes back. `threads` of
 * 0 are the processors that the process may use, its control groups' quota among the limits.
 * Threads are kept for the next call and end when they had nothing to do for some seconds; one that
 * cannot be started costs speed only. Calls from several threads take turns. A forked child may
 * call, too.
 *
 * Pointers are to host memory, or, on the CUDA backend, all to memory of the current device:
 * tensors, index arrays, thresholds, scales, sinks, bands, reports, workspace. A call then enqueues
 * its work on `stream`, allocates nothing and can be captured in a graph; each launch reads the
 * arrays anew. Values in device arrays are not checked: index arrays and scales must be valid, and
 * a threshold that is none (NaN, below 0) skips nothing, one above 1 counts as 1. What a backend
 * does not do is BLASST_UNSUPPORTED, with a message.
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

/* In C++ a member carries its default; C has blasst_*_init. */
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
    /* The first backend, in the order of blasst_backend_at, that is usable, is at home in the
     * memory that q (merge: out) lies in, and takes the problem. A null pointer counts as host
     * memory. */
    BLASST_BACKEND_AUTO = 0,
    BLASST_BACKEND_CPU = 1,
    /* The first of the next two that runs on the current device and takes the problem. The
     * environment variable BLASST_CUDA_BACKEND=cuda-sm90 or cuda-sm80 leaves one of them. */
    BLASST_BACKEND_CUDA = 2,
    /* Compute capability 9.0. */
    BLASST_BACKEND_CUDA_SM90 = 3,
    /* Compute capability 8.0 and later; scores in prefill are exact. */
    BLASST_BACKEND_CUDA_SM80 = 4,
} blasst_backend;

/* On the cpu, processors' bfloat16 dot products (instruction set avx512_bf16) take subnormal
 * numbers, those below 1.2e-38, as 0. */
typedef BLASST_ENUM(blasst_dtype){
    BLASST_FLOAT32 = 0, BLASST_FLOAT16 = 1, BLASST_BFLOAT16 = 2,
    /* Of keys and values only, see blasst_scales. */
    BLASST_INT8 = 3,        /* -128 to 127 */
    BLASST_FLOAT8_E4M3 = 4, /* 1 bit of sign, 4 of exponent, 3 of mantissa: up to 448 and NaN, no
                               infinity ("e4m3fn") */
} blasst_dtype;

/* How the rows of the requests lie in a tensor. */
typedef BLASST_ENUM(blasst_layout){
    BLASST_LAYOUT_DENSE = 0,  /* [batch, length, heads, dim] */
    BLASST_LAYOUT_RAGGED = 1, /* [rows of all requests, heads, dim], with cu_seqlens */
    BLASST_LAYOUT_PAGED = 2,  /* keys only: [pages, page_size, heads, dim], with a page table */
} blasst_layout;

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

/* The arithmetic of scale * q.k; probabilities and values stay as they are.
 *
 * Int8: of each request and KV head the mean of the finite elements of its keys is taken off them
 * (which changes a row's scores alike), keys and queries are rotated by one orthonormal Hadamard
 * matrix of the largest power of two that divides head_dim, and rounded to integers from -127 to
 * 127 in units of their own: one a query row, one a key tile. A score is a sum of integer products
 * times two units, plus q.mean. Thresholds, LSE, sinks and reports mean what they mean with exact
 * scores. The bytes follow from float32 in a fixed order, so every backend has the same for the
 * same tiles. A NaN or an infinity in a query makes its row NaN; one in a key makes every row NaN
 * that sees the key.
 *
 * Keys that are int8 already are taken as they are: no mean is taken off, nothing is rotated, and
 * queries are rounded as they come. A score is a sum of integer products times the row's unit, the
 * keys' scale and the problem's. So whoever rounds the keys rotates queries and keys alike: a query
 * that is large in few elements loses the others otherwise. */
typedef BLASST_ENUM(blasst_scores){
    BLASST_SCORES_EXACT = 0, /* in the precision of q and k */
    BLASST_SCORES_INT8 = 1,
} blasst_scores;

/* A [request, token, head, element] view; the last dimension is contiguous. */
typedef struct blasst_view {
  void* data BLASST_DEFAULT(nullptr); /* element [0, 0, 0, 0]; inputs are only read */
  blasst_dtype dtype BLASST_DEFAULT(BLASST_FLOAT32);
  int64_t elements BLASST_DEFAULT(0); /* from data to the end of its buffer; the view must fit */
  int64_t stride_request BLASST_DEFAULT(0); /* dense: request to request; paged: page to page;
                                               ragged: not used */
  int64_t stride_token BLASST_DEFAULT(0);
  int64_t stride_head BLASST_DEFAULT(0);
} blasst_view;

/* Keys and values, both in one layout:
 *   dense   k [batch, key_length, kv_heads, head_dim]; lengths optional (a cache not yet full)
 *   ragged  k [tokens, kv_heads, head_dim], cu_seqlens
 *   paged   k [pages, page_size, kv_heads, head_dim], page_table and lengths
 * and the same for v with value_dim. */
typedef struct blasst_keys_values {
  blasst_layout layout BLASST_DEFAULT(BLASST_LAYOUT_DENSE);
  blasst_view k BLASST_DEFAULT({});
  blasst_view v BLASST_DEFAULT({}); /* may lie in k's memory */
  /* Dense: tokens a request has room for. Ragged, paged: no request has more keys; 0: tokens, or
   * what fits in the page table. */
  int64_t key_length BLASST_DEFAULT(0);
  const int32_t* lengths BLASST_DEFAULT(nullptr); /* dense, paged: [batch] end of the keys in use */
  /* Dense: [batch] first key in use: padding on the left. Positions count from it. */
  const int32_t* starts BLASST_DEFAULT(nullptr);
  int64_t tokens BLASST_DEFAULT(0); /* ragged: of all requests, the last of cu_seqlens */
  const int32_t* cu_seqlens
      BLASST_DEFAULT(nullptr);         /* ragged: [batch + 1] first key of each request, from 0 */
  int64_t pages BLASST_DEFAULT(0);     /* paged: pages in k and v */
  int64_t page_size BLASST_DEFAULT(0); /* tokens a page, 1 to 256 */
  const int32_t* page_table BLASST_DEFAULT(nullptr); /* [batch, page_table_stride] page ids */
  int64_t page_table_stride BLASST_DEFAULT(0);       /* page ids from one request to the next */
} blasst_keys_values;

/* What the elements of keys or values in 8 bits are multiples of: of a request and KV head
 * values[request * stride_request + kv_head * stride_head], positive and finite; a stride of 0
 * shares a value. */
typedef struct blasst_scales {
  const float* values BLASST_DEFAULT(nullptr); /* null: 1 */
  int64_t stride_request BLASST_DEFAULT(0);
  int64_t stride_head BLASST_DEFAULT(0);
} blasst_scales;

/* Which keys a query may see. Query i of a request with Lq queries and Lk keys stands at position
 * p = i + Lk - Lq (bottom-right aligned) and sees key j if all that is set allows the distance p -
 * j. */
typedef struct blasst_mask {
  int32_t causal BLASST_DEFAULT(0);        /* 1: p - j >= 0 */
  int64_t window_left BLASST_DEFAULT(-1);  /* p - j <= window_left; -1: no limit */
  int64_t window_right BLASST_DEFAULT(-1); /* j - p <= window_right; -1: no limit */
  const int64_t* bands
      BLASST_DEFAULT(nullptr); /* [heads, 2] first and last distance p - j, inclusive */
  /* [tile_heads, query_tiles, key_tiles] of the plan: 1: visit, 0: leave out. */
  const uint8_t* blocks BLASST_DEFAULT(nullptr);
  int64_t blocks_stride_head BLASST_DEFAULT(0);
  int64_t blocks_stride_query_tile BLASST_DEFAULT(0); /* at least the plan's key_tiles */
} blasst_mask;

/* What attends to what. Queries are dense q [batch, query_length, heads, head_dim], or ragged
 * q [rows, heads, head_dim]; out is laid out alike.
 *
 * k and v are of the type of q, or each of 8 bits (a quantised cache): exact in every type of q, so
 * that they give what the same numbers in that type give. A score is scale * k_scale * q.k, an
 * output row v_scale times the sum over v. A backend that has no kernel for a pair of types says
 * so. CUDA's prefill first rounds k_scale * k and v_scale * v to the type of q, but for int8 keys
 * under scores in int8, which are taken as they are (blasst_scores). */
typedef struct blasst_problem {
  size_t struct_size BLASST_DEFAULT(sizeof(blasst_problem));
  int64_t batch BLASST_DEFAULT(1);
  int64_t heads BLASST_DEFAULT(0); /* query heads, a multiple of kv_heads */
  int64_t kv_heads BLASST_DEFAULT(0);
  int64_t head_dim BLASST_DEFAULT(0);  /* of q and k: 16 to 576, a multiple of 8 */
  int64_t value_dim BLASST_DEFAULT(0); /* of v and out: the same range */
  blasst_layout query_layout BLASST_DEFAULT(BLASST_LAYOUT_DENSE);
  /* Dense: rows a request; ragged: no request has more; 0: rows. Decode: 1 to 16. */
  int64_t query_length BLASST_DEFAULT(0);
  /* Dense: [batch] rows in use of each request, from the first; null: all. With this or kv.starts,
   * rows not in use and, if none looks ahead (causal, window_right 0), rows before every key are
   * padding: they get output 0, and query tiles begin at the first row that is none. */
  const int32_t* query_lengths BLASST_DEFAULT(nullptr);
  int64_t rows BLASST_DEFAULT(0); /* ragged: of all requests, the last of cu_seqlens_q */
  const int32_t* cu_seqlens_q
      BLASST_DEFAULT(nullptr); /* ragged: [batch + 1] first row of each request, from 0 */
  blasst_view q BLASST_DEFAULT({});
  blasst_view out BLASST_DEFAULT({}); /* must not share memory with the inputs */
  blasst_keys_values kv BLASST_DEFAULT({});
  float scale BLASST_DEFAULT(0);              /* score = scale * q.k; 0: 1 / sqrt(head_dim) */
  float softcap BLASST_DEFAULT(0);            /* c > 0: score = c * tanh(scale * q.k / c); 0: off */
  const float* sinks BLASST_DEFAULT(nullptr); /* [heads] logits that join the denominator */
  blasst_mask mask BLASST_DEFAULT({});        /* decode: causal among the query positions */
  blasst_scales k_scales BLASST_DEFAULT({});  /* of k in 8 bits */
  blasst_scales v_scales BLASST_DEFAULT({});  /* of v in 8 bits */
} blasst_problem;

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

/* Which tiles are dropped, and by what scores. */
typedef struct blasst_decision {
  size_t struct_size BLASST_DEFAULT(sizeof(blasst_decision));
  blasst_order order BLASST_DEFAULT(BLASST_SINK_FIRST);
  blasst_tile_test test BLASST_DEFAULT({});
  /* The tiles that the thresholds belong to; 0: whatever the backend decides on. A backend that
   * decides on other tiles does not take the call. */
  int64_t tile_query_rows BLASST_DEFAULT(0); /* prefill */
  int64_t tile_keys BLASST_DEFAULT(0);
  blasst_scores scores BLASST_DEFAULT(BLASST_SCORES_EXACT);
} blasst_decision;

/* Bins of a gap histogram. A tile's gap is the largest, over its rows, of row maximum - running
 * maximum (natural log). Bin 0: below -BLASST_GAP_RANGE; then equal widths up to 0; last bin: 0 and
 * above, the first tile of a row and NaN included. */
#define BLASST_GAP_BINS 514
#define BLASST_GAP_RANGE 32.0

/* What a call reports beside its output; null: not wanted. "Rows" is batch * query_length, or
 * problem.rows. tile_heads, query_tiles, key_tiles and tile_words are the plan's. */
typedef struct blasst_report {
  size_t struct_size BLASST_DEFAULT(sizeof(blasst_report));
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
  /* [tile_heads, query_tiles, tile_words] one bit a tile, 1 = kept: bit j % 32 of word j / 32 is
   * key tile j. */
  uint32_t* tile_bits BLASST_DEFAULT(nullptr);
  /* [heads, BLASST_GAP_BINS] visited tiles by gap. In decode the query heads of a KV head decide
   * together and share one gap. */
  uint64_t* gap_histogram BLASST_DEFAULT(nullptr);
  /* [tile_heads, query_tiles, tile_maxima_stride] the largest score of each visited tile, what the
   * absolute test looks at; -inf where no tile is visited or no row has a valid score; NaN where a
   * score is NaN. */
  float* tile_maxima BLASST_DEFAULT(nullptr);
  int64_t tile_maxima_stride BLASST_DEFAULT(0); /* at least key_tiles */
} blasst_report;

/* Where and with what a call runs. */
typedef struct blasst_execution {
  size_t struct_size BLASST_DEFAULT(sizeof(blasst_execution));
  blasst_backend backend BLASST_DEFAULT(BLASST_BACKEND_AUTO);
  int32_t threads BLASST_DEFAULT(0);        /* cpu: 0: all processors */
  void* stream BLASST_DEFAULT(nullptr);     /* cuda: a cudaStream_t */
  void* workspace BLASST_DEFAULT(nullptr);  /* cpu: null: the call allocates what it needs */
  size_t workspace_bytes BLASST_DEFAULT(0); /* at least the plan's workspace_bytes */
} blasst_execution;

/* Prefill: many query rows a request.
 *
 * Decode: the last query_length (1 to 16) positions of each request, fewer of ragged queries,
 * whose splits are those of so many. The query heads of a KV head form one query tile and decide
 * together. Long KV is cut into splits of visited tiles (blasst_tile_shape). A split's tiles are
 * also tested against the scores of the first BLASST_SEED_TILES tiles that the query tile visits,
 * of those before the split: no split but the one that begins the visit starts blind, a row's
 * first keys are never skipped, and the result does not depend on the number of threads. */
#define BLASST_SEED_TILES 4
typedef struct blasst_attention_params {
  size_t struct_size BLASST_DEFAULT(sizeof(blasst_attention_params));
  blasst_problem problem BLASST_DEFAULT({});
  blasst_decision decision BLASST_DEFAULT({});
  blasst_report report BLASST_DEFAULT({});
  blasst_execution execution BLASST_DEFAULT({});
} blasst_attention_params;

/* What the forward left and what is wanted of it. */
typedef struct blasst_gradients {
  size_t struct_size BLASST_DEFAULT(sizeof(blasst_gradients));
  blasst_view dout BLASST_DEFAULT({});       /* gradient of out, of its shape */
  const float* lse BLASST_DEFAULT(nullptr);  /* [heads, rows] as prefill reported it */
  const float* dlse BLASST_DEFAULT(nullptr); /* [heads, rows] gradient of lse; null: zero */
  /* As prefill reported them; null: every visible tile was kept (no test, no skip). */
  const uint32_t* tile_bits BLASST_DEFAULT(nullptr);
  /* No gradient shares memory with another tensor. */
  blasst_view dq BLASST_DEFAULT({}); /* gradient of q, of its shape */
  blasst_view dk BLASST_DEFAULT({}); /* of k, in k's layout; zero where k holds no request's key */
  blasst_view dv BLASST_DEFAULT({}); /* of v, likewise */
  float* dsinks BLASST_DEFAULT(nullptr); /* [heads] gradient of sinks; null: not wanted */
} blasst_gradients;

/* Gradients of prefill. The forward's decisions are taken over, never taken again: a tile that it
 * skipped is absent, contributes exactly zero to every gradient and costs nothing. Each is rounded
 * once, from float32 sums; the sums' order does not depend on the number of threads.
 *
 * `problem` is the forward's, with out as prefill wrote it. A page that is used twice has no
 * gradient, nor have keys and values in 8 bits (BLASST_UNSUPPORTED). */
typedef struct blasst_backward_params {
  size_t struct_size BLASST_DEFAULT(sizeof(blasst_backward_params));
  blasst_problem problem BLASST_DEFAULT({});
  blasst_gradients gradients BLASST_DEFAULT({});
  blasst_execution execution BLASST_DEFAULT({});
} blasst_backward_params;

/* One attention over two sets of keys, from an attention over each: a prompt in chunks, or KV in
 * two places. Row by row, in float32:
 *   lse = ln(e^lse_a + e^lse_b)
 *   out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b
 * A part whose LSE is -inf adds nothing; two of them give output 0 and LSE -inf. A part without a
 * key but with a sink has output 0 and the sink as its LSE: it adds to the denominator alone. Each
 * call decides on its own tiles. A sink belongs in one of the two only. Rows are [batch,
 * query_length], or all of a ragged q with batch 1. */
typedef struct blasst_merge_params {
  size_t struct_size BLASST_DEFAULT(sizeof(blasst_merge_params));
  int64_t batch BLASST_DEFAULT(1);
  int64_t query_length BLASST_DEFAULT(0);
  int64_t heads BLASST_DEFAULT(0);
  int64_t value_dim BLASST_DEFAULT(0);
  blasst_view out_a BLASST_DEFAULT({});
  blasst_view out_b BLASST_DEFAULT({});
  const float* lse_a BLASST_DEFAULT(nullptr); /* [heads, batch * query_length] as reported */
  const float* lse_b BLASST_DEFAULT(nullptr);
  blasst_view out BLASST_DEFAULT({});            /* may be out_a or out_b, exactly */
  float* lse BLASST_DEFAULT(nullptr);            /* a buffer of its own; null: not wanted */
  blasst_execution execution BLASST_DEFAULT({}); /* no workspace is needed */
} blasst_merge_params;

/* The tiles that decisions are taken on. */
typedef struct blasst_tile_shape {
  /* Rows of one head a query tile; decode: heads / kv_heads * query_length. */
  int64_t query_rows BLASST_DEFAULT(0);
  int64_t keys BLASST_DEFAULT(0); /* keys a key tile */
  /* decode: tiles of the visit a split; 0: never split. What is left at the visit's end joins the
   * split before it if it is half a split at most and no more than BLASST_SEED_TILES tiles. */
  int64_t split_tiles BLASST_DEFAULT(0);
  /* decode: a visit longer than most_splits * split_tiles has splits of ceil(tiles / most_splits)
   * tiles; 0: no limit */
  int64_t most_splits BLASST_DEFAULT(0);
} blasst_tile_shape;

/* What a call decides on and needs, from its scalars alone: no array is read, and pointers may be
 * null. Arrays of tiles are [tile_heads, query_tiles, key_tiles or tile_words]. The query tiles of
 * a dense request follow those of ceil(query_length / query_rows) for each request before it, those
 * of a ragged request the query tiles that the requests before it have. */
typedef struct blasst_plan {
  size_t struct_size BLASST_DEFAULT(sizeof(blasst_plan));
  blasst_backend backend BLASST_DEFAULT(BLASST_BACKEND_AUTO); /* that takes the call */
  blasst_tile_shape shape BLASST_DEFAULT({});
  int64_t tile_heads BLASST_DEFAULT(0);     /* heads; decode: kv_heads or their parts */
  int64_t query_tiles BLASST_DEFAULT(0);    /* room for those of all requests; decode: batch */
  int64_t key_tiles BLASST_DEFAULT(0);      /* of a request of the most keys */
  int64_t tile_words BLASST_DEFAULT(0);     /* ceil(key_tiles / 32) */
  size_t workspace_bytes BLASST_DEFAULT(0); /* cuda: 256-byte aligned */
} blasst_plan;

/* What blasst_check_pages found, and which three numbers come with it. */
typedef BLASST_ENUM(blasst_page_fault){
    BLASST_PAGES_GOOD = 0, BLASST_PAGE_ID = 1, /* request, index in its page table, page id */
    BLASST_PAGE_LENGTH = 2, /* request, its length, the most keys that it has room for */
} blasst_page_fault;

/* A backend of this build. Strings are valid until this thread's next call of blasst_backend_at. */
typedef struct blasst_backend_info {
  size_t struct_size BLASST_DEFAULT(sizeof(blasst_backend_info));
  blasst_backend backend BLASST_DEFAULT(BLASST_BACKEND_AUTO);
  const char* name BLASST_DEFAULT(nullptr);         /* "cpu", "cuda-sm90", "cuda-sm80" */
  const char* architecture BLASST_DEFAULT(nullptr); /* its kernels are for: "sm90", "sm80";
                                                       cpu: the instruction set in use */
  int32_t usable BLASST_DEFAULT(0);                 /* 1: on this machine */
  const char* detail BLASST_DEFAULT(nullptr);       /* the device; or why it is not usable */
} blasst_backend_info;

/* Fill *params with the defaults above. */
BLASST_API void blasst_attention_params_init(blasst_attention_params* params);
BLASST_API void blasst_backward_params_init(blasst_backward_params* params);
BLASST_API void blasst_merge_params_init(blasst_merge_params* params);
BLASST_API void blasst_plan_init(blasst_plan* plan);
BLASST_API void blasst_backend_info_init(blasst_backend_info* info);

BLASST_API blasst_status blasst_prefill(const blasst_attention_params* params);
BLASST_API blasst_status blasst_decode(const blasst_attention_params* params);
BLASST_API blasst_status blasst_backward(const blasst_backward_params* params);
BLASST_API blasst_status blasst_merge(const blasst_merge_params* params);

BLASST_API blasst_status blasst_prefill_plan(const blasst_attention_params* params,
                                             blasst_plan* plan);
BLASST_API blasst_status blasst_decode_plan(const blasst_attention_params* params,
                                            blasst_plan* plan);
BLASST_API blasst_status blasst_backward_plan(const blasst_backward_params* params,
                                              blasst_plan* plan);

/* cuda: looks on the device for what an attention call over paged keys cannot report: a page id
 * that is none of the pages (it reads as zeros) and a length beyond the page table (it is cut).
 * Reads batch and kv of the problem. Enqueues on `stream`, a cudaStream_t, a kernel that writes to
 * `found`, on the device, a blasst_page_fault and three numbers that describe the first fault, by
 * request, then by index. On the cpu every call checks its pages itself. */
BLASST_API blasst_status blasst_check_pages(const blasst_problem* problem, int32_t* found,
                                            void* stream);

/* The backends of this build, in the order in which BLASST_BACKEND_AUTO asks them. */
BLASST_API int32_t blasst_backend_count(void);
BLASST_API blasst_status blasst_backend_at(int32_t index, blasst_backend_info* info);

/* The CPU's instruction sets that kernels exist for and this machine has, best first, separated by
 * commas. The first is used, unless the environment variable BLASST_CPU_ISA or blasst_set_cpu_isa
 * names another. */
BLASST_API blasst_status blasst_cpu_isas(const char** names);
BLASST_API blasst_status blasst_cpu_isa(const char** name);
BLASST_API blasst_status blasst_set_cpu_isa(const char* name);

/* Threads that a call with threads = 0 uses: the processors that the process may use, and no more
 * than its control groups' quota of CPU time, as it was at the first call. */
BLASST_API int32_t blasst_default_threads(void);

/* What the last failed call of this thread reported; "" after none. Valid until the next call. */
BLASST_API const char* blasst_last_error(void);

/* "major.minor.patch" */
BLASST_API const char* blasst_version(void);

#ifdef __cplusplus
}
#endif

#endif /* BLASST_BLASST_H_ */
