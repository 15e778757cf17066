// The compiled kernels, by what they are specialised for.
#pragma once

#include "cuda/sm90/prefill/launch.h"

namespace blasst::cuda::prefill {

struct Kernel {
  const void* function;
  int shared_bytes;
  int threads;  // of a block
};

// dim: 64, 128 or 256.
Kernel find_kernel(Element element, int dim, Variant variant);

// One for each head dimension, compiled apart.
Kernel find_kernel_64(Element element, Variant variant);
Kernel find_kernel_128(Element element, Variant variant);
Kernel find_kernel_256(Element element, Variant variant);

}  // namespace blasst::cuda::prefill
