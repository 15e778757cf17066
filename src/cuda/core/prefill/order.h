// Which work runs when. Plain functions, the same on the host and in the kernel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/core/host_device.h"

namespace blasst::cuda::prefill {

// One block of query rows of one head.
struct Item {
  int request, head;
  int block;  // of query rows, within the request
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

// The most blocks of all requests: what one counts, a block may lack rows at the end of each
// request.
inline int64_t most_blocks(int64_t rows, int64_t batch, int64_t query_length, int64_t block_rows) {
  return std::min(batch * ((query_length + block_rows - 1) / block_rows),
                  rows / block_rows + batch);
}

// The request with block `block`, of those of all requests. first: [batch + 1], the blocks of the
// requests before.
BLASST_HOST_DEVICE int request_of(const int* first, int batch, int block) {
  int low = 0, high = batch;  // first[low] <= block < first[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first[middle] <= block ? low : high) = middle;
  }
  return low;
}

// The same order where requests differ in rows: their blocks stand side by side like those of one
// request, and a section is of heads.
BLASST_HOST_DEVICE Item item_of_list(int index, const int* first_block, int batch, int heads,
                                     int section_heads) {
  Item item = item_at(index, 1, heads, first_block[batch], section_heads);
  item.request = request_of(first_block, batch, item.block);
  item.block -= first_block[item.request];
  return item;
}

// Request-heads a section: a whole number of KV heads, as many as fit in `l2_bytes`, at least one.
// dims: of a key and a value together.
inline int section_heads(int64_t keys, int dims, int batch, int heads, int kv_heads,
                         int64_t l2_bytes) {
  const int64_t group = heads / kv_heads;
  const int64_t kv_bytes = std::max<int64_t>(1, keys * dims * 2);
  const int64_t fit = std::max<int64_t>(1, l2_bytes / kv_bytes);
  return static_cast<int>(std::min<int64_t>(fit * group, int64_t{batch} * heads));
}

}  // namespace blasst::cuda::prefill
