// Chunks of keys and the choice among them, from C++: header only, over chunks.h, which documents
// the structs and what the functions do. Throws Error.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "blasst/blasst.hpp"
#include "blasst/chunks.h"

namespace blasst {

using HeadRows = blasst_head_rows;
using BoundaryPredictor = blasst_boundary_predictor;
using Chunker = blasst_chunker;
using ChunkRule = blasst_chunk_rule;
using ChunkBudget = blasst_chunk_budget;

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

namespace detail {

inline blasst_chunks as_c(const ChunkView& chunks, int64_t row_elements) {
  if (static_cast<int64_t>(chunks.sums.size()) !=
      static_cast<int64_t>(chunks.starts.size()) * row_elements)
    throw Error(BLASST_INVALID_ARGUMENT,
                "the chunks' sums have " + std::to_string(chunks.sums.size()) + " elements; " +
                    std::to_string(chunks.starts.size()) + " chunks of rows of " +
                    std::to_string(row_elements) + " need " +
                    std::to_string(static_cast<int64_t>(chunks.starts.size()) * row_elements));
  return {.keys = chunks.keys,
          .count = static_cast<int64_t>(chunks.starts.size()),
          .starts = chunks.starts.data(),
          .sums = chunks.sums.data()};
}

}  // namespace detail

// What extend_chunks changes: the chunks that take the place of the last one (of none, if there are
// none yet), `keys` as there.
inline Chunks next_chunks(ChunkView chunks, const ChunkRule& rule, const HeadRows& keys,
                          int threads) {
  const int64_t row_elements = keys.heads * keys.head_dim;
  const blasst_chunks known = detail::as_c(chunks, row_elements);
  struct Owned : blasst_chunks {
    ~Owned() { blasst_chunks_free(this); }
  } next;
  detail::check(blasst_chunks_next(&known, &rule, &keys, threads, &next));
  return {.keys = next.keys,
          .starts = {next.starts, next.starts + next.count},
          .sums = {next.sums, next.sums + next.count * row_elements}};
}

// Takes up the keys that are new: `keys` are all of the request's, those of `chunks` first.
inline void extend_chunks(Chunks& chunks, const ChunkRule& rule, const HeadRows& keys,
                          int threads) {
  const Chunks next = next_chunks(chunks, rule, keys, threads);
  const size_t kept = chunks.starts.empty() ? 0 : chunks.starts.size() - 1;
  chunks.keys = next.keys;
  chunks.starts.resize(kept);
  chunks.starts.insert(chunks.starts.end(), next.starts.begin(), next.starts.end());
  chunks.sums.resize(kept * static_cast<size_t>(keys.heads * keys.head_dim));
  chunks.sums.insert(chunks.sums.end(), next.sums.begin(), next.sums.end());
}

// What the chunker compares with its threshold at positions [begin, end) of the keys.
inline std::vector<float> boundary_scores(const ChunkRule& rule, const HeadRows& keys,
                                          int64_t begin, int64_t end, int threads) {
  std::vector<float> scores(begin <= end ? static_cast<size_t>(end - begin) : 0);
  detail::check(blasst_chunks_scores(&rule, &keys, begin, end, threads, scores.data()));
  return scores;
}

// The block mask of a request, causal, its queries at the end of its keys: prefill [heads, query
// tiles, key tiles], decode [kv_heads, key tiles]; 1: visit.
inline void select_tiles(ChunkView chunks, int64_t kv_heads, const HeadRows& queries, bool decode,
                         ChunkBudget budget, uint8_t* blocks, int threads) {
  const blasst_chunks known = detail::as_c(chunks, kv_heads * queries.head_dim);
  detail::check(blasst_chunks_select(&known, kv_heads, &queries, decode, &budget, threads, blocks));
}

}  // namespace blasst
