// What the prefill kernels are told. No CUDA types here.
#pragma once

#include <cstdint>

#include "cuda/core/params.h"

namespace blasst::cuda::prefill {

// How a tile of keys was rounded to bytes.
struct alignas(16) KeyTileUnit {
  float unit;      // of its elements
  int any_broken;  // not 0: it has keys that are not finite
};

// Which those are; their bytes are 0.
struct BrokenKeys {
  unsigned words[4];  // bit j % 32 of word j / 32: key j
};

// Keys in bytes, for scores in int8 (quantize.h). A request's tiles follow those of the requests
// before it.
struct QuantizedKeys {
  int8_t* data;        // [kv_heads, tiles, keys a tile, dim]
  KeyTileUnit* units;  // [kv_heads, tiles]
  BrokenKeys* broken;  // [kv_heads, tiles]
  float* means;        // [batch, kv_heads, dim] what was taken off the keys
  double* sums;        // [kv_heads, tiles, dim] of the elements that are finite
  bool as_stored;      // the caller's own bytes: nothing is rotated, and there are no means
  int tiles;           // that there is room for
  float dot_to_log2;   // log2(e) times what q.k is multiplied with
  bool level;          // what the means add to the scores of a row counts: softmax does not see it
};

struct Params {
  // Queries and output: dense [batch, query_length, heads, dim] or, with cu_seqlens_q,
  // ragged [rows, heads, dim].
  int batch, heads, kv_heads;
  int query_length;          // dense: rows a request; ragged: the most rows of a request
  int rows;                  // of all requests
  const int* cu_seqlens_q;   // [batch + 1]; null: dense
  const int* query_lengths;  // [batch] dense: rows in use, from the first; null: all
  OutputRows out;
  KeyLayout keys;
  QuantizedKeys quantized;  // scores in int8 only

  // A score is scale * q.k, or softcap * tanh(scale * q.k / softcap).
  float softcap;        // 0: none
  float softcap_scale;  // what makes a raw score the argument of tanh
  // log2(e) times what a raw score (after tanh, if any) is multiplied with. Raw scores in int8 are
  // base-2 logarithms as they are.
  float score_to_log2;
  const float* sinks;  // [heads] logits that join the denominator; null: none

  Distances distances;
  const int64_t* bands;  // [heads, 2] further limits, both included; null: none
  int order;             // blasst_order
  Thresholds test;
  ReportArrays report;

  // Work: an item is a block of query rows of one head of one request (order.h).
  int row_blocks;         // of a request; not used with first_block
  int section_heads;      // request-heads, or with first_block heads, that run side by side
  int* next_item;         // zero when the kernel starts
  int* first_block;       // [batch + 1] blocks of the requests before; null: row_blocks each
  int* first_query_tile;  // [batch + 1] the same of a ragged batch's query tiles
};

// What is compiled into a kernel.
enum class Variant {
  kDense,   // no tile test: V comes with K
  kSparse,  // tile test; V only for tiles that are kept; counts and tile bits
  kReport,  // the same with maxima, gaps and dropped mass
};

// The arithmetic of q.k.
enum class Scores { kExact, kInt8 };

inline constexpr int kQueryTileRows = 64;  // rows that decide together
inline constexpr int kMostQueryTiles = 3;  // of an item

// Whether requests differ in their number of rows, which only the device knows.
constexpr bool rows_differ(const Params& p) {
  return p.cu_seqlens_q || p.keys.starts || p.query_lengths;
}

}  // namespace blasst::cuda::prefill
