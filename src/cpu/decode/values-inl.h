// The outputs of a query tile in decode, [row][element], and a kept key tile's part in them.
#if defined(BLASST_CPU_DECODE_VALUES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_DECODE_VALUES_INL_H_
#undef BLASST_CPU_DECODE_VALUES_INL_H_
#else
#define BLASST_CPU_DECODE_VALUES_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/arithmetic/arithmetic-inl.h"
#include "cpu/decode/fetch-inl.h"
#include "cpu/plan.h"
#include "problem/tiles.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

inline constexpr int kValueVectors =
    HWY_TARGET == HWY_AVX3 ? 4 : 2;  // output vectors of a row in registers

// Outputs lie as A adds them, and A::Wide: element e of a block of kBlock in lane A::Lane(e).
template <typename A>
struct RowOutputs {
  static constexpr int64_t kBlock = A::kPack * kLanes;

  int64_t dim;     // elements of a row
  int64_t stride;  // from one row to the next, whole blocks
  float* o;

  RowOutputs(int64_t rows, int64_t elements, float*& scratch)
      : dim(elements),
        stride(hwy::RoundUpTo(elements, std::max<int64_t>(kBlock, 16))),
        o(std::exchange(scratch, scratch + rows * stride)) {
    std::fill_n(o, rows * stride, 0.0f);
  }

  float Element(int64_t row, int64_t d) const {
    return o[row * stride + d / kBlock * kBlock + A::Lane(static_cast<int>(d % kBlock))];
  }
};

// The elements from d on, padded with zeros to a block.
template <typename A>
void LoadValuesTail(const std::byte* const* rows, int64_t d, int64_t dim, V* words) {
  constexpr int64_t kBytes = kElementBytes<A>;
  alignas(64) std::byte padded[A::kPack][A::kPack * kLanes * kBytes] = {};
  const std::byte* padded_rows[A::kPack];
  for (int i = 0; i < A::kPack; ++i) {
    std::memcpy(padded[i], rows[i] + d * kBytes, (dim - d) * kBytes);
    padded_rows[i] = padded[i];
  }
  A::LoadValues(padded_rows, 0, words);
}

// o[row][d..] = rescale * o + sum over keys of p * v, for kBlocks blocks of elements; kTail: a
// last, short one. `rescale` and `probabilities` begin at the first row.
template <typename A, int kRows, int kBlocks, bool kTail>
HWY_INLINE void AddBlocks(const RowOutputs<typename A::Wide>& outputs, int64_t first, int64_t d,
                          const float* rescale, const float* probabilities, const Rows& values,
                          ValueQueue& queue) {
  constexpr int kVectors = kBlocks * A::kPack;
  float* o = outputs.o + first * outputs.stride + d;
  V sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] =
          hn::Mul(hn::LoadU(f, o + r * outputs.stride + v * kLanes), hn::Set(f, rescale[r]));
  }
  // Over all blocks, as many rows are asked for as are added.
  const int64_t asked = problem::ceil_div(A::kPack * kVectors * kLanes, outputs.dim);
  for (int64_t step = 0; step < kKeys / A::kPack; ++step) {
    const std::byte* const* rows = values.data() + step * A::kPack;
    queue.Ask(asked);
    V words[kVectors];
    if constexpr (kTail) {
      LoadValuesTail<A>(rows, d, outputs.dim, words);
    } else {
      for (int b = 0; b < kBlocks; ++b)
        A::LoadValues(rows, d + b * A::kPack * kLanes, words + b * A::kPack);
    }
    for (int r = 0; r < kRows; ++r) {
      const V p = hn::Set(f, probabilities[r * kKeys + step]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = A::MulAdd(p, words[v], sums[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v)
      hn::StoreU(sums[r][v], f, o + r * outputs.stride + v * kLanes);
  }
}

template <typename A, int kRows>
HWY_NOINLINE void AddValues(const RowOutputs<typename A::Wide>& outputs, int64_t first,
                            const float* rescale, const float* probabilities, const Rows& values,
                            ValueQueue& queue) {
  constexpr int64_t kBlock = RowOutputs<typename A::Wide>::kBlock;
  constexpr int kBlocks = kValueVectors / A::kPack;
  int64_t d = 0;
  for (; d + kBlocks * kBlock <= outputs.dim; d += kBlocks * kBlock)
    AddBlocks<A, kRows, kBlocks, false>(outputs, first, d, rescale, probabilities, values, queue);
  for (; d + kBlock <= outputs.dim; d += kBlock)
    AddBlocks<A, kRows, 1, false>(outputs, first, d, rescale, probabilities, values, queue);
  if (d < outputs.dim)
    AddBlocks<A, kRows, 1, true>(outputs, first, d, rescale, probabilities, values, queue);
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
