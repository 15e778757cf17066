// Scores in the precision of q and k, of the 64 rows of a consumer warpgroup. Int8Scores is the
// other one.
#pragma once

#include <cstddef>

#include "cuda/core/fragment.cuh"
#include "cuda/core/online_softmax.cuh"
#include "cuda/sm90/core/ring.cuh"
#include "cuda/sm90/core/wgmma.cuh"
#include "cuda/sm90/prefill/config.cuh"

namespace blasst::cuda::prefill {

template <typename C>
class ExactScores {
  using L = typename C::Layout;
  using Shared = typename C::Shared;
  using Element = typename C::Element;
  static constexpr int kSteps = C::kQkDim / 16;

 public:
  using Score = float;
  using Tile = Score[C::kKeys / 2];  // a thread's share
  static constexpr Score kMasked = -INFINITY;
  // Steps whose queries stay in registers: the others read them from shared memory every time.
  // Three warpgroups, or wider outputs, leave no room for any.
  static constexpr int kHeldSteps = C::kQkDim == 128 || C::kQkDim == 192 ? 8 : 0;
  static constexpr bool kQueriesInRegisters = kHeldSteps == kSteps;

  // This warpgroup's queries, from shared memory, as the first operand of wgmma: for each 16
  // elements of d, 16 x 16 in four 8 x 8 matrices a warp.
  __device__ __forceinline__ void load_queries(const Params&, const Work&, Shared& s,
                                               ThreadPlace at) {
    if constexpr (kHeldSteps > 0) {
      const int lane = at.lane(), row = threadIdx.x % 128 / 32 * 16 + lane % 16;
      const uint32_t base = ptx::shared_address(s.query[at.warpgroup]);
#pragma unroll
      for (int step = 0; step < kHeldSteps; ++step)
        ptx::load_matrices(q_[step],
                           base + place_of_vector<typename L::Queries>(row, 2 * step + lane / 16));
    }
    if constexpr (kQueriesInRegisters) {
      __syncwarp();
      ptx::mbarrier_arrive_if(address(s.barriers.query_empty), at.lane() == 0);
    }
  }

  // t = Q K^T of a key stage, or what one of its parts adds to it. base: address of Shared.
  __device__ __forceinline__ void start(Tile& t, uint32_t base, int warpgroup, int stage,
                                        int part) const {
    const uint64_t q = ptx::advance(ptx::wgmma_descriptor(base + offsetof(Shared, query)),
                                    warpgroup * L::Queries::kBytes);
    const uint64_t k =
        ptx::advance(ptx::wgmma_descriptor(base + offsetof(Shared, key)), stage * L::Keys::kBytes);
    using Product = ptx::Wgmma<Element, C::kKeys>;
#pragma unroll
    for (int i = 0; i < kSteps / L::kKeyParts; ++i) {
      const int step = part * (kSteps / L::kKeyParts) + i;
      const int panel = step / 4, within = step % 4 * 32;
      const uint64_t a = ptx::advance(q, panel * L::Queries::kPanelBytes + within);
      const uint64_t b = ptx::advance(k, panel * L::Keys::kPanelBytes + within);
      if (step < kHeldSteps)
        step == 0 ? Product::first_registers(t, q_[step], b)
                  : Product::add_registers(t, q_[step], b);
      else
        step == 0 ? Product::first(t, a, b) : Product::add(t, a, b);
    }
  }

  // What shared memory holds of a stage beside its keys.
  __device__ __forceinline__ void read_stage(const Shared&, int) {}
  __device__ __forceinline__ bool any_broken() const { return false; }

  // A tile that is not plain: what softmax sees before the mask.
  __device__ __forceinline__ void cap(Tile& t, const Params& p, const Work&, int,
                                      ThreadPlace) const {
    if (p.softcap > 0)
      for_each_rolled<8>(t, [&](float x, int, int) { return tanh_exact(x * p.softcap_scale); });
  }

  __device__ __forceinline__ void maxima(const Tile& t, float (&maximum)[2]) const {
    row_maxima(t, maximum);
  }
  __device__ __forceinline__ void capped_maxima(const Tile& t, float (&maximum)[2]) const {
    maxima(t, maximum);
  }

 private:
  uint32_t q_[kHeldSteps > 0 ? kHeldSteps : 1][4];
};

}  // namespace blasst::cuda::prefill
