// The reference: attention by the definition, in double precision, tile by tile, for checking
// kernels decision by decision. Slow; takes any tile shape.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "blasst/blasst.hpp"

namespace blasst::reference {

inline constexpr double kInf = std::numeric_limits<double>::infinity();

// One visited tile of one query tile.
struct TileDecision {
  int64_t request;
  int64_t head;        // the first head of the query tile
  int64_t query_tile;  // within the request; decode: 0
  int64_t key_tile;
  double gap;      // largest over the rows: row maximum - running maximum; +inf: first keys of some
                   // row; NaN: a NaN score
  double maximum;  // largest valid score of the tile, what the absolute test looks at
  double margin;   // largest over the rows: tested value - ln(threshold), or - tau; >= 0 or NaN:
                   // kept. A decision may differ between two correct kernels only if |margin| is
                   // within rounding.
  bool kept;
};

struct Result {
  std::vector<double> out;                 // [rows, heads, value_dim]
  std::vector<double> lse;                 // [heads, rows]
  std::vector<double> dropped_mass_bound;  // [heads, rows]
  std::vector<double> dropped_mass;  // [heads, rows] exact probability of the skipped tiles' keys
  std::vector<TileDecision> tiles;   // in the order of visit, query tile by query tile
};

// Decisions forced from outside: kept[i] replaces the test for the i-th visited tile, so that a
// kernel's output can be compared when a decision within rounding went the other way.
Result prefill(const AttentionParams& params, TileShape shape,
               const std::vector<bool>* kept = nullptr);
Result decode(const AttentionParams& params, TileShape shape,
              const std::vector<bool>* kept = nullptr);

// What backward gives. The keys of the requests follow each other, without unused ones.
struct Gradients {
  std::vector<double> dq;      // [rows, heads, head_dim]
  std::vector<double> dk;      // [keys of all requests, kv_heads, head_dim]
  std::vector<double> dv;      // [keys of all requests, kv_heads, value_dim]
  std::vector<double> dsinks;  // [heads]
};

// Gradients of softmax over the kept tiles, by the definition: params.tile_bits are read, for tiles
// of `shape`; out and lse are not.
Gradients backward(const BackwardParams& params, TileShape shape);

}  // namespace blasst::reference
