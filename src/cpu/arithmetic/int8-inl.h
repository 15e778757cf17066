// Queries and keys in int8 (blasst_scores), whose sums of products every arithmetic has exactly.
#if defined(BLASST_CPU_ARITHMETIC_INT8_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_ARITHMETIC_INT8_INL_H_
#undef BLASST_CPU_ARITHMETIC_INT8_INL_H_
#else
#define BLASST_CPU_ARITHMETIC_INT8_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/arithmetic/vector-inl.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

#if defined(BLASST_ISA_INT8_DOT)
// Four bytes a word with the processor's dot product. That of x86 takes unsigned and signed bytes:
// there queries are raised by 128, which the first addend takes back.
template <DType kStored>
struct Int8 {
  static constexpr DType kDType = kStored;  // what queries and keys were stored as
  static constexpr int kPack = 4;
  static constexpr int kRaised = HWY_ARCH_X86 ? 128 : 0;

  static HWY_INLINE V MulAdd(V key, V query, V sum) {
#if HWY_TARGET == HWY_AVX3
    return V{_mm512_castsi512_ps(_mm512_dpbusd_epi32(_mm512_castps_si512(sum.raw),
                                                     _mm512_castps_si512(query.raw),
                                                     _mm512_castps_si512(key.raw)))};
#elif HWY_TARGET == HWY_AVX2
    return V{_mm256_castsi256_ps(_mm256_dpbusd_avx_epi32(_mm256_castps_si256(sum.raw),
                                                         _mm256_castps_si256(query.raw),
                                                         _mm256_castps_si256(key.raw)))};
#else
    return V{vreinterpretq_f32_s32(vdotq_s32(vreinterpretq_s32_f32(sum.raw),
                                             vreinterpretq_s8_f32(query.raw),
                                             vreinterpretq_s8_f32(key.raw)))};
#endif
  }

  static HWY_INLINE V First(int32_t key_sum) {
    return hn::BitCast(f, hn::Set(i32, -kRaised * key_sum));
  }
  static HWY_INLINE V Least() { return hn::BitCast(f, hn::Set(i32, INT32_MIN)); }
  static HWY_INLINE V Max(V a, V b) {
    return hn::BitCast(f, hn::Max(hn::BitCast(i32, a), hn::BitCast(i32, b)));
  }
  static HWY_INLINE V AsFloat(V sum) { return hn::ConvertTo(f, hn::BitCast(i32, sum)); }

  // One row of `dim` bytes to dim / kPack words.
  static HWY_INLINE void Stage(const std::byte* key, int64_t dim, float* HWY_RESTRICT words) {
    std::memcpy(words, key, dim);
  }
  static HWY_INLINE void StageQuery(const int8_t* query, int64_t dim, float* HWY_RESTRICT words) {
    auto* bytes = reinterpret_cast<uint8_t*>(words);
    for (int64_t d = 0; d < dim; ++d) bytes[d] = static_cast<uint8_t>(query[d] + kRaised);
  }
};
#else
// A float32 an element: sums of kMaxDim products of bytes are less than 2^24.
template <DType kStored>
struct Int8 {
  static constexpr DType kDType = kStored;
  static constexpr int kPack = 1;

  static HWY_INLINE V MulAdd(V key, V query, V sum) { return hn::MulAdd(key, query, sum); }
  static HWY_INLINE V First(int32_t) { return hn::Zero(f); }
  static HWY_INLINE V Least() { return hn::Set(f, -std::numeric_limits<float>::infinity()); }
  static HWY_INLINE V Max(V a, V b) { return hn::Max(a, b); }
  static HWY_INLINE V AsFloat(V sum) { return sum; }

  static HWY_INLINE void Stage(const std::byte* key, int64_t dim, float* HWY_RESTRICT words) {
    StageQuery(reinterpret_cast<const int8_t*>(key), dim, words);
  }
  static HWY_INLINE void StageQuery(const int8_t* query, int64_t dim, float* HWY_RESTRICT words) {
    const hn::CappedTag<float, 8> f8;
    const hn::RebindToSigned<decltype(f8)> i8;
    const hn::Rebind<int8_t, decltype(f8)> b8;
    for (int64_t d = 0; d < dim; d += hn::Lanes(f8))
      hn::StoreU(hn::ConvertTo(f8, hn::PromoteTo(i8, hn::LoadU(b8, query + d))), f8, words + d);
  }
};
#endif

template <typename S>
inline constexpr bool kIsInt8 = std::is_same_v<S, Int8<S::kDType>>;

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
