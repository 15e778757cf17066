// The compiled kernels, by what they are specialised for.
#pragma once

#include "cuda/core/prefill/launch.h"

namespace blasst::cuda::prefill::sm80 {

// Of queries and keys with qk_dim elements and values with value_dim; supported by plan.h.
Kernel find_kernel(Element element, int qk_dim, int value_dim, Variant variant);

// One for each pair of dimensions, compiled apart.
template <int kQkDim, int kValueDim>
Kernel find_kernel_of(Element element, Variant variant);

#define BLASST_DECLARE(qk, value) \
  template <>                     \
  Kernel find_kernel_of<qk, value>(Element element, Variant variant);
BLASST_DECLARE(64, 64)
BLASST_DECLARE(96, 64)
BLASST_DECLARE(96, 96)
BLASST_DECLARE(128, 128)
BLASST_DECLARE(192, 128)
BLASST_DECLARE(256, 256)
#undef BLASST_DECLARE

}  // namespace blasst::cuda::prefill::sm80
