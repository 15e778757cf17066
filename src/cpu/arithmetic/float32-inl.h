// Float32 multiply-adds on any storage type.
#if defined(BLASST_CPU_ARITHMETIC_FLOAT32_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_ARITHMETIC_FLOAT32_INL_H_
#undef BLASST_CPU_ARITHMETIC_FLOAT32_INL_H_
#else
#define BLASST_CPU_ARITHMETIC_FLOAT32_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "blasst/blasst.hpp"
#include "cpu/arithmetic/convert-inl.h"
#include "problem/element.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

// Float32 arithmetic on any storage type; staging converts.
template <DType kStored>
struct Float32 {
  static constexpr DType kDType = kStored;
  static constexpr int kPack = 1;  // elements a word
  using Wide = Float32<BLASST_FLOAT32>;

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

  // The largest magnitude in each word, as the bits of a float: orders like the float, NaN above
  // infinity.
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
        words[i] = static_cast<float>(problem::load_element(kStored, row + 2 * (at + i)));
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

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
