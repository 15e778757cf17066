// What the decode kernels are told. No CUDA types here.
#pragma once

#include <cstdint>

#include "cuda/core/params.h"

namespace blasst::cuda::decode {

// Of keys or values in 8 bits, by request and KV head (blasst_scales).
struct Scales {
  const float* values;  // null: 1
  int64_t stride_request, stride_head;
};

struct Params {
  int batch, heads, kv_heads;
  int query_length;         // the most positions of a request, 1 to 16: its last ones
  int rows;                 // of all requests
  const int* cu_seqlens_q;  // [batch + 1] first row of each request; null: query_length each
  OutputRows out;           // [batch, query_length, heads, dim], or [rows, heads, dim]
  KeyLayout keys;
  Scales k_scales, v_scales;

  // A score is scale * q.k, or softcap * tanh(scale * q.k / softcap).
  float scale;
  float softcap;       // 0: none
  const float* sinks;  // [heads] logits that join the denominator; null: none

  Distances distances;
  int order;  // blasst_order
  Thresholds test;
  ReportArrays report;
};

// Hands out the work items behind those that the blocks begin with (turns.cuh).
struct Turns {
  unsigned long long* signature;  // in the workspace; null: no block has more than one item
  unsigned long long of_launch;
  int* taken;
};

// What launch() adds: the split rule and where partial results lie (splits.h).
struct Plan {
  int rows;               // most query rows of a KV head: heads / kv_heads * query_length
  int least_split_tiles;  // of the split rule
  int most_splits;
  bool folds;           // the kernel adds up the splits of a group, in items that begin with one
  bool whole_groups;    // all items are
  int result_slots;     // results that a request and KV head may have
  int results;          // of all requests and KV heads, with those that short requests lack
  int blocks;           // of threads, that the GPU runs at a time
  int most_item_tiles;  // of several whole splits that are an item, if not all are whole groups
  Turns turns;
  int box_tokens;     // tokens a copy: kTileKeys or a smaller page
  bool half_queries;  // of keys in 8 bits: queries are fp16, not bf16
  float unit_scale;   // a score in natural units / a score as the kernel keeps it
  float* partial;     // [results, rows, dim]
  float* statistics;  // [results, kStatistics, rows]: maximum, sum; of SkippedMass: maximum, sum
  int* dropped;       // [results]: skipped tiles
};

// What is compiled into a kernel.
enum class Variant {
  kDense,   // no tile test
  kSparse,  // tile test
  kReport,  // the same with tile bits, gaps and dropped mass
};

// What keys and values are stored as.
enum class Cache {
  kOfQueries,
  kInt8,
  kFloat8,
  kInt8Keys,  // and values as queries
};
constexpr bool narrow_keys(Cache cache) { return cache != Cache::kOfQueries; }
constexpr bool narrow_values(Cache cache) {
  return cache == Cache::kInt8 || cache == Cache::kFloat8;
}

inline constexpr int kTileKeys = 64;
inline constexpr int kStatistics = 4;
inline constexpr int kMaxRows = 64;  // query rows of a KV head

}  // namespace blasst::cuda::decode
