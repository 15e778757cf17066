// The two ways to multiply: float32, and bfloat16 pairs with the processor's dot product. Both see
// tensors as arrays of 32-bit words, one float or two neighbouring bfloat16, so one kernel text
// serves both.
#if defined(BLASST_CPU_SIMD_ARITHMETIC_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_SIMD_ARITHMETIC_INL_H_
#undef BLASST_CPU_SIMD_ARITHMETIC_INL_H_
#else
#define BLASST_CPU_SIMD_ARITHMETIC_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "attention/element.h"
#include "blasst/blasst.hpp"
#include "hwy/highway.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {
namespace hn = hwy::HWY_NAMESPACE;

// kLanes rows or elements at a time.
using F = hn::ScalableTag<float>;
using I = hn::RebindToSigned<F>;
using V = hn::Vec<F>;
using M = hn::Mask<F>;
inline constexpr F f{};
inline constexpr I i32{};
inline constexpr int kLanes = static_cast<int>(hn::MaxLanes(f));

// SSE4 has no instruction for halves, and Highway's emulation loses NaN and rounding.
inline constexpr bool kConvertsHalf = HWY_TARGET != HWY_SSE4;

// Reads `count` floats (a multiple of 8) from `count` stored elements.
HWY_INLINE void LoadFloats(DType dtype, const std::byte* from, int64_t count,
                           float* HWY_RESTRICT to) {
  const hn::CappedTag<float, 8> f8;
  if (dtype == BLASST_FLOAT32) {
    std::memcpy(to, from, count * sizeof(float));
  } else if (dtype == BLASST_FLOAT16 && !kConvertsHalf) {
    for (int64_t i = 0; i < count; ++i)
      to[i] = static_cast<float>(attention::load_element(dtype, from + 2 * i));
  } else if (dtype == BLASST_FLOAT16) {
    const hn::Rebind<hwy::float16_t, decltype(f8)> h8;
    for (int64_t i = 0; i < count; i += hn::Lanes(f8))
      hn::StoreU(
          hn::PromoteTo(f8, hn::LoadU(h8, reinterpret_cast<const hwy::float16_t*>(from) + i)), f8,
          to + i);
  } else {
    const hn::Rebind<hwy::bfloat16_t, decltype(f8)> b8;
    for (int64_t i = 0; i < count; i += hn::Lanes(f8))
      hn::StoreU(
          hn::PromoteTo(f8, hn::LoadU(b8, reinterpret_cast<const hwy::bfloat16_t*>(from) + i)), f8,
          to + i);
  }
}

// Rounds `count` floats (a multiple of 8) to stored elements, to nearest even.
HWY_INLINE void StoreFloats(DType dtype, const float* HWY_RESTRICT from, int64_t count,
                            std::byte* to) {
  const hn::CappedTag<float, 8> f8;
  if (dtype == BLASST_FLOAT32) {
    std::memcpy(to, from, count * sizeof(float));
  } else if (dtype == BLASST_FLOAT16 && !kConvertsHalf) {
    for (int64_t i = 0; i < count; ++i) {
      const uint16_t bits = attention::half_bits(from[i]);
      std::memcpy(to + 2 * i, &bits, sizeof bits);
    }
  } else if (dtype == BLASST_FLOAT16) {
    const hn::Rebind<hwy::float16_t, decltype(f8)> h8;
    for (int64_t i = 0; i < count; i += hn::Lanes(f8))
      hn::StoreU(hn::DemoteTo(h8, hn::LoadU(f8, from + i)), h8,
                 reinterpret_cast<hwy::float16_t*>(to) + i);
  } else {
    const hn::RebindToSigned<decltype(f8)> i8;
    const hn::Rebind<uint16_t, decltype(f8)> u8;
    for (int64_t i = 0; i < count; i += hn::Lanes(f8)) {
      const auto value = hn::LoadU(f8, from + i);
      const auto bits = hn::BitCast(i8, value);
      const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(i8, 1));
      const auto sum = hn::Add(bits, hn::Add(odd, hn::Set(i8, 0x7fff)));
      const auto high = hn::And(hn::ShiftRight<16>(sum), hn::Set(i8, 0xffff));
      const auto nan = hn::RebindMask(i8, hn::IsNaN(value));
      const auto rounded = hn::IfThenElse(nan, hn::Set(i8, 0x7fc0), high);
      hn::StoreU(hn::DemoteTo(u8, rounded), u8, reinterpret_cast<uint16_t*>(to) + i);
    }
  }
}

// Float32 arithmetic on any storage type; staging converts.
template <DType kStored>
struct Float32 {
  static constexpr DType kDType = kStored;
  static constexpr int kPack = 1;  // elements a word

  static HWY_INLINE V MulAdd(V a, V b, V sum) { return hn::MulAdd(a, b, sum); }

  // One row of `dim` elements to dim words.
  static HWY_INLINE void Stage(const std::byte* row, int64_t dim, float* HWY_RESTRICT words) {
    LoadFloats(kStored, row, dim, words);
  }

  // kPack value rows, element d of all of them in words[d].
  static HWY_INLINE void StageValues(const std::byte* const* rows, int64_t dim,
                                     float* HWY_RESTRICT words) {
    LoadFloats(kStored, rows[0], dim, words);
  }

  // The largest magnitude among the words, as the bits of a float: orders like the float, NaN above
  // inf.
  static HWY_INLINE hn::Vec<I> Magnitude(hn::Vec<I> words) {
    return hn::And(words, hn::Set(i32, 0x7fffffff));
  }

  // One word from kPack probabilities of neighbouring keys.
  static HWY_INLINE V Pack(const V* p) { return p[0]; }

  // The same for `count` probabilities in a row.
  static HWY_INLINE void PackRow(const float* HWY_RESTRICT p, int64_t count,
                                 float* HWY_RESTRICT words) {
    std::memcpy(words, p, count * sizeof(float));
  }

  // kLanes words of a stored row, from its word `at`.
  static HWY_INLINE V LoadWords(const std::byte* row, int64_t at) {
    if constexpr (kStored == BLASST_FLOAT32) {
      return hn::LoadU(f, reinterpret_cast<const float*>(row) + at);
    } else if constexpr (kStored == BLASST_FLOAT16 && !kConvertsHalf) {
      alignas(64) float words[kLanes];
      for (int i = 0; i < kLanes; ++i)
        words[i] = static_cast<float>(attention::load_element(kStored, row + 2 * (at + i)));
      return hn::Load(f, words);
    } else {
      using T = std::conditional_t<kStored == BLASST_FLOAT16, hwy::float16_t, hwy::bfloat16_t>;
      const hn::Rebind<T, F> stored;
      return hn::PromoteTo(f, hn::LoadU(stored, reinterpret_cast<const T*>(row) + at));
    }
  }

  // Elements [at, at + kPack * kLanes) of kPack value rows as kPack vectors of words; element e of
  // the block lies in lane Lane(e) of the vectors laid end to end.
  static HWY_INLINE void LoadValues(const std::byte* const* rows, int64_t at, V* words) {
    words[0] = LoadWords(rows[0], at);
  }
  static constexpr int Lane(int element) { return element; }
};

#ifdef BLASST_ISA_BF16_DOT
// Pairs of bfloat16 into float32 sums; probabilities are rounded to bfloat16 (half away from zero).
struct BFloat16Dot {
  static constexpr DType kDType = BLASST_BFLOAT16;
  static constexpr int kPack = 2;

  static HWY_INLINE V MulAdd(V a, V b, V sum) {
    return V{_mm512_dpbf16_ps(sum.raw, (__m512bh)a.raw, (__m512bh)b.raw)};
  }

  static HWY_INLINE void Stage(const std::byte* row, int64_t dim, float* HWY_RESTRICT words) {
    std::memcpy(words, row, dim * 2);
  }

  static HWY_INLINE void StageValues(const std::byte* const* rows, int64_t dim,
                                     float* HWY_RESTRICT words) {
    const hn::CappedTag<uint32_t, 8> u8;
    const hn::Rebind<uint16_t, decltype(u8)> h8;
    for (int64_t d = 0; d < dim; d += 8) {
      const auto even =
          hn::PromoteTo(u8, hn::LoadU(h8, reinterpret_cast<const uint16_t*>(rows[0]) + d));
      const auto odd =
          hn::PromoteTo(u8, hn::LoadU(h8, reinterpret_cast<const uint16_t*>(rows[1]) + d));
      hn::StoreU(
          hn::BitCast(hn::RebindToFloat<decltype(u8)>(), hn::Or(even, hn::ShiftLeft<16>(odd))),
          hn::RebindToFloat<decltype(u8)>(), words + d);
    }
  }

  static HWY_INLINE hn::Vec<I> Magnitude(hn::Vec<I> words) {
    return hn::Max(hn::And(words, hn::Set(i32, 0x7fff0000)),
                   hn::And(hn::ShiftLeft<16>(words), hn::Set(i32, 0x7fff0000)));
  }

  static HWY_INLINE V Pack(const V* p) {
    const auto half = hn::Set(i32, 0x8000);
    const hn::RebindToUnsigned<F> u32;
    const auto even = hn::BitCast(u32, hn::Add(hn::BitCast(i32, p[0]), half));
    const auto odd = hn::BitCast(u32, hn::Add(hn::BitCast(i32, p[1]), half));
    return hn::BitCast(f,
                       hn::Or(hn::ShiftRight<16>(even), hn::And(odd, hn::Set(u32, 0xffff0000u))));
  }

  static HWY_INLINE void PackRow(const float* HWY_RESTRICT p, int64_t count,
                                 float* HWY_RESTRICT words) {
    for (int64_t i = 0; i < count; i += 2 * kLanes) {
      V pair[2];
      hn::LoadInterleaved2(f, p + i, pair[0], pair[1]);
      hn::StoreU(Pack(pair), f, words + i / 2);
    }
  }

  static HWY_INLINE V LoadWords(const std::byte* row, int64_t at) {
    return hn::LoadU(f, reinterpret_cast<const float*>(row) + at);
  }

  static HWY_INLINE void LoadValues(const std::byte* const* rows, int64_t at, V* words) {
    const hn::Repartition<uint16_t, F> u16;
    const auto even = hn::LoadU(u16, reinterpret_cast<const uint16_t*>(rows[0]) + at);
    const auto odd = hn::LoadU(u16, reinterpret_cast<const uint16_t*>(rows[1]) + at);
    words[0] = hn::BitCast(f, hn::InterleaveLower(u16, even, odd));
    words[1] = hn::BitCast(f, hn::InterleaveUpper(u16, even, odd));
  }
  // Interleaving works within 128-bit blocks of 8 elements: the first four go to the lower vector.
  static constexpr int Lane(int element) {
    return element % 8 / 4 * kLanes + element / 8 * 4 + element % 4;
  }
};

template <DType kStored>
using Arithmetic = std::enable_if_t<kStored == BLASST_BFLOAT16, BFloat16Dot>;
#else
template <DType kStored>
using Arithmetic = Float32<kStored>;
#endif

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
