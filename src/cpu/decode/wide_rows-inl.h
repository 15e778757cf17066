// Keys and values in 8 bits, made rows that the arithmetic reads.
#if defined(BLASST_CPU_DECODE_WIDE_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_DECODE_WIDE_ROWS_INL_H_
#undef BLASST_CPU_DECODE_WIDE_ROWS_INL_H_
#else
#define BLASST_CPU_DECODE_WIDE_ROWS_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <utility>

#include "cpu/arithmetic/arithmetic-inl.h"
#include "cpu/decode/fetch-inl.h"
#include "cpu/plan.h"
#include "problem/element.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

// The rows of one tile at a time, of keys or of values.
template <typename A>
class WideRows {
 public:
  // Takes kKeys * padded(dim) floats of the scratch if the rows are of 8 bits.
  WideRows(DType stored, int64_t dim, float*& scratch)
      : stored_(stored),
        dim_(dim),
        wide_(is_needed() ? std::exchange(scratch, scratch + kKeys * padded(dim)) : nullptr) {}

  bool is_needed() const { return problem::is_8_bits(stored_); }

  // For A::Wide; rows that are none (ZeroRow) stay so. Valid until the next call.
  HWY_NOINLINE Rows Of(const Rows& rows) const {
    Rows wide = rows;
    for (int64_t i = 0; i < kKeys; ++i) {
      if (rows[i] == ZeroRow()) continue;
      float* to = wide_ + i * padded(dim_);
      Widen<A>(stored_, rows[i], dim_, to);
      wide[i] = reinterpret_cast<const std::byte*>(to);
    }
    return wide;
  }

 private:
  const DType stored_;
  const int64_t dim_;
  float* const wide_;
};

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
