// Which work runs when. Plain functions, the same on the host and in the kernel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/sm90/prefill/params.h"

#if defined(__CUDACC__)
#define BLASST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BLASST_HOST_DEVICE inline
#endif

namespace blasst::cuda::prefill {

// One block of query rows of one head.
struct Item {
  int request, head;
  int block;  // rows [block, block + 1) * rows_per_block(dim)
};

// Items come in sections of request-heads whose keys and values fit in the L2 together; in a
// section the last rows, which see most keys, come first, and the heads of one KV head side by
// side.
BLASST_HOST_DEVICE Item item_at(int index, int batch, int heads, int row_blocks,
                                int section_heads) {
  const int section = index / (section_heads * row_blocks);
  const int first = section * section_heads;
  const int rest = batch * heads - first;
  const int width = section_heads < rest ? section_heads : rest;
  const int within = index - first * row_blocks;
  const int request_head = first + within % width;
  return {request_head / heads, request_head % heads, row_blocks - 1 - within / width};
}

// Request-heads a section: a whole number of KV heads, as many as fit in `l2_bytes`, at least one.
inline int section_heads(int64_t keys, int dim, int batch, int heads, int kv_heads,
                         int64_t l2_bytes) {
  const int64_t group = heads / kv_heads;
  const int64_t kv_bytes = std::max<int64_t>(1, keys * dim * 2 * 2);
  const int64_t fit = std::max<int64_t>(1, l2_bytes / kv_bytes);
  return static_cast<int>(std::min<int64_t>(fit * group, int64_t{batch} * heads));
}

// Keys that the rows at positions [first, last] see, as a half-open range; empty if begin >= end.
struct KeyRange {
  int begin, end;
};

BLASST_HOST_DEVICE KeyRange keys_of(int first, int last, int least, int most, int keys) {
  const int begin = first - most > 0 ? first - most : 0;
  const int end = last - least + 1 < keys ? last - least + 1 : keys;
  return {begin, end};
}

// The visit's i-th tile of [begin, end). order: blasst_order.
BLASST_HOST_DEVICE int tile_at(int order, int begin, int end, int i) {
  if (order == 0) return begin + i;                           // forward
  if (order == 2 && begin == 0) return i == 0 ? 0 : end - i;  // sink first
  return end - 1 - i;                                         // reverse
}

}  // namespace blasst::cuda::prefill
