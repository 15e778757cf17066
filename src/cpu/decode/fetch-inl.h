// Rows of keys and values where they lie, and the fetching of those that are used later.
#if defined(BLASST_CPU_DECODE_FETCH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_DECODE_FETCH_INL_H_
#undef BLASST_CPU_DECODE_FETCH_INL_H_
#else
#define BLASST_CPU_DECODE_FETCH_INL_H_
#endif

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/arithmetic/vector-inl.h"
#include "cpu/plan.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

inline constexpr int kKeyGroup = 4;  // keys that share a pass over the rows

using Rows = std::array<const std::byte*, kKeys>;  // where a tile's keys or values are

// Asks for bytes [begin, end) of a row that is used a tile later: into the second-level cache, for
// the tiles of a unit's heads are more than the first holds.
HWY_INLINE void Fetch(const std::byte* row, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += 64) __builtin_prefetch(row + at, 0, 2);
}

// Value rows of kept tiles, waiting to be fetched a few at a time: all at once they would be more
// than a core can ask for, and the rest would come one by one when it is needed.
class ValueQueue {
 public:
  // `heads` take turns, so many visits pass between a tile's test and the use of its values.
  ValueQueue(int64_t row_bytes, int64_t heads)
      : row_bytes_(row_bytes), rows_a_key_group_(std::max<int64_t>(1, kKeyGroup / heads)) {}

  void Push(const Rows& rows) {
    if (next_ == rows_.size()) rows_.clear(), next_ = 0;
    rows_.insert(rows_.end(), rows.begin(), rows.end());
  }

  HWY_INLINE void AskWhileScoring() { Ask(rows_a_key_group_); }

  HWY_INLINE void Ask(int64_t count) {
    for (; count > 0 && next_ < rows_.size(); --count) Fetch(rows_[next_++], 0, row_bytes_);
  }

 private:
  const int64_t row_bytes_, rows_a_key_group_;
  std::vector<const std::byte*> rows_;
  size_t next_ = 0;
};

// Stands for a row that is none.
inline const std::byte* ZeroRow() {
  alignas(float) static constexpr std::array<std::byte, kMaxDim * sizeof(float)> zeros{};
  return zeros.data();
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
