// Chunks of keys, and the choice of those a query tile reads: dynamic hierarchical sparse attention
// (arXiv 2510.24606). The keys of a request are cut into chunks of varying length; a chunk is known
// by its mean key, a query tile by its mean query, and each query tile reads the chunks that are
// most like it until its budget is spent. The result is a block mask (blasst_mask.blocks), so keys
// that are not chosen are not read. On the CPU.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "blasst/blasst.hpp"

namespace blasst {

// Rows [rows, heads, head_dim] of one request; the last dimension is contiguous.
struct HeadRows {
  DType dtype = BLASST_FLOAT32;
  const void* data = nullptr;
  int64_t elements = 0;  // from data to the end of its buffer; the rows must fit
  int64_t rows = 0;
  int64_t heads = 0;
  int64_t head_dim = 0;  // 16 to 256, a multiple of 8
  int64_t stride_row = 0;
  int64_t stride_head = 0;
};

// Says from the keys before and after a position whether a chunk begins there. With y = projection
// k: l = sum of left[i] y[t - window + i], r = sum of right[i] y[t + i], and the score is
// weight2 . relu(weight1 [l, r, l - r, l r, cos(l, r)] + bias1) + bias2.
struct BoundaryPredictor {
  int64_t inputs = 0;                 // kv_heads * head_dim of the keys it was trained on
  int64_t window = 0;                 // keys on each side, 1 to 64
  int64_t features = 0;               // a multiple of 32, up to 256
  int64_t hidden = 0;                 // a multiple of 32, up to 1024
  const float* projection = nullptr;  // [inputs, features]
  const float* left = nullptr;        // [window]
  const float* right = nullptr;       // [window]
  const float* weight1 = nullptr;     // [4 * features + 1, hidden]
  const float* bias1 = nullptr;       // [hidden]
  const float* weight2 = nullptr;     // [hidden]
  float bias2 = 0;
};

enum class Chunker {
  kFixed,    // every `most` keys
  kShift,    // where a key is unlike the one before: cosine, mean of the KV heads, < threshold
  kTrained,  // where the predictor's score is > threshold
};

// Where a chunk begins: where the chunker says so, if the chunk before has `least` keys by then; at
// the latest when it has `most`.
struct ChunkRule {
  Chunker chunker = Chunker::kFixed;
  int64_t least = 1;
  int64_t most = 64;
  float threshold = 0;
  const BoundaryPredictor* predictor = nullptr;  // kTrained
};

// The chunks of a request's keys: consecutive, covering all of them.
struct Chunks {
  int64_t keys = 0;
  std::vector<int32_t> starts;  // [chunks] first key of each, from 0
  std::vector<float> sums;      // [chunks, kv_heads, head_dim] sum of each chunk's keys
};

// The same, somebody else's.
struct ChunkView {
  ChunkView(int64_t keys, std::span<const int32_t> starts, std::span<const float> sums)
      : keys(keys), starts(starts), sums(sums) {}
  ChunkView(const Chunks& chunks) : ChunkView(chunks.keys, chunks.starts, chunks.sums) {}

  int64_t keys;
  std::span<const int32_t> starts;
  std::span<const float> sums;
};

// `threads` of every function: 0: default_threads(). Results do not depend on it.

// Takes up the keys that are new: `keys` are all of the request's, those of `chunks` first. The
// result is the same whether they came at once or one by one. A trained boundary is found `window`
// keys late. Throws Error.
void extend_chunks(Chunks& chunks, const ChunkRule& rule, const HeadRows& keys, int threads);

// What extend_chunks changes: the chunks that take the place of the last one (of none, if there
// are none yet), `keys` as there. Throws Error.
Chunks next_chunks(ChunkView chunks, const ChunkRule& rule, const HeadRows& keys, int threads);

// What the chunker compares with its threshold at positions [begin, end) of the keys: kShift from 1
// on, kTrained from `window` to keys - window, both included; NaN elsewhere. Throws Error.
std::vector<float> boundary_scores(const ChunkRule& rule, const HeadRows& keys, int64_t begin,
                                   int64_t end, int threads);

// How many keys a query tile may read: `keys`, or the share of those that its last row sees.
struct ChunkBudget {
  int64_t keys = 0;  // 0: share
  double share = 0;  // 0 to 1
};

// The block mask of a request, causal, its queries at the end of its keys: prefill [heads, query
// tiles, key tiles], decode [kv_heads, key tiles]; 1: visit.
//
// Key tile 0 and those of the tile's own rows are always chosen; then the chunk that its last row
// stands in; then the others that lie before it, by (sum of queries / sqrt(rows)) . (sum of keys /
// sqrt(length)), in decode the largest q . (sum of keys / sqrt(length)) of its rows, greatest
// first. A chunk takes the key tiles it touches; it is passed over if they exceed the budget,
// rounded up to whole tiles. Throws Error.
void select_tiles(ChunkView chunks, int64_t kv_heads, const HeadRows& queries, bool decode,
                  ChunkBudget budget, uint8_t* blocks, int threads);

}  // namespace blasst
