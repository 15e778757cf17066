// What the backward kernels are told. No CUDA types here.
#pragma once

#include <cstdint>

#include "cuda/core/prefill/params.h"

namespace blasst::cuda::backward {

using prefill::kQueryTileRows;

// Of the rows of a query tile, what their weights need.
struct alignas(16) RowBlock {
  float lse[kQueryTileRows];    // base-2 logarithm; infinite where a row has no weights
  float delta[kQueryTileRows];  // out . dout - dlse
};

struct Params {
  prefill::Params forward;  // of its work only the lists of blocks
  float scale;              // d (q.k * scale) / d (q.k)

  OutputRows dout;            // only read
  const float *lse, *dlse;    // [heads, rows]; dlse null: zero
  const unsigned* tile_bits;  // [heads, query tiles of all requests, tile_words]; null: all kept
  int tile_words, query_tiles;

  OutputRows dq, dk, dv;
  float* dsinks;  // [heads]; null: not wanted

  // In the workspace.
  RowBlock* rows;  // [heads, query tiles of all requests]
  // [heads, key tiles of all requests, keeper_words] which query tiles of the request kept the key
  // tile: bit i % 32 of word i / 32. Not used where every tile is kept.
  unsigned* keepers;
  int keeper_words;
  int key_tiles;  // room for those of all requests

  // [slots, heads] dk, not yet scaled, [keys of a tile, qk_dim], and dv, [keys of a tile,
  // value_dim], of the first key tiles of long requests (request_of_slot()), by query head.
  float* sums;
  int sum_slots;
};

// A request of more key tiles than these has its first one, which all rows may keep, cut into
// parts.
inline constexpr int kShortKeyTiles = 32;

}  // namespace blasst::cuda::backward
