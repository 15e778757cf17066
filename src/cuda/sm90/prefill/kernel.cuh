// Prefill attention for compute capability 9.0. docs/kernels/sm90-prefill.md draws the schedule.
//
// A block owns 128 or 192 query rows of one head at a time: warpgroup 0 feeds shared memory, each
// of the others owns 64 rows and decides on its own. While a warpgroup turns the scores of one tile
// into probabilities, the tensor cores compute its scores of the next.
#pragma once

#include "cuda/sm90/prefill/consume.cuh"
#include "cuda/sm90/prefill/produce.cuh"
#include "cuda/sm90/prefill/store.cuh"

namespace blasst::cuda::prefill {

template <typename C>
__device__ void init_barriers(typename C::Shared& s) {
  using L = typename C::Layout;
  auto& b = s.barriers;
  ptx::mbarrier_init(address(b.query_full), 1);
  ptx::mbarrier_init(address(b.query_empty), L::kConsumerWarps);
  for (int i = 0; i < L::kKeyStages; ++i) {
    for (int part = 0; part < L::kKeyParts; ++part) {
      ptx::mbarrier_init(address(b.key_full[i][part]), 1);
      ptx::mbarrier_init(address(b.key_empty[i][part]), L::kConsumerWarps);
    }
  }
  for (auto& barrier : b.settled) ptx::mbarrier_init(address(barrier), 1);
  for (int i = 0; i < L::kValueStages; ++i) {
    for (int wg = 0; wg < L::kWarpgroups; ++wg) s.decision[i][wg] = -1;
  }
  for (int i = 0; i < L::kValueBarriers; ++i) {
    ptx::mbarrier_init(address(b.value_full[i]), 1);
    ptx::mbarrier_init(address(b.value_done[i]), L::kConsumerWarps);
  }
  for (int wg = 0; wg < L::kWarpgroups; ++wg) {
    ptx::mbarrier_init(address(b.output_full[wg]), 4);  // its warps
    ptx::mbarrier_init(address(b.output_empty[wg]), 1);
  }
  for (int i = 0; i < 2; ++i) {
    ptx::mbarrier_init(address(b.work_full[i]), 1);
    ptx::mbarrier_init(address(b.work_empty[i]),
                       L::kConsumerWarps + L::kValueStages + L::kStagedOutputs);
  }
  ptx::fence_mbarrier_init();
}

template <typename C>
__global__ void __launch_bounds__(C::Layout::kThreads, 1)
    attend(const __grid_constant__ Params p, const __grid_constant__ CUtensorMap query_map,
           const __grid_constant__ CUtensorMap key_map,
           const __grid_constant__ CUtensorMap value_map,
           const __grid_constant__ CUtensorMap output_map) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& s = *reinterpret_cast<typename C::Shared*>(memory);
  if (threadIdx.x == 0) {
    init_barriers<C>(s);
    ptx::prefetch_tensor_map(&query_map);
    ptx::prefetch_tensor_map(&key_map);
    ptx::prefetch_tensor_map(&value_map);
    ptx::prefetch_tensor_map(&output_map);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::lower_registers<C::Layout::kProducerRegisters>();
    const int warp = ptx::warp_uniform(threadIdx.x / 32);
    if (threadIdx.x % 32 == 0) {
      if (warp == 0)
        produce_keys<C>(p, s, &query_map, &key_map);
      else if (warp <= C::Layout::kValueStages)
        produce_values<C>(p, s, &value_map, warp - 1);
      else if (C::Layout::kStagedOutputs)
        store_outputs<C>(p, s, &output_map);
    }
  } else {
    ptx::raise_registers<C::Layout::kConsumerRegisters>();
    Consumer<C>(p, s).run();
  }
}

}  // namespace blasst::cuda::prefill
