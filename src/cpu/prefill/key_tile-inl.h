// A key tile of prefill, copied into the order in which Multiply broadcasts it. While one tile is
// multiplied, the rows of the next are copied a few at a time: memory is read behind arithmetic.
#if defined(BLASST_CPU_PREFILL_KEY_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_PREFILL_KEY_TILE_INL_H_
#undef BLASST_CPU_PREFILL_KEY_TILE_INL_H_
#else
#define BLASST_CPU_PREFILL_KEY_TILE_INL_H_
#endif

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "cpu/arithmetic/arithmetic-inl.h"
#include "cpu/arithmetic/int8-inl.h"
#include "cpu/int8/keys.h"
#include "cpu/plan.h"
#include "cpu/tile/product-inl.h"
#include "cpu/tile/score-inl.h"
#include "problem/element.h"
#include "problem/problem.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

// Keys are staged as S multiplies them, values as A does.
template <typename S, typename A>
class KeyTile {
 public:
  // `int8`: what S multiplies, if it is int8. Takes kKeys * (head_dim + value_dim) floats of the
  // scratch.
  KeyTile(const Problem& p, const Int8Keys* int8, float*& scratch)
      : p_(p),
        int8_(int8),
        depth_(p.head_dim / S::kPack),
        k_(std::exchange(scratch, scratch + kKeys * p.head_dim)),
        v_(std::exchange(scratch, scratch + kKeys * p.value_dim)) {}

  // Takes on tile j of a KV head, of which nothing is copied yet.
  void Begin(int64_t request, int64_t kv_head, int64_t j) {
    keys_ = {j * kKeys, std::min<int64_t>((j + 1) * kKeys, p_.requests[request].keys)};
    padded_ = hwy::RoundUpTo(keys_.size(), kBroadcasts);
    FindKeys(request, kv_head, j);
    p_.rows_of(p_.kv.v, request, keys_, kv_head, v_rows_.data());
    std::fill(v_rows_.begin() + keys_.size(), v_rows_.begin() + padded_, zeros_.data());
    std::fill(k_ + keys_.size() * depth_, k_ + padded_ * depth_, 0.0f);
    keys_copied_ = value_steps_copied_ = 0;
    k_most_ = v_most_ = hn::Zero(i32);
    for (int64_t i = 0; i < kAhead; ++i) Fetch(i);
  }

  // Copies `count` more rows, keys first, then values if they are wanted.
  HWY_NOINLINE void Copy(int64_t count, bool values) {
    for (; count > 0 && keys_copied_ < keys_.size(); --count) CopyKey();
    if (!values) return;
    for (; count > 0 && value_steps_copied_ < steps(); --count) CopyValues();
  }
  void FinishKeys() { Copy(kKeys, false); }
  void FinishValues() { Copy(kKeys, true); }

  Range keys() const { return keys_; }
  int64_t padded() const { return padded_; }            // keys, zeros up to a whole broadcast
  int64_t steps() const { return padded_ / A::kPack; }  // words of one output element
  const float* k() const { return k_; }                 // [padded][depth] words
  const float* v() const { return v_; }  // [value_dim / kBroadcasts][steps][kBroadcasts]
  float k_magnitude() const { return kIsInt8<S> ? 128 * *int8_tile_.unit : LargestLane(k_most_); }
  const Int8Tile& int8() const { return int8_tile_; }
  bool v_finite() const { return LargestLane(v_most_) < kInf; }

 private:
  static constexpr int kAhead = 8;  // rows between asking for one and copying it
  alignas(float) static constexpr std::array<std::byte, kMaxDim * sizeof(float)> zeros_{};

  void FindKeys(int64_t request, int64_t kv_head, int64_t j) {
    if constexpr (kIsInt8<S>) {
      int8_tile_ = int8_->tile(request, kv_head, j);
      if (!p_.scores_take_bytes()) {
        for (int64_t key = 0; key < keys_.size(); ++key)
          k_rows_[key] =
              reinterpret_cast<const std::byte*>(int8_tile_.elements + key * p_.head_dim);
        return;
      }
    }
    p_.rows_of(p_.kv.k, request, keys_, kv_head, k_rows_.data());
  }

  // Asks for row i, counted over keys and then steps of values.
  HWY_INLINE void Fetch(int64_t i) const {
    const int64_t k_element = kIsInt8<S> ? 1 : problem::element_bytes(p_.kv.k.dtype);
    if (i < keys_.size()) return FetchRow(k_rows_[i], p_.head_dim * k_element);
    const int64_t step = i - keys_.size();
    if (step >= steps()) return;
    for (int64_t key = step * A::kPack; key < (step + 1) * A::kPack; ++key)
      FetchRow(v_rows_[key], p_.value_dim * problem::element_bytes(p_.kv.v.dtype));
  }

  static HWY_INLINE void FetchRow(const std::byte* row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
  }

  HWY_INLINE void CopyKey() {
    const int64_t key = keys_copied_++;
    Fetch(key + kAhead);
    float* to = k_ + key * depth_;
    if constexpr (kIsInt8<S>) {
      S::Stage(k_rows_[key], p_.head_dim, to);
    } else {
      if (problem::is_8_bits(p_.kv.k.dtype)) {
        Widen<S>(p_.kv.k.dtype, k_rows_[key], p_.head_dim, to);
      } else {
        S::Stage(k_rows_[key], p_.head_dim, to);
      }
      if ((key + 1) % kBroadcasts == 0 || key + 1 == keys_.size())
        k_most_ = Largest<S>(k_most_, k_ + key / kBroadcasts * kBroadcasts * depth_,
                             kBroadcasts * depth_);
    }
  }

  HWY_INLINE void CopyValues() {
    const int64_t step = value_steps_copied_++;
    Fetch(keys_.size() + step + kAhead);
    StageValues(v_rows_.data() + step * A::kPack);
    for (int64_t d = 0; d < p_.value_dim; d += kBroadcasts)
      std::memcpy(v_ + d * steps() + step * kBroadcasts, words_ + d, kBroadcasts * sizeof(float));
    v_most_ = Largest<A>(v_most_, words_, hwy::RoundUpTo(p_.value_dim, kLanes));
  }

  HWY_INLINE void StageValues(const std::byte* const* rows) {
    if (!problem::is_8_bits(p_.kv.v.dtype)) return A::StageValues(rows, p_.value_dim, words_);
    alignas(64) float wide[A::kPack][kMaxDim];
    const std::byte* wide_rows[A::kPack];
    for (int i = 0; i < A::kPack; ++i) {
      Widen<A>(p_.kv.v.dtype, rows[i], p_.value_dim, wide[i]);
      wide_rows[i] = reinterpret_cast<const std::byte*>(wide[i]);
    }
    A::Wide::StageValues(wide_rows, p_.value_dim, words_);
  }

  const Problem& p_;
  const Int8Keys* const int8_;
  const int64_t depth_;  // words a key
  float *k_, *v_;
  Range keys_{};
  int64_t padded_ = 0;
  std::array<const std::byte*, kKeys> k_rows_, v_rows_;
  Int8Tile int8_tile_{};
  int64_t keys_copied_ = 0, value_steps_copied_ = 0;
  hn::Vec<I> k_most_, v_most_;
  alignas(64) float words_[kMaxDim] = {};
};

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
