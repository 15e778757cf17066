// A prefill call that was planned. No CUDA types, so that any host code may include it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/core/prefill/order.h"
#include "cuda/core/prefill/params.h"
#include "cuda/core/tensor.h"
#include "cuda/core/tiles.h"

namespace blasst::cuda::prefill {

struct Launch {
  Params params;  // plan_work() fills in the work
  Tensor q, k, v;
  Element element;         // of all three, but for keys whose bytes scores in int8 take
  blasst_scales k_scales;  // of those
  int qk_dim, value_dim;   // of queries and keys, of values and outputs
  Scores scores;
  Variant variant;
  int* workspace;  // workspace_bytes() on the device, 16-byte aligned
  void* stream;    // a cudaStream_t
};

// The next item, and room for where the blocks and query tiles of each request begin.
constexpr std::size_t workspace_bytes(int64_t batch) {
  return 16 + 2 * sizeof(int) * (static_cast<std::size_t>(batch) + 1);
}

// A compiled kernel.
struct Kernel {
  const void* function;
  int shared_bytes;
  int threads;  // of a block
};

// The parts of the parameters that say who does what, in items of `block_rows` query rows. Returns
// the most items that there can be.
inline int plan_work(Params& p, const Launch& l, int block_rows) {
  // Of the L2's 40 to 60 MB, what the keys and values of one section may take.
  constexpr int64_t kSectionBytes = int64_t{32} << 20;
  p.next_item = l.workspace;
  p.row_blocks = ceil_div(p.query_length, block_rows);
  if (rows_differ(p)) {
    p.first_block = l.workspace + 4;
    p.first_query_tile = p.first_block + p.batch + 1;
  }
  p.section_heads = section_heads(p.keys.length, l.qk_dim + l.value_dim,
                                  p.first_block ? 1 : p.batch, p.heads, p.kv_heads, kSectionBytes);
  return static_cast<int>(p.heads * most_blocks(p.rows, p.batch, p.query_length, block_rows));
}

}  // namespace blasst::cuda::prefill
