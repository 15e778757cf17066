// Stored elements to floats and back.
#if defined(BLASST_CPU_ARITHMETIC_CONVERT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_ARITHMETIC_CONVERT_INL_H_
#undef BLASST_CPU_ARITHMETIC_CONVERT_INL_H_
#else
#define BLASST_CPU_ARITHMETIC_CONVERT_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "blasst/blasst.hpp"
#include "cpu/arithmetic/vector-inl.h"
#include "problem/element.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

// SSE4 has no instruction for halves, and Highway's emulation loses NaN and rounding.
inline constexpr bool kConvertsHalf = HWY_TARGET != HWY_SSE4;

// Of float8_e4m3. Subnormal elements are multiples of 2^-9; a multiplication of subnormal floats
// would be slow.
template <typename D>
HWY_INLINE hn::Vec<D> LoadE4M3(D d, const uint8_t* from) {
  const hn::RebindToSigned<D> i;
  const auto bits = hn::PromoteTo(i, hn::LoadU(hn::Rebind<uint8_t, D>(), from));
  const auto size = hn::And(bits, hn::Set(i, 0x7f));
  const auto normal = hn::BitCast(d, hn::Add(hn::ShiftLeft<20>(size), hn::Set(i, 120 << 23)));
  const auto subnormal = hn::Mul(hn::ConvertTo(d, size), hn::Set(d, 0x1p-9f));
  const auto number =
      hn::IfThenElse(hn::RebindMask(d, hn::Lt(size, hn::Set(i, 8))), subnormal, normal);
  const auto value = hn::IfThenElse(hn::RebindMask(d, hn::Eq(size, hn::Set(i, 0x7f))),
                                    hn::Set(d, std::numeric_limits<float>::quiet_NaN()), number);
  return hn::Or(value, hn::BitCast(d, hn::ShiftLeft<24>(hn::AndNot(hn::Set(i, 0x7f), bits))));
}

// Reads `count` floats (a multiple of 8) from `count` elements of 8 bits.
template <DType kStored>
HWY_INLINE void LoadFloatsOf8Bits(const std::byte* from, int64_t count, float* HWY_RESTRICT to) {
  const auto load = [&](auto d, int64_t i) {
    if constexpr (kStored == BLASST_FLOAT8_E4M3) {
      hn::StoreU(LoadE4M3(d, reinterpret_cast<const uint8_t*>(from) + i), d, to + i);
    } else {
      const hn::Rebind<int8_t, decltype(d)> d8;
      const hn::RebindToSigned<decltype(d)> d32;
      const auto integers = hn::LoadU(d8, reinterpret_cast<const int8_t*>(from) + i);
      hn::StoreU(hn::ConvertTo(d, hn::PromoteTo(d32, integers)), d, to + i);
    }
  };
  const hn::CappedTag<float, 8> f8;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) load(f, i);
  for (; i < count; i += hn::Lanes(f8)) load(f8, i);
}

// Reads `count` floats (a multiple of 8) from `count` stored elements.
HWY_INLINE void LoadFloats(DType dtype, const std::byte* from, int64_t count,
                           float* HWY_RESTRICT to) {
  const hn::CappedTag<float, 8> f8;
  if (dtype == BLASST_INT8) return LoadFloatsOf8Bits<BLASST_INT8>(from, count, to);
  if (dtype == BLASST_FLOAT8_E4M3) return LoadFloatsOf8Bits<BLASST_FLOAT8_E4M3>(from, count, to);
  if (dtype == BLASST_FLOAT32) {
    std::memcpy(to, from, count * sizeof(float));
  } else if (dtype == BLASST_FLOAT16 && !kConvertsHalf) {
    for (int64_t i = 0; i < count; ++i)
      to[i] = static_cast<float>(problem::load_element(dtype, from + 2 * i));
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
      const uint16_t bits = problem::half_bits(from[i]);
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

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
