// The compiled kernels, by what they are specialised for.
#pragma once

#include "cuda/core/tensor.h"

namespace blasst::cuda::backward {

struct Kernel {
  const void* function;
  int shared_bytes;
  int threads;  // of a block
};

// capped: scores have a soft cap. Supported by plan.h.
Kernel find_kernel(Element element, int qk_dim, int value_dim, bool capped);

// One for each pair of dimensions, compiled apart.
template <int kQkDim, int kValueDim>
Kernel find_kernel_of(Element element, bool capped);
template <>
Kernel find_kernel_of<64, 64>(Element element, bool capped);
template <>
Kernel find_kernel_of<128, 128>(Element element, bool capped);
template <>
Kernel find_kernel_of<192, 128>(Element element, bool capped);
template <>
Kernel find_kernel_of<256, 256>(Element element, bool capped);

}  // namespace blasst::cuda::backward
