// What the parts of the prefill kernel share.
#pragma once

#include "cuda/core/prefill/params.h"
#include "cuda/sm90/core/ring.cuh"
#include "cuda/sm90/prefill/layout.cuh"
#include "cuda/sm90/prefill/place.cuh"

namespace blasst::cuda::prefill {

template <typename T, int kQkDim_, int kValueDim_, Scores kScores_, Variant kVariant_>
struct Config {
  using Element = T;
  using Layout = prefill::Layout<kQkDim_, kValueDim_, kScores_, kVariant_ != Variant::kDense>;
  using Shared = typename Layout::Shared;
  using Place = ThreadPlace;
  static constexpr int kQkDim = kQkDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr int kKeys = Layout::kKeys;
  static constexpr int kRowsPerBlock = Layout::kRowsPerBlock;
  static constexpr bool kInt8 = kScores_ == Scores::kInt8;
  static constexpr Variant kVariant = kVariant_;
  static constexpr bool kTests = kVariant_ != Variant::kDense;
};

// The next item, or the end, for a thread that serves the warpgroups.
template <typename Shared>
__device__ __forceinline__ Work take_work(Shared& s, Ring<2>& works) {
  ptx::mbarrier_wait(address(s.barriers.work_full[works.stage]), works.phase);
  const Work w = s.work[works.stage];
  ptx::mbarrier_arrive(address(s.barriers.work_empty[works.stage]));
  works.next();
  return w;
}

}  // namespace blasst::cuda::prefill
