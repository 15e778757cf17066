// What the prefill kernel is told: plain values and device pointers.
#pragma once

#include <cstdint>

#include "cuda/sm90/tensor.h"

namespace blasst::cuda::prefill {

// One launch handles every request of a batch. Strides and sizes count elements, lengths count
// tokens. Pointers are to device memory; null where a field says so.
struct Params {
  // Queries and output: dense [batch, query_length, heads, dim] or, with cu_seqlens_q,
  // ragged [rows, heads, dim].
  int batch, heads, kv_heads;
  int query_length;          // dense: rows a request; ragged: the most rows of a request
  int rows;                  // of all requests
  const int* cu_seqlens_q;   // [batch + 1]; null: dense
  const int* query_lengths;  // [batch] dense: rows in use, from the first; null: all
  void* out;                 // 16-byte aligned, as are its rows
  int64_t out_stride_request, out_stride_token, out_stride_head;

  // Keys and values.
  int key_length;           // dense: tokens a request has room for
  const int* starts;        // [batch] first key in use, of dense keys; null: 0
  const int* lengths;       // [batch] end of the keys in use; null: key_length each
  const int* cu_seqlens_k;  // [batch + 1]; null: not ragged
  const int* page_table;    // [batch, page_table_stride]; null: not paged
  int64_t page_table_stride;
  int page_size;  // tokens
  int pages;

  // A score is scale * q.k, or softcap * tanh(scale * q.k / softcap).
  float softcap;        // 0: none
  float softcap_scale;  // scale / softcap
  float score_to_log2;  // log2(e) times what a raw score (after tanh, if any) is multiplied with
  const float* sinks;   // [heads] logits that join the denominator; null: none

  // Position p sees key j if least <= p - j <= most; at most kUnlimited away.
  int least_distance, most_distance;
  const int64_t* bands;  // [heads, 2] further limits, both included; null: none

  int order;  // blasst_order

  // The tile test: kind is a blasst_test. Values are read at every launch. A value that is no valid
  // threshold (NaN, negative) skips nothing; one above 1 counts as 1.
  int test;
  const float* thresholds;
  int64_t threshold_stride_request, threshold_stride_head, threshold_stride_place;
  int threshold_places;

  // Reports; null: not wanted.
  float* lse;                     // [heads, rows]
  float* dropped_mass_bound;      // [heads, rows]
  unsigned long long* visitable;  // [batch, heads]
  unsigned long long* skipped;    // [batch, heads]
  unsigned* tile_bits;            // [heads, query tiles of all requests, tile_words]
  int tile_words;
  int query_tiles;                    // room for those of all requests
  unsigned long long* gap_histogram;  // [heads, BLASST_GAP_BINS]
  float* tile_maxima;                 // [heads, query tiles of all requests, tile_maxima_stride]
  int64_t tile_maxima_stride;

  // Work: an item is a block of query rows of one head of one request (schedule.h).
  int row_blocks;         // of a request; not used with first_block
  int section_heads;      // request-heads, or with first_block heads, that run side by side
  int* next_item;         // zero when the kernel starts
  int* first_block;       // [batch + 1] blocks of the requests before; null: row_blocks each
  int* first_query_tile;  // [batch + 1] the same of a ragged batch's query tiles
};

// What is compiled into a kernel.
enum class Variant {
  kDense,   // no tile test: V comes with K
  kSparse,  // tile test; V only for tiles that are kept
  kReport,  // the same with tile bits, maxima, gaps and dropped mass
};

inline constexpr int kRowsPerWarpgroup = 64;  // rows that decide together: a query tile

// Warpgroups of a block that own rows. Where the softmax is the longer part of a tile, three hide
// it better.
inline constexpr int kMostWarpgroups = 3;
constexpr int warpgroups(int dim) { return dim > 64 ? 2 : 3; }
constexpr int rows_per_block(int dim) { return warpgroups(dim) * kRowsPerWarpgroup; }

// Whether requests differ in their number of rows, which only the device knows.
constexpr bool rows_differ(const Params& p) {
  return p.cu_seqlens_q || p.starts || p.query_lengths;
}

// Keys a tile. 256-wide heads leave room for 64.
constexpr int tile_keys(int dim) { return dim > 128 ? 64 : 128; }

}  // namespace blasst::cuda::prefill
