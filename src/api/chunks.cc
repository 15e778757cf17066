// The C functions of chunks.h.
#include "chunks/chunks.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <span>

#include "api/guard.h"
#include "blasst/chunks.h"
#include "problem/checks.h"

namespace {

using namespace blasst;
using api::guarded;
using api::require;
using api::set_defaults;
using problem::check_struct_size;

template <typename T>
void check_struct(const T* value, const char* name) {
  require(value, name);
  check_struct_size(name, value->struct_size, sizeof *value);
}

// What the caller's chunks are, for rows of so many elements.
ChunkView view_of(const blasst_chunks* chunks, int64_t row_elements) {
  check_struct(chunks, "chunks");
  problem::check_range("chunks.count", chunks->count, 0, problem::kMaxCount);
  if (chunks->count > 0) {
    require(chunks->starts, "chunks.starts");
    require(chunks->sums, "chunks.sums");
  }
  const auto count = static_cast<std::size_t>(chunks->count);
  return {chunks->keys, {chunks->starts, count}, {chunks->sums, count * row_elements}};
}

void check_rule(const blasst_chunk_rule* rule) {
  check_struct(rule, "rule");
  if (rule->predictor) check_struct(rule->predictor, "predictor");
}

// Elements of a row of all heads, of rows that are valid so far.
int64_t row_elements(const blasst_head_rows* rows, int64_t heads) {
  problem::check_range("heads", heads, 1, 1 << 20);
  problem::check_range("head_dim", rows->head_dim, 1, problem::kMaxCount);
  return heads * rows->head_dim;
}

template <typename T>
const T* copy_of(const std::vector<T>& values) {
  auto copy = std::make_unique<T[]>(values.size());
  std::ranges::copy(values, copy.get());
  return copy.release();
}

}  // namespace

extern "C" {

void blasst_head_rows_init(blasst_head_rows* rows) { set_defaults(rows); }
void blasst_boundary_predictor_init(blasst_boundary_predictor* p) { set_defaults(p); }
void blasst_chunk_rule_init(blasst_chunk_rule* rule) { set_defaults(rule); }
void blasst_chunks_init(blasst_chunks* chunks) { set_defaults(chunks); }
void blasst_chunk_budget_init(blasst_chunk_budget* budget) { set_defaults(budget); }

blasst_status blasst_chunks_next(const blasst_chunks* chunks, const blasst_chunk_rule* rule,
                                 const blasst_head_rows* keys, int32_t threads,
                                 blasst_chunks* next) {
  return guarded([&] {
    check_rule(rule);
    check_struct(keys, "keys");
    check_struct(next, "next");
    const ChunkView known = view_of(chunks, row_elements(keys, keys->heads));
    const Chunks made = chunks::next(known, *rule, *keys, threads);
    std::unique_ptr<const int32_t[]> starts(copy_of(made.starts));
    const float* sums = copy_of(made.sums);
    *next = {.keys = made.keys,
             .count = static_cast<int64_t>(made.starts.size()),
             .starts = starts.release(),
             .sums = sums};
  });
}

void blasst_chunks_free(blasst_chunks* chunks) {
  if (!chunks) return;
  delete[] chunks->starts;
  delete[] chunks->sums;
  *chunks = {};
}

blasst_status blasst_chunks_scores(const blasst_chunk_rule* rule, const blasst_head_rows* keys,
                                   int64_t begin, int64_t end, int32_t threads, float* scores) {
  return guarded([&] {
    check_rule(rule);
    check_struct(keys, "keys");
    const std::vector<float> found = chunks::scores(*rule, *keys, begin, end, threads);
    if (!found.empty()) require(scores, "scores");
    std::ranges::copy(found, scores);
  });
}

blasst_status blasst_chunks_select(const blasst_chunks* chunks, int64_t kv_heads,
                                   const blasst_head_rows* queries, int32_t decode,
                                   const blasst_chunk_budget* budget, int32_t threads,
                                   uint8_t* blocks) {
  return guarded([&] {
    check_struct(queries, "queries");
    check_struct(budget, "budget");
    problem::check_range("decode", decode, 0, 1);
    const ChunkView known = view_of(chunks, row_elements(queries, kv_heads));
    chunks::select(known, kv_heads, *queries, decode != 0, *budget, blocks, threads);
  });
}

}  // extern "C"
