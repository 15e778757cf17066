// What launching a prefill kernel is on every architecture.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/core/prefill/batch.h"
#include "cuda/core/prefill/launch.h"
#include "cuda/core/prefill/rows.cuh"
#include "cuda/core/runtime.h"

namespace blasst::cuda::prefill {

// prepare(params, items), of the most items that there can be, does all that can fail on the host,
// before the first write; what it returns enqueues the kernel. block_rows: of an item.
template <typename Prepare>
void launch_items(const Launch& l, int block_rows, const Prepare& prepare) {
  Params p = l.params;
  const auto stream = static_cast<cudaStream_t>(l.stream);
  const int items = p.rows == 0 ? 0 : plan_work(p, l, block_rows);
  if (items == 0) return clear_report(p, stream);
  const auto enqueue_kernel = prepare(p, items);
  clear_report(p, stream);
  if (p.first_block)
    list_blocks(p, block_rows, stream);
  else
    clear(p.next_item, sizeof(int), stream);
  enqueue_kernel();
  if (may_be_padded(p)) clear_padding(p, l.value_dim, stream);
}

}  // namespace blasst::cuda::prefill
