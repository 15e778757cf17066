// Row operations of the chunk predictor: widening, dot products, small matrix products.
#if defined(BLASST_CPU_CHUNKS_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_CHUNKS_ROWS_INL_H_
#undef BLASST_CPU_CHUNKS_ROWS_INL_H_
#else
#define BLASST_CPU_CHUNKS_ROWS_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/arithmetic/convert-inl.h"
#include "cpu/kernels.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

template <DType kStored>
void Widen(const std::byte* row, int64_t count, float* to) {
  LoadFloats(kStored, row, count, to);
}

inline void AddTo(const float* HWY_RESTRICT row, int64_t count, float* HWY_RESTRICT sum) {
  const hn::CappedTag<float, 8> f8;
  for (int64_t i = 0; i < count; i += hn::Lanes(f8))
    hn::StoreU(hn::Add(hn::LoadU(f8, sum + i), hn::LoadU(f8, row + i)), f8, sum + i);
}

inline void Dots(const float* HWY_RESTRICT q, const float* HWY_RESTRICT rows, int64_t stride,
                 int64_t count, int64_t dim, float* HWY_RESTRICT out) {
  const hn::CappedTag<float, 8> f8;
  using V8 = hn::Vec<decltype(f8)>;
  constexpr int kRows = 4;
  for (int64_t first = 0; first < count; first += kRows) {
    const float* at[kRows];
    for (int r = 0; r < kRows; ++r) at[r] = rows + std::min(first + r, count - 1) * stride;
    V8 sums[kRows];
    for (V8& x : sums) x = hn::Zero(f8);
    for (int64_t d = 0; d < dim; d += hn::Lanes(f8)) {
      const V8 words = hn::LoadU(f8, q + d);
      for (int r = 0; r < kRows; ++r)
        sums[r] = hn::MulAdd(words, hn::LoadU(f8, at[r] + d), sums[r]);
    }
    for (int64_t r = 0; r < std::min<int64_t>(kRows, count - first); ++r)
      out[first + r] = hn::GetLane(hn::SumOfLanes(f8, sums[r]));
  }
}

inline void Affine(const float* HWY_RESTRICT x, int64_t rows, int64_t inputs,
                   const float* HWY_RESTRICT weight, const float* HWY_RESTRICT bias,
                   int64_t outputs, float* HWY_RESTRICT y) {
  constexpr int kRows = 4, kVectors = 32 / kLanes;
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t count = std::min<int64_t>(kRows, rows - first);
    const float* at[kRows];
    for (int r = 0; r < kRows; ++r) at[r] = x + (first + std::min<int64_t>(r, count - 1)) * inputs;
    for (int64_t o = 0; o < outputs; o += 32) {
      V sums[kRows][kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const V start = bias ? hn::LoadU(f, bias + o + v * kLanes) : hn::Zero(f);
        for (int r = 0; r < kRows; ++r) sums[r][v] = start;
      }
      for (int64_t i = 0; i < inputs; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          const V w = hn::LoadU(f, weight + i * outputs + o + v * kLanes);
          for (int r = 0; r < kRows; ++r)
            sums[r][v] = hn::MulAdd(hn::Set(f, at[r][i]), w, sums[r][v]);
        }
      }
      for (int64_t r = 0; r < count; ++r) {
        for (int v = 0; v < kVectors; ++v)
          hn::StoreU(sums[r][v], f, y + (first + r) * outputs + o + v * kLanes);
      }
    }
  }
}

template <DType kStored>
ChunkKernels AllChunkKernels() {
  return {&Widen<kStored>, &AddTo, &Dots, &Affine};
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
