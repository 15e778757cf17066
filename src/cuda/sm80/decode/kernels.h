// The compiled kernels, by what they are specialised for.
#pragma once

#include "cuda/core/decode/launch.h"

namespace blasst::cuda::decode::sm80 {

struct Kernels {
  const void* attend;
  int shared_bytes;  // without stages
  int stage_bytes;
  const void* combine;
};

// Of queries and keys with qk_dim elements and values with value_dim; rows: of a KV head, 1 to
// kMaxRows.
Kernels find_kernels(Element element, int qk_dim, int value_dim, int rows, Variant variant);

// One for each pair of dimensions, compiled apart.
template <int kQkDim, int kValueDim>
Kernels find_kernels_of(Element element, int rows, Variant variant);

#define BLASST_DECLARE(qk, value) \
  template <>                     \
  Kernels find_kernels_of<qk, value>(Element element, int rows, Variant variant);
BLASST_DECLARE(64, 64)
BLASST_DECLARE(96, 64)
BLASST_DECLARE(96, 96)
BLASST_DECLARE(128, 128)
BLASST_DECLARE(192, 128)
BLASST_DECLARE(256, 256)
#undef BLASST_DECLARE

}  // namespace blasst::cuda::decode::sm80
