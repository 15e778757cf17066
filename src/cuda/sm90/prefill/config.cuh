// What the parts of the prefill kernel share.
#pragma once

#include <cstdint>

#include "cuda/sm90/prefill/layout.cuh"
#include "cuda/sm90/prefill/params.h"
#include "cuda/sm90/ptx.cuh"

namespace blasst::cuda::prefill {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

template <typename T, int kDim_, Variant kVariant_>
struct Config {
  using Element = T;
  using Layout = prefill::Layout<kDim_>;
  using Shared = typename Layout::Shared;
  static constexpr int kDim = kDim_;
  static constexpr int kKeys = Layout::kKeys;
  static constexpr bool kTests = kVariant_ != Variant::kDense;
  static constexpr bool kReports = kVariant_ == Variant::kReport;
};

// A position in a ring of stages.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

__device__ __forceinline__ uint32_t address(uint64_t& barrier) {
  return ptx::shared_address(&barrier);
}

}  // namespace blasst::cuda::prefill
