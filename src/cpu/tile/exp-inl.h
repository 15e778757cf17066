// Vector exponential and hyperbolic tangent, good to about 1e-7 relative.
#if defined(BLASST_CPU_TILE_EXP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_TILE_EXP_INL_H_
#undef BLASST_CPU_TILE_EXP_INL_H_
#else
#define BLASST_CPU_TILE_EXP_INL_H_
#endif

#include "cpu/arithmetic/vector-inl.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

// 2^x for x <= 126; 0 below -126 (and for -inf), NaN for NaN. 2^0 is exactly 1.
HWY_INLINE V Exp2(V x) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits, where the exponent is
  // built from.
  const V magic = hn::Set(f, 12582912.0f);
  const V shifted = hn::Add(x, magic);
  const V fraction = hn::Sub(x, hn::Sub(shifted, magic));
  // Least-squares minimax of 2^t on [-0.5, 0.5], constant term fixed at 1.
  V y = hn::Set(f, 1.327647129e-3f);
  y = hn::MulAdd(y, fraction, hn::Set(f, 9.675541893e-3f));
  y = hn::MulAdd(y, fraction, hn::Set(f, 5.550713092e-2f));
  y = hn::MulAdd(y, fraction, hn::Set(f, 2.402212024e-1f));
  y = hn::MulAdd(y, fraction, hn::Set(f, 6.931469440e-1f));
  y = hn::MulAdd(y, fraction, hn::Set(f, 1.0f));
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(i32, shifted));
  y = hn::BitCast(f, hn::Add(hn::BitCast(i32, y), exponent));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(f, -126.0f)), y);
}

// exp(-2 |x / cap|), which both of the following are made of.
HWY_INLINE V CapExp(V x, V cap) {
  constexpr float kTwoLog2e = 2.885390082f;
  return Exp2(hn::Mul(hn::Abs(hn::Div(x, cap)), hn::Set(f, -kTwoLog2e)));
}

// cap * tanh(x / cap), with its sign and NaN kept.
HWY_INLINE V SoftCap(V x, V cap) {
  const V ratio = hn::Abs(hn::Div(x, cap));
  // 1 - tanh(r) = 2 e / (1 + e) with e = exp(-2 r); small r by series, where the difference would
  // cancel.
  const V e = CapExp(x, cap);
  const V large = hn::Div(hn::Sub(hn::Set(f, 1.0f), e), hn::Add(hn::Set(f, 1.0f), e));
  const V square = hn::Mul(ratio, ratio);
  V series = hn::Set(f, 62.0f / 2835.0f);
  series = hn::MulAdd(series, square, hn::Set(f, -17.0f / 315.0f));
  series = hn::MulAdd(series, square, hn::Set(f, 2.0f / 15.0f));
  series = hn::MulAdd(series, square, hn::Set(f, -1.0f / 3.0f));
  series = hn::MulAdd(hn::Mul(series, square), ratio, ratio);
  const V tanh = hn::IfThenElse(hn::Lt(ratio, hn::Set(f, 0.25f)), series, large);
  return hn::CopySign(hn::Mul(cap, tanh), x);
}

// Its slope, 1 - tanh(r)^2 = 4 e / (1 + e)^2: nothing cancels.
HWY_INLINE V SoftCapSlope(V x, V cap) {
  const V e = CapExp(x, cap), sum = hn::Add(e, hn::Set(f, 1.0f));
  return hn::Div(hn::Mul(hn::Set(f, 4.0f), e), hn::Mul(sum, sum));
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
