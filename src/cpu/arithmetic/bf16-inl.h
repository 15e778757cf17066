// Bfloat16 pairs with the processor's dot product.
#if defined(BLASST_CPU_ARITHMETIC_BF16_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_ARITHMETIC_BF16_INL_H_
#undef BLASST_CPU_ARITHMETIC_BF16_INL_H_
#else
#define BLASST_CPU_ARITHMETIC_BF16_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "blasst/blasst.hpp"
#include "cpu/arithmetic/vector-inl.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

// Pairs of bfloat16 into float32 sums; probabilities are rounded to bfloat16 (half away from zero).
struct BFloat16Dot {
  static constexpr DType kDType = BLASST_BFLOAT16;
  static constexpr int kPack = 2;
  using Wide = BFloat16Dot;

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

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
