// Host-side choices of the CPU's backward: work items, scratch sizes, where partial sums go.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "cpu/plan.h"
#include "problem/problem.h"

namespace blasst::cpu {

// A query tile and what its rows see.
struct BackwardTile {
  QueryTile query;
  Range key_tiles;  // that it may visit
  Range inner;      // keys that every row sees
};

// A stripe of neighbouring key tiles of one KV head, with the query tiles of all heads that share
// it. A unit alone writes its keys' dk and dv; its part of dq is added to the other stripes' at the
// end.
struct BackwardUnit {
  int64_t request, kv_head;
  std::span<const BackwardTile> tiles;
  Range key_tiles;
  int64_t stripe;
  int64_t pairs;  // kept pairs of a query tile and a key tile
};

// The number of stripes and where they are cut depend on the problem, never on the threads, so the
// order of every sum does not either.
struct BackwardPlan {
  explicit BackwardPlan(const problem::BackwardProblem& problem);
  BackwardPlan(const BackwardPlan&) = delete;

  bool kept(const BackwardTile& tile, int64_t key_tile) const;
  int64_t stripes(int64_t request) const;

  // Where the rows of a query tile are in the buffers below.
  int64_t first_row(const QueryTile& tile) const;
  float* dq_of(const QueryTile& tile, int64_t stripe) const;

  const problem::BackwardProblem& problem;
  std::vector<BackwardTile> tiles;  // heads of a request follow each other
  std::vector<BackwardUnit> units;  // most work first
  float* delta = nullptr;           // [heads, rows] out . dout - dlse
  float* lse_rest = nullptr;        // [heads, rows] the LSE less its float32 value
  float* dq = nullptr;              // [stripes, heads, rows, padded(head_dim)]

 private:
  problem::Geometry geometry_;  // of the tile bits
};

size_t backward_row_floats(const Problem& p);  // of delta, and of lse_rest
size_t backward_dq_floats(const Problem& p);

// Floats from one row of a staged tile to the next: whole panels, and no power of two, so that the
// rows of a column do not all fall into one set of the cache.
inline int64_t staged_stride(int64_t dim) { return padded(dim) + 16; }

// Floats of one thread's scratch.
size_t backward_scratch_floats(const Problem& p);

}  // namespace blasst::cpu
