// The compiled kernels, by what they are specialised for.
#pragma once

#include "cuda/sm90/prefill/launch.h"

namespace blasst::cuda::prefill {

// Of queries and keys with qk_dim elements and values with value_dim; supported by plan.h.
Kernel find_kernel(Element element, int qk_dim, int value_dim, Scores scores, Variant variant);

// One for each pair of dimensions and arithmetic of the scores, compiled apart.
template <int kQkDim, int kValueDim, Scores kScores>
Kernel find_kernel_of(Element element, Variant variant);

#define BLASST_DECLARE(qk, value, scores) \
  template <>                             \
  Kernel find_kernel_of<qk, value, Scores::scores>(Element element, Variant variant);
BLASST_DECLARE(64, 64, kExact)
BLASST_DECLARE(64, 64, kInt8)
BLASST_DECLARE(128, 128, kExact)
BLASST_DECLARE(128, 128, kInt8)
BLASST_DECLARE(192, 128, kExact)
BLASST_DECLARE(256, 256, kExact)
BLASST_DECLARE(256, 256, kInt8)
#undef BLASST_DECLARE

}  // namespace blasst::cuda::prefill
