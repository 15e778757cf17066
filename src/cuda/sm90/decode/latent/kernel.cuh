// Decode over latents for compute capability 9.0. docs/kernels/sm90-mla.md draws the schedule.
#pragma once

#include "cuda/sm90/decode/latent/left.cuh"
#include "cuda/sm90/decode/latent/produce.cuh"
#include "cuda/sm90/decode/latent/right.cuh"

namespace blasst::cuda::decode::latent {

// The results of all splits: sums over kept keys, relative to each row's maximum. p.kv_heads counts
// the parts of the query heads that decide apart.
template <typename C>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attend(const __grid_constant__ Params p, const __grid_constant__ Plan plan,
           const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
           const __grid_constant__ CUtensorMap rotary_map) {
  // The combining kernel takes what room there is, and waits for this grid's writes.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  extern __shared__ __align__(1024) std::byte storage[];
  auto& shared = *reinterpret_cast<Shared*>(storage);
  Producer<C> producer(p, plan, shared, &q_map, &k_map, &rotary_map);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      for (int piece = 0; piece < kPieces; ++piece) {
        ptx::mbarrier_init(address(shared.full[stage][piece]), 1);
        ptx::mbarrier_init(address(shared.empty[stage][piece]), 4);
      }
    }
    ptx::mbarrier_init(address(shared.queries_full), 1);
    ptx::mbarrier_init(address(shared.queries_empty), 4);
    ptx::mbarrier_init(address(shared.message_full), 4);
    ptx::mbarrier_init(address(shared.message_empty), 4);
    ptx::fence_mbarrier_init();
    for (const CUtensorMap* map : {&q_map, &k_map, &rotary_map}) ptx::prefetch_tensor_map(map);
  }
  // Rows that no copy fills stay zero.
  for (int i = threadIdx.x; i < Queries::kBytes / 16; i += kBlockThreads)
    reinterpret_cast<int4*>(shared.queries)[i] = make_int4(0, 0, 0, 0);
  ptx::fence_proxy_async();
  if (threadIdx.x < 32) producer.find_first();
  __syncthreads();
  const int warpgroup = ptx::warp_uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    ptx::lower_registers<kFeedRegisters>();
    if (threadIdx.x < 32) producer.run();
  } else if (warpgroup == 1) {
    ptx::raise_registers<kLeftRegisters>();
    Left<C>(p, plan, shared).run();
  } else {
    ptx::raise_registers<kRightRegisters>();
    Right<C>(plan, shared).run();
  }
}

}  // namespace blasst::cuda::decode::latent
