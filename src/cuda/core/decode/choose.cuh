// From the run-time properties of a call to what a kernel is compiled for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/core/decode/params.h"
#include "cuda/core/decode/splits.h"
#include "cuda/core/tensor.h"

namespace blasst::cuda::decode {

// Kernels::of<T, kRows, kVariant>() for the call's.
template <typename Kernels, typename T, int kRows>
auto choose(Variant variant) {
  switch (variant) {
    case Variant::kDense:
      return Kernels::template of<T, kRows, Variant::kDense>();
    case Variant::kSparse:
      return Kernels::template of<T, kRows, Variant::kSparse>();
    case Variant::kReport:
      return Kernels::template of<T, kRows, Variant::kReport>();
  }
  __builtin_unreachable();
}

template <typename Kernels, typename T>
auto choose(int rows, Variant variant) {
  switch (kernel_rows(rows)) {
    case 8:
      return choose<Kernels, T, 8>(variant);
    case 16:
      return choose<Kernels, T, 16>(variant);
    case 32:
      return choose<Kernels, T, 32>(variant);
    default:
      return choose<Kernels, T, 64>(variant);
  }
}

template <typename Kernels>
auto choose(Element element, int rows, Variant variant) {
  return element == Element::kHalf ? choose<Kernels, __half>(rows, variant)
                                   : choose<Kernels, __nv_bfloat16>(rows, variant);
}

}  // namespace blasst::cuda::decode
