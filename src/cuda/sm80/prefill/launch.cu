#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/core/prefill/batch.h"
#include "cuda/core/prefill/rows.cuh"
#include "cuda/core/runtime.h"
#include "cuda/sm80/prefill/config.cuh"
#include "cuda/sm80/prefill/kernels.h"
#include "cuda/sm80/prefill/launch.h"

namespace blasst::cuda::prefill::sm80 {

// All that can fail on the host comes before the first write.
void launch(const Launch& l) {
  Params p = l.params;
  const auto stream = static_cast<cudaStream_t>(l.stream);
  const int block_rows = rows_per_block(l.value_dim);
  const int items = p.rows == 0 ? 0 : plan_work(p, l, block_rows);
  if (items == 0) return clear_report(p, stream);

  const Sources sources{l.q, l.k, l.v};
  const Kernel kernel = find_kernel(l.element, l.qk_dim, l.value_dim, l.variant);
  allow_shared_memory(kernel.function, kernel.shared_bytes);
  const int blocks =
      std::min(items, resident_blocks(kernel.function, kernel.threads, kernel.shared_bytes));

  clear_report(p, stream);
  if (p.first_block)
    list_blocks(p, block_rows, stream);
  else
    clear(p.next_item, sizeof(int), stream);
  enqueue(kernel.function, blocks, kernel.threads, kernel.shared_bytes, stream, {&p, &sources});
  if (may_be_padded(p)) clear_padding(p, l.value_dim, stream);
}

}  // namespace blasst::cuda::prefill::sm80
