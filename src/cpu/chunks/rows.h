// What cutting and choosing have in common.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "attention/checks.h"
#include "attention/element.h"
#include "attention/tiles.h"
#include "blasst/chunks.hpp"

namespace blasst::cpu {

inline const std::byte* row_of(const HeadRows& rows, int64_t row, int64_t head) {
  return static_cast<const std::byte*>(rows.data) +
         (row * rows.stride_row + head * rows.stride_head) * attention::element_bytes(rows.dtype);
}

inline void check_rows(std::string_view name, const HeadRows& rows) {
  if (rows.dtype < BLASST_FLOAT32 || rows.dtype > BLASST_BFLOAT16)
    attention::fail("dtype of {} is {}; it must be a blasst_dtype, 0 to 2", name,
                    static_cast<int>(rows.dtype));
  attention::check_range("rows", rows.rows, 0, attention::kMaxCount);
  attention::check_range("heads", rows.heads, 1, 1 << 20);
  if (rows.head_dim < 16 || rows.head_dim > 256 || rows.head_dim % 8 != 0)
    attention::fail("head_dim of {} is {}; it must be a multiple of 8 from 16 to 256", name,
                    rows.head_dim);
  if (!rows.data && rows.rows > 0)
    attention::fail("{} is null, with {} rows to read", name, rows.rows);
}

inline int64_t chunk_end(const ChunkView& chunks, int64_t chunk) {
  const bool last = chunk + 1 == static_cast<int64_t>(chunks.starts.size());
  return last ? chunks.keys : chunks.starts[chunk + 1];
}

// Consecutive chunks that cover the keys.
void check_chunks(const ChunkView& chunks, int64_t kv_heads, int64_t head_dim);

}  // namespace blasst::cpu
