// What the decode kernels are told: plain values and device pointers.
#pragma once

#include <cstdint>

#include "cuda/sm90/tensor.h"

namespace blasst::cuda::decode {

// One launch handles every request of a batch. Strides and sizes count elements, lengths count
// tokens. Pointers are to device memory; null where a field says so. Whatever they point to is read
// when the kernel runs, so a captured graph sees new lengths, pages and thresholds.
struct Params {
  int batch, heads, kv_heads;
  int query_length;  // positions a request, 1 to 16: its last ones
  void* out;         // [batch, query_length, heads, dim]
  int64_t out_stride_request, out_stride_token, out_stride_head;

  // Keys and values.
  int key_length;           // the most tokens of a request; longer lengths are cut to it
  const int* starts;        // [batch] first key in use, of dense keys; null: 0
  const int* lengths;       // [batch] end of the keys in use; null: key_length each
  const int* cu_seqlens_k;  // [batch + 1]; null: not ragged
  const int* page_table;    // [batch, page_table_stride]; null: not paged
  int64_t page_table_stride;
  int page_size;  // tokens: 16, 32, 64, 128 or 256
  int pages;

  // A score is scale * q.k, or softcap * tanh(scale * q.k / softcap).
  float scale;
  float softcap;       // 0: none
  const float* sinks;  // [heads] logits that join the denominator; null: none

  // Position p sees key j if least <= p - j <= most; at most kUnlimited away.
  int least_distance, most_distance;

  int order;  // blasst_order

  // The tile test: kind is a blasst_test. A value that is no valid threshold (NaN, negative) skips
  // nothing; one above 1 counts as 1.
  int test;
  const float* thresholds;
  int64_t threshold_stride_request, threshold_stride_head;

  // Reports; null: not wanted.
  float* lse;                     // [heads, batch * query_length]
  float* dropped_mass_bound;      // [heads, batch * query_length]
  unsigned long long* visitable;  // [batch, heads]
  unsigned long long* skipped;    // [batch, heads]
  unsigned* tile_bits;            // [kv_heads, batch, tile_words]
  int tile_words;
  unsigned long long* gap_histogram;  // [heads, BLASST_GAP_BINS]
};

// What launch() adds: the split rule and where partial results lie (schedule.h).
struct Plan {
  int rows;               // query rows of a KV head: heads / kv_heads * query_length
  int least_split_tiles;  // of the split rule
  int most_splits;
  int item_splits;    // splits of a work item: 1 or kGroupSplits
  int item_slots;     // items that a request and KV head may have
  int items;          // of all requests and KV heads, with those that short requests lack
  int chunk;          // items that a block takes at a time
  int* next_item;     // zero when the kernel starts; null: no block has more than one chunk
  int box_tokens;     // tokens a copy: kTileKeys or a smaller page
  float unit_scale;   // a score in natural units / a score as the kernel keeps it
  float* partial;     // [items, rows, dim]
  float* statistics;  // [items, kStatistics, rows]: maximum, sum; of SkippedMass: maximum, sum
  int* dropped;       // [items]: skipped tiles
};

// What is compiled into a kernel.
enum class Variant {
  kDense,   // no tile test
  kSparse,  // tile test
  kReport,  // the same with tile bits, gaps and dropped mass
};

inline constexpr int kTileKeys = 64;
inline constexpr int kStatistics = 4;
inline constexpr int kMaxRows = 64;  // query rows of a KV head

}  // namespace blasst::cuda::decode
