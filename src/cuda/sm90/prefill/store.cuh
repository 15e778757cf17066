// Outputs from shared memory to where they belong, while their warpgroup begins the next item.
#pragma once

#include "cuda/core/prefill/rows.cuh"
#include "cuda/core/prefill/work.cuh"
#include "cuda/sm90/core/ring.cuh"
#include "cuda/sm90/prefill/config.cuh"

namespace blasst::cuda::prefill {

// Whether a query tile leaves through shared memory: a copy does not stop at a request's last row.
template <typename C>
__device__ __forceinline__ bool is_staged(QueryTile q) {
  return C::Layout::kStagedOutputs && q.rows == kQueryTileRows;
}

// Copies what the warpgroups leave. One thread.
template <typename C>
__device__ void store_outputs(const Params& p, typename C::Shared& s, const CUtensorMap* map) {
  using L = typename C::Layout;
  auto& b = s.barriers;
  Ring<2> works;
  unsigned phases = 0;  // bit wg: of the warpgroup's next outputs
  for (;;) {
    const Work w = take_work(s, works);
    if (w.rows == 0) break;
    const int row = row_in_tensor(p, w.request, w.output_row);
    const int outer = p.cu_seqlens_q ? 0 : w.request;
    for (int wg = 0; wg < L::kWarpgroups; ++wg) {
      if (!is_staged<C>(query_tile_of(w, wg))) continue;
      ptx::mbarrier_wait(address(b.output_full[wg]), phases >> wg & 1);
      phases ^= 1u << wg;
      for (int panel = 0; panel < L::Outputs::kCount; ++panel) {
        ptx::store_box(map, ptx::shared_address(s.output[wg]) + panel * L::Outputs::kPanelBytes,
                       panel * kPanel, row + wg * kQueryTileRows, w.head, outer);
      }
      ptx::commit_stores();
      ptx::wait_stores_read();
      ptx::mbarrier_arrive(address(b.output_empty[wg]));
    }
  }
  ptx::wait_stores();
}

}  // namespace blasst::cuda::prefill
