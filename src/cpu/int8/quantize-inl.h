// Rows in int8 (blasst_scores). Every instruction set gives the same bytes: what is rounded in
// float32 is rounded element by element, sums are in double precision, one after the other.
#if defined(BLASST_CPU_INT8_QUANTIZE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_INT8_QUANTIZE_INL_H_
#undef BLASST_CPU_INT8_QUANTIZE_INL_H_
#else
#define BLASST_CPU_INT8_QUANTIZE_INL_H_
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "cpu/arithmetic/arithmetic-inl.h"
#include "cpu/arithmetic/convert-inl.h"
#include "cpu/int8/keys.h"
#include "cpu/plan.h"
#include "problem/problem.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

// Elements that are rotated together: as the largest power of two that divides the dimension; 1 is
// no rotation, where the keys' own bytes are taken.
inline int64_t RotatedBlock(const Problem& p) {
  return p.scores_take_bytes() ? 1 : p.head_dim & -p.head_dim;
}

// Of a row with this largest magnitude; a Hadamard matrix without its factor makes it sqrt(block)
// times as long.
inline float UnitOf(float largest, int64_t block) {
  return largest * (1 / (127 * std::sqrt(static_cast<float>(block))));
}

// x rotated in place by Hadamard matrices of `block`; butterflies of neighbours first. `x` is
// padded to whole vectors.
HWY_INLINE void Rotate(float* HWY_RESTRICT x, int64_t dim, int64_t block) {
  for (int64_t bit = 1; bit < block; bit *= 2) {
    if (bit < kLanes) {
      alignas(64) int32_t partner[kLanes], minus[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        partner[i] = static_cast<int32_t>(i ^ bit);
        minus[i] = i & bit ? INT32_MIN : 0;
      }
      const auto partners = hn::SetTableIndices(f, partner);
      const V sign = hn::BitCast(f, hn::Load(i32, minus));
      for (int64_t i = 0; i < dim; i += kLanes) {
        const V a = hn::LoadU(f, x + i);
        hn::StoreU(hn::Add(hn::TableLookupLanes(a, partners), hn::Xor(a, sign)), f, x + i);
      }
      continue;
    }
    for (int64_t first = 0; first < dim; first += 2 * bit) {
      for (int64_t i = first; i < first + bit; i += kLanes) {
        const V a = hn::LoadU(f, x + i), b = hn::LoadU(f, x + i + bit);
        hn::StoreU(hn::Add(a, b), f, x + i);
        hn::StoreU(hn::Sub(a, b), f, x + i + bit);
      }
    }
  }
}

// The largest magnitude; NaN counts as infinity. `x` is padded with zeros to whole vectors.
HWY_INLINE float LargestOf(const float* x, int64_t dim) {
  return LargestMagnitude<Float32<BLASST_FLOAT32>>(x, hwy::RoundUpTo(dim, kLanes));
}

// x / largest * 127, rounded to the nearest integer, ties to even; 0 if that is NaN.
HWY_INLINE void RoundToInt8(const float* HWY_RESTRICT x, int64_t dim, float largest,
                            int8_t* HWY_RESTRICT to) {
  const hn::CappedTag<float, 8> f8;
  const hn::Rebind<int8_t, decltype(f8)> b8;
  const auto inverse = hn::Set(f8, largest > 0 ? 127 / largest : 0.0f);
  for (int64_t d = 0; d < dim; d += hn::Lanes(f8)) {
    const auto scaled = hn::Mul(hn::LoadU(f8, x + d), inverse);
    const auto inside = hn::Clamp(scaled, hn::Set(f8, -128.0f), hn::Set(f8, 127.0f));
    const auto number = hn::IfThenZeroElse(hn::IsNaN(scaled), inside);
    hn::StoreU(hn::DemoteTo(b8, hn::NearestInt(number)), b8, to + d);
  }
}

// The mean of the finite elements of a request's keys; of those that are taken as they are, 0.
inline void MeanKey(const Problem& p, const Int8Keys& keys, int64_t request, int64_t kv_head) {
  const int64_t count = p.requests[request].keys, dim = p.head_dim;
  float* mean = keys.mean(request, kv_head);
  if (p.scores_take_bytes()) {
    std::fill_n(mean, dim, 0.0f);
    return;
  }
  std::array<double, kMaxDim> sums{};
  std::array<const std::byte*, kKeys> rows;
  alignas(64) float row[kMaxDim];
  for (int64_t first = 0; first < count; first += kKeys) {
    const Range tile{first, std::min(count, first + kKeys)};
    p.rows_of(p.kv.k, request, tile, kv_head, rows.data());
    for (int64_t key = 0; key < tile.size(); ++key) {
      LoadFloats(p.kv.k.dtype, rows[key], dim, row);
      for (int64_t d = 0; d < dim; ++d) sums[d] += std::isfinite(row[d]) ? row[d] : 0;
    }
  }
  for (int64_t d = 0; d < dim; ++d)
    mean[d] = count == 0 ? 0 : static_cast<float>(sums[d] / static_cast<double>(count));
}

// Of a row in int8, `dim` elements.
inline int32_t SumOfBytes(const int8_t* row, int64_t dim) {
  int32_t sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += row[d];
  return sum;
}

// Key tile j of a request, whose mean is there. `scratch`: prefill_scratch_floats.
inline void QuantizeKeys(const Problem& p, const Int8Keys& keys, int64_t request, int64_t kv_head,
                         int64_t j, float* scratch) {
  const int64_t dim = p.head_dim, stride = hwy::RoundUpTo(dim, kLanes);
  const Range range{j * kKeys, std::min(p.requests[request].keys, (j + 1) * kKeys)};
  const float* mean = keys.mean(request, kv_head);
  std::array<const std::byte*, kKeys> rows;
  p.rows_of(p.kv.k, request, range, kv_head, rows.data());
  const Int8Tile tile = keys.tile(request, kv_head, j);
  *tile.broken = 0;
  std::fill_n(tile.sums, kKeys, 0);
  if (p.scores_take_bytes()) {
    *tile.unit = 1;  // k_scale is in the problem's scale of scores
    for (int64_t key = 0; key < range.size(); ++key)
      tile.sums[key] = SumOfBytes(reinterpret_cast<const int8_t*>(rows[key]), dim);
    return;
  }
  float largest = 0;
  for (int64_t key = 0; key < range.size(); ++key) {
    float* row = scratch + key * stride;
    LoadFloats(p.kv.k.dtype, rows[key], dim, row);
    std::fill(row + dim, row + stride, 0.0f);
    for (int64_t d = 0; d < dim; ++d) row[d] -= mean[d];
    Rotate(row, dim, RotatedBlock(p));
    const float of_key = LargestOf(row, dim);
    if (std::isfinite(of_key)) {
      largest = std::max(largest, of_key);
    } else {
      *tile.broken |= uint64_t{1} << key;
      std::fill(row, row + dim, 0.0f);
    }
  }
  *tile.unit = UnitOf(largest, RotatedBlock(p));
  for (int64_t key = 0; key < range.size(); ++key) {
    int8_t* to = tile.elements + key * dim;
    RoundToInt8(scratch + key * stride, dim, largest, to);
    tile.sums[key] = SumOfBytes(to, dim);
  }
}

// A query row: its bytes, their unit, and its product with the mean key. `row`: room for kMaxDim.
struct Int8Query {
  float unit, shift;
};
template <DType kStored>
Int8Query QuantizeQuery(const Problem& p, const std::byte* query, const float* mean, float* row,
                        int8_t* to) {
  const int64_t dim = p.head_dim, block = RotatedBlock(p);
  LoadFloats(kStored, query, dim, row);
  std::fill(row + dim, row + hwy::RoundUpTo(dim, kLanes), 0.0f);
  double shift = 0;
  for (int64_t d = 0; d < dim; ++d) shift += static_cast<double>(row[d]) * mean[d];
  Rotate(row, dim, block);
  const float largest = LargestOf(row, dim);
  RoundToInt8(row, dim, largest, to);
  return {UnitOf(largest, block), static_cast<float>(shift)};
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
