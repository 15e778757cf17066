// Shared memory of the prefill kernel, and how its threads are split.
#pragma once

#include <cstdint>

#include "cuda/sm90/prefill/params.h"

namespace blasst::cuda::prefill {

inline constexpr int kPanel = 64;  // elements of a 128-byte row: the copy engine's swizzle
inline constexpr int kPanelRowBytes = 128;

// What a block works on: written by the producer, read by everyone.
struct Work {
  int request, head;
  int first_row;  // of the block, within the request
  int rows;       // left in the request from there on; 0: no more work
  int offset;     // position of query 0
  int keys;
  int least, most;  // distances that are seen
  int tile_begin, tile_end;
  int output_row;                    // of first_row, among the rows of all requests
  float threshold[kMostWarpgroups];  // of the tile test, as scores are kept
  // Reports only: the query tile of first_row, among those of all requests, and their number.
  int query_tile, query_tiles;
};

// A tensor tile [rows, dim] lies as dim / 64 panels of [rows, 64].
template <int kDim>
struct Layout {
  static constexpr int kWarpgroups = warpgroups(kDim);
  static constexpr int kRowsPerBlock = rows_per_block(kDim);
  static constexpr int kThreads = 128 * (1 + kWarpgroups);
  static constexpr int kConsumerWarps = 4 * kWarpgroups;
  static constexpr int kKeys = tile_keys(kDim);
  static constexpr int kPanels = kDim / kPanel;
  static constexpr int kKeyStages = kDim == 256 ? 3 : 4;
  static constexpr int kValueStages = 2;
  // Twice as many as tiles that a warpgroup can be ahead of the values' producers (kKeyStages): it
  // does not look at the barriers of tiles that it skips, and a parity tells one phase only.
  static constexpr int kValueBarriers = 8;

  static constexpr int kQueryBytes = kRowsPerWarpgroup * kDim * 2;  // of one warpgroup
  static constexpr int kTileBytes = kKeys * kDim * 2;
  static constexpr int kQueryPanelBytes = kRowsPerWarpgroup * kPanelRowBytes;
  static constexpr int kKeyPanelBytes = kKeys * kPanelRowBytes;

  // Of 65,536: 128 threads of the producer, 128 of each consumer.
  static constexpr int kProducerRegisters = kDim == 256 ? 24 : kWarpgroups == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kDim == 256 ? 240 : kWarpgroups == 3 ? 160 : 232;
  static_assert(128 * (kProducerRegisters + kWarpgroups * kConsumerRegisters) <= 65536);

  struct Barriers {
    uint64_t query_full, query_empty;
    uint64_t key_full[kKeyStages], key_empty[kKeyStages];
    uint64_t value_full[kValueBarriers], value_done[kValueBarriers];  // of visit v: v % that
    uint64_t work_full[2], work_empty[2];
  };
  struct Shared {
    alignas(1024) uint8_t query[kWarpgroups][kQueryBytes];
    alignas(1024) uint8_t key[kKeyStages][kTileBytes];
    alignas(1024) uint8_t value[kValueStages][kTileBytes];
    Barriers barriers;
    Work work[2];
    // The newest visit that each warpgroup has decided on: 2 * visit + kept.
    int decision[kValueStages][kWarpgroups];
    // Of each warp's rows; tiles alternate. Reports only.
    float gap[2][kWarpgroups][4], maximum[2][kWarpgroups][4];
  };
};

}  // namespace blasst::cuda::prefill
