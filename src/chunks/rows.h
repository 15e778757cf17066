// What cutting and choosing have in common.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "blasst/chunks.hpp"
#include "cpu/processors.h"
#include "problem/checks.h"
#include "problem/element.h"
#include "problem/tiles.h"

namespace blasst::chunks {

inline const std::byte* row_of(const HeadRows& rows, int64_t row, int64_t head) {
  return static_cast<const std::byte*>(rows.data) +
         (row * rows.stride_row + head * rows.stride_head) * problem::element_bytes(rows.dtype);
}

inline void check_rows(std::string_view name, const HeadRows& rows) {
  if (rows.dtype < BLASST_FLOAT32 || rows.dtype > BLASST_BFLOAT16)
    problem::fail("dtype of {} is {}; it must be a blasst_dtype, 0 to 2", name,
                  static_cast<int>(rows.dtype));
  problem::check_range("rows", rows.rows, 0, problem::kMaxCount);
  problem::check_range("heads", rows.heads, 1, 1 << 20);
  if (rows.head_dim < 16 || rows.head_dim > 256 || rows.head_dim % 8 != 0)
    problem::fail("head_dim of {} is {}; it must be a multiple of 8 from 16 to 256", name,
                  rows.head_dim);
  problem::check_range("stride_row", rows.stride_row, 0, problem::most_stride(rows.rows));
  problem::check_range("stride_head", rows.stride_head, 0, problem::most_stride(rows.heads));
  problem::check_range("elements", rows.elements, 0, problem::kMaxElements);
  if (rows.rows == 0) return;
  if (!rows.data) problem::fail("{} is null, with {} rows to read", name, rows.rows);
  if (reinterpret_cast<uintptr_t>(rows.data) % problem::element_bytes(rows.dtype) != 0)
    problem::fail("{} is not aligned to its {}-byte elements", name,
                  problem::element_bytes(rows.dtype));
  const int64_t last =
      (rows.rows - 1) * rows.stride_row + (rows.heads - 1) * rows.stride_head + rows.head_dim;
  if (last > rows.elements)
    problem::fail("{} reaches element {} ([{}, {}, {}] with strides {}, {}), but has {}", name,
                  last, rows.rows, rows.heads, rows.head_dim, rows.stride_row, rows.stride_head,
                  rows.elements);
}

inline int64_t chunk_end(const ChunkView& chunks, int64_t chunk) {
  const bool last = chunk + 1 == static_cast<int64_t>(chunks.starts.size());
  return last ? chunks.keys : chunks.starts[chunk + 1];
}

// The number of threads that `threads` stands for.
inline int checked_threads(int threads) {
  problem::check_range("threads", threads, 0, problem::kMaxThreads);
  return cpu::threads_of(threads);
}

// Consecutive chunks that cover the keys.
void check_chunks(const ChunkView& chunks, int64_t kv_heads, int64_t head_dim);

}  // namespace blasst::chunks
