// The compiled kernels, by what they are specialised for.
#pragma once

#include "cuda/sm90/prefill/launch.h"

namespace blasst::cuda::prefill {

struct Kernel {
  const void* function;
  int shared_bytes;
  int threads;  // of a block
};

// Of queries and keys with qk_dim elements and values with value_dim; supported by plan.h.
Kernel find_kernel(Element element, int qk_dim, int value_dim, Variant variant);

// One for each pair of dimensions, compiled apart.
template <int kQkDim, int kValueDim>
Kernel find_kernel_of(Element element, Variant variant);
template <>
Kernel find_kernel_of<64, 64>(Element element, Variant variant);
template <>
Kernel find_kernel_of<128, 128>(Element element, Variant variant);
template <>
Kernel find_kernel_of<256, 256>(Element element, Variant variant);

}  // namespace blasst::cuda::prefill
