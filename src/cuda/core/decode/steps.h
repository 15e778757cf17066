// The tiles that a block scores for a work item, and what they begin and end. The same on the host
// and in the kernels.
#pragma once

#include "blasst/blasst.h"
#include "cuda/core/decode/splits.h"
#include "cuda/core/host_device.h"

namespace blasst::cuda::decode {

enum TileFlags : int {
  kFirstOfItem = 1,
  kLastOfItem = 2,
  kFirstOfSplit = 4,
  kLastOfSplit = 8,
  kSeed = 16,      // one of the visit's first BLASST_SEED_TILES
  kOnlySeed = 32,  // of another item: only the row maxima are of interest
  kLastSeed = 64,  // of those
  kStop = 128,     // no tile: the end of the block's work
};

// What an item scores, one after the other: the first tiles of the whole visit, if it begins later,
// and its own.
struct Step {
  int position;  // in the visit
  int flags;
};
class Steps {
 public:
  Steps() = default;
  // begin, end: of the item, positions in the visit.
  BLASST_HOST_DEVICE Steps(int begin, int end, int split_tiles)
      : begin_(begin), split_tiles_(split_tiles) {
    seeds_ = begin > 0 ? BLASST_SEED_TILES : 0;
    count_ = seeds_ + end - begin;
  }

  BLASST_HOST_DEVICE int count() const { return count_; }
  BLASST_HOST_DEVICE int position(int i) const { return i < seeds_ ? i : begin_ + i - seeds_; }

  BLASST_HOST_DEVICE Step next() {
    const int i = next_++, place = position(i);
    int flags = (i == 0) * kFirstOfItem | (i == count_ - 1) * kLastOfItem |
                (place < BLASST_SEED_TILES) * kSeed;
    if (i < seeds_) {
      flags |= kOnlySeed | (i == seeds_ - 1) * kLastSeed;
    } else {
      const bool begins = left_ == 0;
      if (begins) left_ = split_end(i + split_tiles_, count_) - i;
      --left_;
      flags |= begins * kFirstOfSplit | (left_ == 0) * kLastOfSplit;
    }
    return {place, flags};
  }

 private:
  int begin_, split_tiles_, seeds_, count_;
  int next_ = 0;
  int left_ = 0;  // tiles of the split behind the last
};

}  // namespace blasst::cuda::decode
