// Vectors of the instruction set at hand.
#if defined(BLASST_CPU_ARITHMETIC_VECTOR_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_ARITHMETIC_VECTOR_INL_H_
#undef BLASST_CPU_ARITHMETIC_VECTOR_INL_H_
#else
#define BLASST_CPU_ARITHMETIC_VECTOR_INL_H_
#endif

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

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
