// Instantiates the kernels of one head dimension, BLASST_PREFILL_DIM.
#include "cuda/sm90/prefill/kernel.cuh"
#include "cuda/sm90/prefill/kernels.h"

namespace blasst::cuda::prefill {
namespace {

template <typename T, Variant kVariant>
Kernel kernel() {
  using C = Config<T, BLASST_PREFILL_DIM, kVariant>;
  return {reinterpret_cast<const void*>(&attend<C>), sizeof(typename C::Shared),
          C::Layout::kThreads};
}

template <typename T>
Kernel kernel(Variant variant) {
  switch (variant) {
    case Variant::kDense:
      return kernel<T, Variant::kDense>();
    case Variant::kSparse:
      return kernel<T, Variant::kSparse>();
    case Variant::kReport:
      return kernel<T, Variant::kReport>();
  }
  __builtin_unreachable();
}

}  // namespace

#define BLASST_JOIN_(a, b) a##b
#define BLASST_JOIN(a, b) BLASST_JOIN_(a, b)
Kernel BLASST_JOIN(find_kernel_, BLASST_PREFILL_DIM)(Element element, Variant variant) {
  return element == Element::kHalf ? kernel<__half>(variant) : kernel<__nv_bfloat16>(variant);
}

}  // namespace blasst::cuda::prefill
