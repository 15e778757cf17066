// Backward for compute capability 9.0. docs/kernels/sm90-backward.md draws the schedule.
//
// A block of threads finds dk and dv of a key tile, or dq of two query tiles: one warp feeds shared
// memory, two warpgroups multiply. Nothing is added up between blocks of threads, so that every
// run gives the same bits.
#pragma once

#include "cuda/sm90/backward/consume.cuh"
#include "cuda/sm90/backward/produce.cuh"

namespace blasst::cuda::backward {

template <typename L>
__device__ __forceinline__ void init_barriers(typename L::Shared& s) {
  auto& b = s.barriers;
  ptx::mbarrier_init(address(b.fixed_full), 1);
  for (int i = 0; i < L::kFirstStages; ++i) {
    ptx::mbarrier_init(address(b.first_full[i]), 1);
    ptx::mbarrier_init(address(b.first_empty[i]), L::kConsumerWarps);
  }
  for (int i = 0; i < L::kSecondStages; ++i) {
    ptx::mbarrier_init(address(b.second_full[i]), 1);
    ptx::mbarrier_init(address(b.second_empty[i]), L::kConsumerWarps);
  }
  for (int i = 0; i < L::kHandovers; ++i) {
    ptx::mbarrier_init(address(b.weights_full[i]), L::kConsumerWarps / kWarpgroups);
    ptx::mbarrier_init(address(b.weights_empty[i]), L::kConsumerWarps / kWarpgroups);
  }
  ptx::fence_mbarrier_init();
}

template <typename L, typename T>
__device__ __forceinline__ void find_gradients(const Params& b, uint8_t* memory, const Maps& maps,
                                               int index) {
  auto& s = *reinterpret_cast<typename L::Shared*>(memory);
  if (threadIdx.x == 0) {
    s.work = find_work<L::kSide>(b, index, L::kTileKeys, L::kQkDim + L::kValueDim);
    init_barriers<L>(s);
  }
  __syncthreads();
  if (!s.work.any) return;
  if (threadIdx.x < 128) {
    ptx::lower_registers<L::kProducerRegisters>();
    if (ptx::warp_uniform(threadIdx.x / 32) == 0) Producer<L>(b, s, maps).run();
  } else {
    ptx::raise_registers<L::kConsumerRegisters>();
    Consumer<L, T>(b, s).run();
  }
}

// The first `key_blocks` blocks of threads find dk and dv, those after them dq.
template <typename T, int kQkDim, int kValueDim, bool kCapped>
__global__ void __launch_bounds__(128 * (1 + kWarpgroups), 1)
    differentiate(const __grid_constant__ Params b, const __grid_constant__ CUtensorMap query_map,
                  const __grid_constant__ CUtensorMap dout_map,
                  const __grid_constant__ CUtensorMap key_map,
                  const __grid_constant__ CUtensorMap value_map, int key_blocks) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const Maps maps = {&query_map, &dout_map, &key_map, &value_map};
  const int index = blockIdx.x;
  if (index < key_blocks)
    find_gradients<Layout<Side::kKeys, kQkDim, kValueDim, kCapped>, T>(b, memory, maps, index);
  else
    find_gradients<Layout<Side::kQueries, kQkDim, kValueDim, kCapped>, T>(b, memory, maps,
                                                                          index - key_blocks);
}

}  // namespace blasst::cuda::backward
