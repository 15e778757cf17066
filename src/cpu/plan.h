// Host-side choices of the CPU backend: tile shapes, work items, scratch sizes. Plain functions;
// shapes and sizes need the scalars of a problem only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "problem/problem.h"

namespace blasst::cpu {

using problem::Problem;
using problem::QueryTile;
using problem::Range;

inline constexpr int kQueryRows = 64;   // rows of a prefill query tile
inline constexpr int kKeys = 64;        // keys of a key tile
inline constexpr int kUnitTiles = 8;    // query tiles that share one staged key tile
inline constexpr int kUnitHeads = 8;    // decode: most KV heads a unit
inline constexpr int kSplitTiles = 64;  // decode: visited tiles a split
inline constexpr int kMaxDim = problem::kMaxDim;
inline constexpr int kRowArrays = 9;  // floats that softmax keeps of a row

TileShape prefill_shape();
TileShape decode_shape(const Problem& p);

// Prefill work: up to kUnitTiles neighbouring query tiles of one head, which visit key tiles
// together.
struct PrefillUnit {
  std::span<const QueryTile> tiles;
  Range key_tiles;  // union of what its query tiles may visit
};

// Longest first, so that threads end together.
std::vector<PrefillUnit> prefill_units(const Problem& p, std::span<const QueryTile> tiles);

// Splits of a visit of so many tiles: kSplitTiles each. What is left joins the last one if it is
// BLASST_SEED_TILES at most.
int64_t count_splits(int64_t tiles);
Range split_positions(int64_t tiles, int64_t split);

// Decode work: one split of the visit of several query tiles, KV heads of one request that visit
// the same key tiles.
struct DecodeUnit {
  std::span<const QueryTile> tiles;
  Range key_tiles;  // of the whole visit
  Range visit;      // positions in the visit sequence (split_positions)
  int64_t split;    // which of
  int64_t splits;   // a query tile has; their partial results follow each other
  int64_t partial;  // index of the first tile's first partial result

  int64_t first_partial(size_t tile) const { return partial + static_cast<int64_t>(tile) * splits; }
};

// KV heads that one unit walks side by side: more read memory in longer stretches, fewer give every
// thread work. `splits`: of one KV head, over all requests.
int64_t decode_unit_heads(int64_t kv_heads, int64_t splits, int threads);

std::vector<DecodeUnit> decode_units(const Problem& p, std::span<const QueryTile> tiles,
                                     int threads);
int64_t decode_partials(std::span<const DecodeUnit> units);
int64_t most_decode_partials(const Problem& p);  // by its scalars

// Whether splits take part in a test, or in its calibration, so that they must not start blind.
bool takes_seeds(const Problem& p);

// Floats of one thread's scratch (decode: for each KV head of a unit), and of one partial result.
size_t prefill_scratch_floats(const Problem& p);
size_t decode_scratch_floats(const Problem& p);
size_t decode_partial_floats(const Problem& p);

// The softmax state of a query tile after one split, a float each row (see RowSum), its outputs
// [rows, value_dim], and the maxima of the tiles before it that it is tested against.
struct Partial {
  float* m;
  float* l;
  float* skipped_m;
  float* skipped;
  float* seed;
  float* o;
  int64_t o_stride;
};
Partial decode_partial(const Problem& p, float* storage);

// value_dim rounded up to whole vectors of any instruction set.
inline int64_t padded(int64_t dim) { return problem::ceil_div(dim, 32) * 32; }

}  // namespace blasst::cpu
