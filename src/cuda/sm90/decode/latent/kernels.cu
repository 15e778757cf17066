#include "cuda/core/decode/combine.cuh"
#include "cuda/sm90/decode/latent/kernel.cuh"
#include "cuda/sm90/decode/latent/kernels.h"

namespace blasst::cuda::decode::latent {
namespace {

template <typename T, Variant kVariant>
Kernels kernels() {
  return {reinterpret_cast<const void*>(&attend<Config<T, kVariant>>), sizeof(Shared),
          kBlockThreads, 1, reinterpret_cast<const void*>(&combine<T, kValueDim>)};
}

template <typename T>
Kernels kernels(Variant variant) {
  switch (variant) {
    case Variant::kDense:
      return kernels<T, Variant::kDense>();
    case Variant::kSparse:
      return kernels<T, Variant::kSparse>();
    case Variant::kReport:
      return kernels<T, Variant::kReport>();
  }
  __builtin_unreachable();
}

}  // namespace

Kernels find_kernels(Element element, Variant variant) {
  return element == Element::kHalf ? kernels<__half>(variant) : kernels<__nv_bfloat16>(variant);
}

}  // namespace blasst::cuda::decode::latent
