#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/core/prefill/frame.h"
#include "cuda/core/runtime.h"
#include "cuda/sm80/prefill/config.cuh"
#include "cuda/sm80/prefill/kernels.h"
#include "cuda/sm80/prefill/launch.h"

namespace blasst::cuda::prefill::sm80 {

void launch(const Launch& l) {
  launch_items(l, rows_per_block(l.value_dim), [&](const Params& p, int items) {
    const Kernel kernel = find_kernel(l.element, l.qk_dim, l.value_dim, l.variant);
    allow_shared_memory(kernel.function, kernel.shared_bytes);
    const int blocks =
        std::min(items, resident_blocks(kernel.function, kernel.threads, kernel.shared_bytes));
    return [&l, &p, kernel, blocks] {
      const Sources sources{l.q, l.k, l.v};
      enqueue(kernel.function, blocks, kernel.threads, kernel.shared_bytes,
              static_cast<cudaStream_t>(l.stream), {&p, &sources});
    };
  });
}

}  // namespace blasst::cuda::prefill::sm80
