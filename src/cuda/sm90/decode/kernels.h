// The compiled kernels, by what they are specialised for.
#pragma once

#include "cuda/sm90/decode/launch.h"

namespace blasst::cuda::decode {

struct Kernels {
  const void* attend;
  int shared_bytes;
  int blocks;  // a multiprocessor
  const void* combine;
};

// dim: 64, 128 or 256; rows: of a KV head, 1 to kMaxRows.
Kernels find_kernels(Element element, int dim, int rows, Variant variant);

// One for each head dimension, compiled apart.
Kernels find_kernels_64(Element element, int rows, Variant variant);
Kernels find_kernels_128(Element element, int rows, Variant variant);
Kernels find_kernels_256(Element element, int rows, Variant variant);

}  // namespace blasst::cuda::decode
