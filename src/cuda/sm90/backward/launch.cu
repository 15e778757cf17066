#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/core/backward/batch.h"
#include "cuda/core/prefill/batch.h"
#include "cuda/core/prefill/order.h"
#include "cuda/core/prefill/rows.cuh"
#include "cuda/core/runtime.h"
#include "cuda/core/tiles.h"
#include "cuda/sm90/backward/kernels.h"
#include "cuda/sm90/backward/launch.h"
#include "cuda/sm90/backward/shape.h"
#include "cuda/sm90/core/tensor_map.h"
#include "cuda/sm90/prefill/shape.h"

namespace blasst::cuda::backward {
namespace {

// Of the L2's 50 to 60 MB, what the keys and values of the query rows that run side by side may
// take.
constexpr int64_t kSectionBytes = int64_t{32} << 20;

// Boxes of one panel by so many tokens.
CUtensorMap map_of(const Tensor& t, Element element, int tokens) {
  return tensor_map(t, element,
                    {{{t.tokens, t.stride_token, tokens},
                      {t.heads, t.stride_head, 1},
                      {t.outer, t.stride_outer, 1}}},
                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
}

// The parts of the parameters that say who finds dq of what. Returns the most blocks of threads
// that can have work.
int plan_work(prefill::Params& p, const Launch& l) {
  p.row_blocks = ceil_div(p.query_length, kRowsPerBlock);
  if (prefill::rows_differ(p)) {
    p.first_block = p.next_item + 4;
    p.first_query_tile = p.first_block + p.batch + 1;
  }
  p.section_heads =
      prefill::section_heads(p.keys.length, l.qk_dim + l.value_dim, p.first_block ? 1 : p.batch,
                             p.heads, p.kv_heads, kSectionBytes);
  return static_cast<int>(p.heads *
                          prefill::most_blocks(p.rows, p.batch, p.query_length, kRowsPerBlock));
}

}  // namespace

// All that can fail on the host comes before the first write.
void launch(const Launch& l) {
  Params b = l.params;
  prefill::Params& p = b.forward;
  const auto stream = static_cast<cudaStream_t>(l.stream);
  const int row_blocks = plan_work(p, l);
  const bool keys_at_all = p.keys.length > 0 && l.k.tokens > 0 && l.k.outer > 0;
  const int key_blocks = keys_at_all ? p.kv_heads * b.key_tiles + p.heads * b.sum_slots : 0;
  if (row_blocks + key_blocks == 0) {
    if (b.dsinks) clear(b.dsinks, p.heads * sizeof(float), stream);
    return;
  }

  // Where there is nothing, nothing is copied; any tensor will do.
  const Tensor& any = row_blocks > 0 ? l.q : l.k;
  const int box_rows = passing_rows(l.qk_dim);
  const CUtensorMap q = map_of(row_blocks > 0 ? l.q : any, l.element, box_rows);
  const CUtensorMap dout = map_of(row_blocks > 0 ? l.dout : any, l.element, box_rows);
  const CUtensorMap k = map_of(keys_at_all ? l.k : any, l.element, kBlock);
  const CUtensorMap v = map_of(keys_at_all ? l.v : any, l.element, kBlock);
  const Kernel kernel = find_kernel(l.element, l.qk_dim, l.value_dim, p.softcap > 0);
  allow_shared_memory(kernel.function, kernel.shared_bytes);

  if (p.first_block) prefill::list_blocks(p, kRowsPerBlock, stream);
  if (row_blocks > 0) measure_rows(b, l.element, l.value_dim, stream);
  if (b.tile_bits && row_blocks > 0 && keys_at_all)
    list_keepers(b, prefill::tile_keys(l.qk_dim), stream);
  enqueue(kernel.function, key_blocks + row_blocks, kernel.threads, kernel.shared_bytes, stream,
          {&b, &q, &dout, &k, &v, &key_blocks});
  if (keys_at_all && b.sum_slots > 0)
    add_parts(b, l.element, prefill::tile_keys(l.qk_dim), l.qk_dim, l.value_dim, stream);
  clear_unused(b, l.k.outer, l.k.tokens, l.qk_dim, l.value_dim, stream);
  if (b.dsinks) add_sinks(b, stream);
}

}  // namespace blasst::cuda::backward
