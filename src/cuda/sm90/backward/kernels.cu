// Instantiates the kernels of one pair of dimensions, BLASST_QK_DIM and BLASST_VALUE_DIM.
#include <algorithm>
#include <cstddef>

#include "cuda/sm90/backward/kernel.cuh"
#include "cuda/sm90/backward/kernels.h"

namespace blasst::cuda::backward {
namespace {

template <typename T, bool kCapped>
Kernel kernel() {
  using Keys = Layout<Side::kKeys, BLASST_QK_DIM, BLASST_VALUE_DIM, kCapped>;
  using Queries = Layout<Side::kQueries, BLASST_QK_DIM, BLASST_VALUE_DIM, kCapped>;
  constexpr std::size_t bytes =
      std::max(sizeof(typename Keys::Shared), sizeof(typename Queries::Shared));
  return {
      reinterpret_cast<const void*>(&differentiate<T, BLASST_QK_DIM, BLASST_VALUE_DIM, kCapped>),
      static_cast<int>(bytes), Keys::kThreads};
}

template <typename T>
Kernel kernel(bool capped) {
  return capped ? kernel<T, true>() : kernel<T, false>();
}

}  // namespace

template <>
Kernel find_kernel_of<BLASST_QK_DIM, BLASST_VALUE_DIM>(Element element, bool capped) {
  return element == Element::kHalf ? kernel<__half>(capped) : kernel<__nv_bfloat16>(capped);
}

}  // namespace blasst::cuda::backward
