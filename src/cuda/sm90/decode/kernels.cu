// Instantiates the kernels of one head dimension, BLASST_DECODE_DIM.
#include "cuda/sm90/decode/combine.cuh"
#include "cuda/sm90/decode/kernel.cuh"
#include "cuda/sm90/decode/kernels.h"
#include "cuda/sm90/decode/schedule.h"

namespace blasst::cuda::decode {
namespace {

template <typename T, int kRows, Variant kVariant>
Kernels kernels() {
  using L = Layout<BLASST_DECODE_DIM, kRows>;
  return {reinterpret_cast<const void*>(&attend<T, BLASST_DECODE_DIM, kRows, kVariant>),
          sizeof(typename L::Shared), L::kBlocks,
          reinterpret_cast<const void*>(&combine<T, BLASST_DECODE_DIM>)};
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

#define BLASST_JOIN_(a, b) a##b
#define BLASST_JOIN(a, b) BLASST_JOIN_(a, b)
Kernels BLASST_JOIN(find_kernels_, BLASST_DECODE_DIM)(Element element, int rows, Variant variant) {
  return element == Element::kHalf ? kernels<__half>(rows, variant)
                                   : kernels<__nv_bfloat16>(rows, variant);
}

}  // namespace blasst::cuda::decode
