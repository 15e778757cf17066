// What a kernel multiplies with. Tensors are seen as arrays of 32-bit words, each of kPack
// elements, so that one kernel text serves every arithmetic:
//   scores: Stage, LoadWords, MulAdd, Magnitude: queries and keys as words, and their products
//   values: StageValues, LoadValues, Lane, Pack, PackRow, MulAdd: probabilities of kPack
//     neighbouring keys a word, and as many value rows beside each other
// A kernel takes one for its scores and one for its values. They may differ.
//
// Keys and values in 8 bits are first widened, without rounding, to elements whose rows are words
// as they are: what Wide, an arithmetic of the same words, reads.
#if defined(BLASST_CPU_ARITHMETIC_ARITHMETIC_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_ARITHMETIC_ARITHMETIC_INL_H_
#undef BLASST_CPU_ARITHMETIC_ARITHMETIC_INL_H_
#else
#define BLASST_CPU_ARITHMETIC_ARITHMETIC_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/arithmetic/convert-inl.h"
#include "cpu/arithmetic/float32-inl.h"
#include "cpu/plan.h"
#ifdef BLASST_ISA_BF16_DOT
#include "cpu/arithmetic/bf16-inl.h"
#endif

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

// The best that this instruction set has for a storage type.
#ifdef BLASST_ISA_BF16_DOT
template <DType kStored>
using Arithmetic = std::enable_if_t<kStored == BLASST_BFLOAT16, BFloat16Dot>;
#else
template <DType kStored>
using Arithmetic = Float32<kStored>;
#endif

// Bytes of a stored element.
template <typename A>
inline constexpr int64_t kElementBytes = A::kDType == BLASST_FLOAT32 ? 4 : 2;

// `count` elements of 8 bits (a multiple of 8) to as many of A::Wide.
template <typename A>
HWY_INLINE void Widen(DType stored, const std::byte* row, int64_t count, float* HWY_RESTRICT to) {
  using Wide = typename A::Wide;
  if constexpr (Wide::kDType == BLASST_FLOAT32) {
    LoadFloats(stored, row, count, to);
  } else {
    alignas(64) float floats[kMaxDim];
    LoadFloats(stored, row, count, floats);
    StoreFloats(Wide::kDType, floats, count, reinterpret_cast<std::byte*>(to));
  }
}

// `most` or the larger magnitudes among `count` words (a multiple of kLanes), a lane each.
template <typename A>
HWY_INLINE hn::Vec<I> Largest(hn::Vec<I> most, const float* words, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes)
    most = hn::Max(most, A::Magnitude(hn::LoadU(i32, reinterpret_cast<const int32_t*>(words) + i)));
  return most;
}

// The largest of the lanes. NaN and infinity come out as infinity.
HWY_INLINE float LargestLane(hn::Vec<I> magnitudes) {
  const int32_t bits = std::min<int32_t>(hn::GetLane(hn::MaxOfLanes(i32, magnitudes)), 0x7f800000);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename A>
HWY_INLINE float LargestMagnitude(const float* words, int64_t count) {
  return LargestLane(Largest<A>(hn::Zero(i32), words, count));
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
