// Decode attention for compute capability 9.0. docs/kernels/sm90-decode.md draws the schedule.
#pragma once

#include "cuda/core/decode/params.h"
#include "cuda/sm90/core/ring.cuh"
#include "cuda/sm90/decode/consume.cuh"
#include "cuda/sm90/decode/layout.cuh"
#include "cuda/sm90/decode/produce.cuh"

namespace blasst::cuda::decode {

// The results of all work items: sums over kept keys, relative to each row's maximum.
template <typename C>
__global__ void __launch_bounds__(C::Layout::kThreads, C::Layout::kBlocks)
    attend(const __grid_constant__ Params p, const __grid_constant__ Plan plan,
           const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
           const __grid_constant__ CUtensorMap v_map) {
  using L = typename C::Layout;
  // The combining kernel takes what room there is, and waits for this grid's writes.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  extern __shared__ __align__(1024) std::byte storage[];
  auto& shared = *reinterpret_cast<typename L::Shared*>(storage);
  const int warp = ptx::warp_uniform(threadIdx.x / 32);
  Producer<L, C::kRows, C::kTests> producer(p, plan, shared, &q_map, &k_map, &v_map);
  if (threadIdx.x == 0) {
    for (auto& barrier : shared.tiles_full) ptx::mbarrier_init(address(barrier), 1);
    for (auto& barrier : shared.keys_full) ptx::mbarrier_init(address(barrier), 1);
    for (auto& barrier : shared.keys_empty) ptx::mbarrier_init(address(barrier), kWarps);
    for (auto& barrier : shared.values_wanted) ptx::mbarrier_init(address(barrier), 1);
    for (auto& barrier : shared.values_full) ptx::mbarrier_init(address(barrier), 1);
    for (auto& barrier : shared.queries_full) ptx::mbarrier_init(address(barrier), 1);
    for (auto& barrier : shared.below_full) ptx::mbarrier_init(address(barrier), 32);
    for (auto& barrier : shared.queries_empty) ptx::mbarrier_init(address(barrier), kConsumers);
    ptx::fence_mbarrier_init();
  }
  if (threadIdx.x == kConsumers) {
    for (const CUtensorMap* map : {&q_map, &k_map, &v_map}) ptx::prefetch_tensor_map(map);
  }
  // Rows that no copy fills stay zero.
  for (int x = threadIdx.x; warp < kWarps && x < 2 * L::Queries::kBytes / 16; x += kConsumers)
    reinterpret_cast<int4*>(shared.queries)[x] = make_int4(0, 0, 0, 0);
  ptx::fence_proxy_async();
  if (warp == kWarps) producer.find_first();
  __syncthreads();
  if (warp == kWarps) {
    producer.run();
  } else if (warp > kWarps) {
    if constexpr (L::kFeedsValues) ValueProducer<L>(plan, shared, &v_map).run();
  } else {
    Consumer<C>(p, plan, shared).run();
  }
}

}  // namespace blasst::cuda::decode
