// Rows and columns of floats, as the products of backward take them.
#if defined(BLASST_CPU_BACKWARD_STAGING_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_BACKWARD_STAGING_INL_H_
#undef BLASST_CPU_BACKWARD_STAGING_INL_H_
#else
#define BLASST_CPU_BACKWARD_STAGING_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/tile/product-inl.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

// One row as floats, zeros up to the stride.
template <typename A>
void StageRow(const std::byte* row, int64_t dim, int64_t stride, float* to) {
  A::Stage(row, dim, to);
  std::fill(to + dim, to + stride, 0.0f);
}

// Row `key` of a tile as column `key` of its panels, [panel][dim][kPanel].
inline void StageColumn(const float* row, int64_t dim, int64_t key, float* columns) {
  float* to = columns + key / kPanel * kPanel * dim + key % kPanel;
  for (int64_t d = 0; d < dim; ++d) to[d * kPanel] = row[d];
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
