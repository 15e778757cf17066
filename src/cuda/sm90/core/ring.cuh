// Stages of shared memory that go round.
#pragma once

#include <cstdint>

#include "cuda/sm90/core/ptx.cuh"

namespace blasst::cuda {

// A position in a ring of stages.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

__device__ __forceinline__ uint32_t address(const uint64_t& barrier) {
  return ptx::shared_address(&barrier);
}

}  // namespace blasst::cuda
