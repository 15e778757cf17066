// The rows of a query tile: what softmax knows of them, and of the key tile at hand. Prefill and
// decode lay out scores and outputs in their own ways; these arrays they share.
#if defined(BLASST_CPU_TILE_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLASST_CPU_TILE_ROWS_INL_H_
#undef BLASST_CPU_TILE_ROWS_INL_H_
#else
#define BLASST_CPU_TILE_ROWS_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu/plan.h"
#include "cpu/tile/score-inl.h"
#include "problem/problem.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

// Arrays of a float a row, in whole vectors. Scores are in their unit (ScoreUnit); sums are
// relative to a maximum in it, never to a rounded multiple of it: of scores beyond 2^20 that leaves
// no digits.
struct TileRows {
  int64_t count = 0;  // rows
  ScoreUnit unit;
  bool absolute;  // test

  // Of the key tile at hand: the largest score, NaN left aside; the keys that the row sees.
  float *t, *seen;
  // Of the kept tiles: the running maximum m, the sum of exp(score - m), and the factor that the
  // last tile changed the sums by.
  float *m, *l, *rescale;
  // The same of the bound on skipped keys, which may lie far above m under the absolute test.
  float *skipped_m, *skipped;
  // What the test compares with: a maximum of tiles before this split, and the threshold.
  float *seed, *skip_below;

  // Takes kRowArrays * `room` floats of the scratch; `room`: whole vectors.
  TileRows(const Problem& p, int64_t room, float* scratch)
      : absolute(p.test.kind == BLASST_TEST_ABSOLUTE), room_(room) {
    for (float** array : {&t, &seen, &m, &l, &rescale, &skipped_m, &skipped, &seed, &skip_below}) {
      *array = scratch;
      scratch += room;
    }
  }

  // Before the first key tile.
  void Begin(const Problem& p, const QueryTile& tile, TileShape shape) {
    count = tile.rows();
    unit = ScoreUnit(p, tile);
    for (float* array : {t, m, skipped_m, seed}) std::fill_n(array, room_, -kInf);
    for (float* array : {seen, l, skipped}) std::fill_n(array, room_, 0.0f);
    std::fill_n(skip_below, room_, kInf);
    for (int64_t r = 0; r < count; ++r)
      skip_below[r] = static_cast<float>(p.skip_below(tile, tile.head_of(r), shape) / unit.scale);
  }

 private:
  int64_t room_;
};

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
