// The compiled kernels, by what they are specialised for.
#pragma once

#include "cuda/sm90/decode/launch.h"

namespace blasst::cuda::decode {

struct Kernels {
  const void* attend;
  int shared_bytes;
  int threads;  // a block
  int blocks;   // a multiprocessor
  const void* combine;
};

// Of queries and keys with qk_dim elements and values with value_dim; element: of queries; rows: of
// a KV head, 1 to kMaxRows.
Kernels find_kernels(Element element, Cache cache, int qk_dim, int value_dim, int rows,
                     Variant variant);

// One for each pair of dimensions and type of cache, compiled apart.
template <int kQkDim, int kValueDim, Cache kCache>
Kernels find_kernels_of(Element element, int rows, Variant variant);
template <>
Kernels find_kernels_of<64, 64, Cache::kOfQueries>(Element element, int rows, Variant variant);
template <>
Kernels find_kernels_of<64, 64, Cache::kInt8>(Element element, int rows, Variant variant);
template <>
Kernels find_kernels_of<64, 64, Cache::kFloat8>(Element element, int rows, Variant variant);
template <>
Kernels find_kernels_of<128, 128, Cache::kOfQueries>(Element element, int rows, Variant variant);
template <>
Kernels find_kernels_of<128, 128, Cache::kInt8>(Element element, int rows, Variant variant);
template <>
Kernels find_kernels_of<128, 128, Cache::kFloat8>(Element element, int rows, Variant variant);
template <>
Kernels find_kernels_of<128, 128, Cache::kInt8Keys>(Element element, int rows, Variant variant);
template <>
Kernels find_kernels_of<192, 128, Cache::kOfQueries>(Element element, int rows, Variant variant);
template <>
Kernels find_kernels_of<256, 256, Cache::kOfQueries>(Element element, int rows, Variant variant);
template <>
Kernels find_kernels_of<256, 256, Cache::kInt8>(Element element, int rows, Variant variant);
template <>
Kernels find_kernels_of<256, 256, Cache::kFloat8>(Element element, int rows, Variant variant);

}  // namespace blasst::cuda::decode
