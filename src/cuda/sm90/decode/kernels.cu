// Instantiates the kernels of one pair of dimensions, BLASST_QK_DIM and BLASST_VALUE_DIM, and one
// Cache, BLASST_CACHE.
#include <type_traits>

#include "cuda/core/decode/combine.cuh"
#include "cuda/core/decode/splits.h"
#include "cuda/sm90/decode/kernel.cuh"
#include "cuda/sm90/decode/kernels.h"

namespace blasst::cuda::decode {
namespace {

constexpr Cache kCache = Cache::BLASST_CACHE;

template <typename T, int kRows, Variant kVariant>
Kernels kernels() {
  using Multiplied = std::conditional_t<kCache == Cache::kOfQueries, T, __half>;
  using C = Config<Multiplied, BLASST_QK_DIM, BLASST_VALUE_DIM, kRows, kVariant, kCache>;
  return {reinterpret_cast<const void*>(&attend<C>), sizeof(typename C::Shared), C::Layout::kBlocks,
          reinterpret_cast<const void*>(&combine<T, BLASST_VALUE_DIM>)};
}

template <typename T, int kRows>
Kernels kernels(Variant variant) {
  switch (variant) {
    case Variant::kDense:
      return kernels<T, kRows, Variant::kDense>();
    case Variant::kSparse:
      return kernels<T, kRows, Variant::kSparse>();
    case Variant::kReport:
      return kernels<T, kRows, Variant::kReport>();
  }
  __builtin_unreachable();
}

template <typename T>
Kernels kernels(int rows, Variant variant) {
  switch (kernel_rows(rows)) {
    case 8:
      return kernels<T, 8>(variant);
    case 16:
      return kernels<T, 16>(variant);
    case 32:
      return kernels<T, 32>(variant);
    default:
      return kernels<T, 64>(variant);
  }
}

}  // namespace

template <>
Kernels find_kernels_of<BLASST_QK_DIM, BLASST_VALUE_DIM, kCache>(Element element, int rows,
                                                                 Variant variant) {
  return element == Element::kHalf ? kernels<__half>(rows, variant)
                                   : kernels<__nv_bfloat16>(rows, variant);
}

}  // namespace blasst::cuda::decode
