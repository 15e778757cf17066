// What the kernels of both phases are told about a call: plain values and device pointers. No CUDA
// types here.
//
// One launch handles every request of a batch. Strides and sizes count elements, lengths count
// tokens. Pointers are to device memory; null where a field says so. Whatever they point to is read
// when the kernel runs, so a captured graph sees new lengths, pages and thresholds.
#pragma once

#include <cstdint>

namespace blasst::cuda {

struct OutputRows {
  void* data;  // 16-byte aligned, as are its rows
  int64_t stride_request, stride_token, stride_head;
};

struct KeyLayout {
  int length;             // the most tokens of a request; longer lengths are cut to it
  const int* starts;      // [batch] first key in use, of dense keys; null: 0
  const int* lengths;     // [batch] end of the keys in use; null: length each
  const int* cu_seqlens;  // [batch + 1]; null: not ragged
  const int* page_table;  // [batch, page_table_stride]; null: not paged
  int64_t page_table_stride;
  int page_size;  // tokens: 16, 32, 64, 128 or 256
  int pages;
};

// Position p sees key j if least <= p - j <= most; at most kUnlimited away.
struct Distances {
  int least, most;
};

// kind is a blasst_test. A value that is no valid threshold (NaN, negative) skips nothing; one
// above 1 counts as 1.
struct Thresholds {
  int kind;
  const float* values;
  int64_t stride_request, stride_head, stride_place;
  int places;
};

// Null: not wanted.
struct ReportArrays {
  float* lse;                     // [heads, rows]
  float* dropped_mass_bound;      // [heads, rows]
  unsigned long long* visitable;  // [batch, heads]
  unsigned long long* skipped;    // [batch, heads]
  unsigned* tile_bits;            // [heads or KV heads, query tiles of all requests, tile_words]
  int tile_words;
  int query_tiles;                    // room for those of all requests; prefill only
  unsigned long long* gap_histogram;  // [heads, BLASST_GAP_BINS]
  float* tile_maxima;  // [heads, query tiles of all requests, tile_maxima_stride]; prefill only
  int64_t tile_maxima_stride;
};

}  // namespace blasst::cuda
