// The inner product of prefill and backward: a block of broadcast words times a panel of vectors.
#if defined(BLASST_CPU_TILE_PRODUCT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_TILE_PRODUCT_INL_H_
#undef BLASST_CPU_TILE_PRODUCT_INL_H_
#else
#define BLASST_CPU_TILE_PRODUCT_INL_H_
#endif

#include "cpu/arithmetic/vector-inl.h"
#include "cpu/plan.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

// Register tile of every product: kBroadcasts words times kPanel rows.
inline constexpr int kBroadcasts = 8;
inline constexpr int kPanelVectors = HWY_TARGET == HWY_AVX3 ? 2 : 1;
inline constexpr int kPanel = kPanelVectors * kLanes;  // rows
static_assert(kQueryRows % kPanel == 0 && kKeys % kPanel == 0 && kQueryRows % kBroadcasts == 0 &&
              kKeys % kBroadcasts == 0);

using Accumulators = V[kBroadcasts][kPanelVectors];

HWY_INLINE void Clear(Accumulators& sums) {
  for (auto& row : sums)
    for (V& x : row) x = hn::Zero(f);
}

// sums[b][v] += word[b] of the broadcast side times row vector v, over `depth` steps.
template <typename A>
HWY_INLINE void Multiply(const float* HWY_RESTRICT words, int64_t word_stride, int64_t step_stride,
                         const float* HWY_RESTRICT rows, int64_t row_stride, int64_t depth,
                         Accumulators& sums) {
  for (int64_t step = 0; step < depth; ++step) {
    V row[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v)
      row[v] = hn::Load(f, rows + step * row_stride + v * kLanes);
    for (int b = 0; b < kBroadcasts; ++b) {
      const V word = hn::Set(f, words[step * step_stride + b * word_stride]);
      for (int v = 0; v < kPanelVectors; ++v) sums[b][v] = A::MulAdd(word, row[v], sums[b][v]);
    }
  }
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
