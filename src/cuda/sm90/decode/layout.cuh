// Shared memory of the decode kernel, and what travels with a tile.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/sm90/decode/params.h"

namespace blasst::cuda::decode {

inline constexpr int kPanel = 64;  // elements of a swizzled row: 128 bytes
inline constexpr int kPanelBytes = kTileKeys * kPanel * 2;
inline constexpr int kConsumerWarps = 4;
inline constexpr int kConsumers = 32 * kConsumerWarps;
inline constexpr int kThreads = kConsumers + 32;  // and the warp that feeds them
inline constexpr int kMostCombineThreads = 256;
inline constexpr int kMostBoxes = 4;  // pages of 16 tokens in a tile

// Work of a block: a split or a group of splits of one request and KV head.
struct Item {
  int request, kv_head;
  int slot;                  // of its result
  int keys;                  // of the request
  int first_key;             // where the request begins in the tensor
  int tile_begin, tile_end;  // of the whole visit
  int split_tiles;
  int begin, end;  // positions in the visit
};

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

// Written and read by one lane, which shares it with its warp.
struct Tile {
  int index;
  int flags;
  int pages[kMostBoxes];
};

// kRows: query rows, rounded up.
template <int kDim, int kRows>
struct Layout {
  static constexpr int kPanels = kDim / kPanel;
  static constexpr int kTileBytes = kPanels * kPanelBytes;
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static constexpr int kProbabilityBytes = kRows * kTileKeys * 2;

  // Two blocks share a multiprocessor where 113 KiB and 168 registers a thread are enough.
  static constexpr int kBlocks = kDim == 256 || kRows > 16 ? 1 : 2;

  // Kept tiles whose values are on their way, and the one that is added.
  static constexpr int kValueStages = kDim == 256    ? (kRows > 16 ? 2 : 3)
                                      : kBlocks == 1 ? 4
                                                     : (kDim == 128 ? 3 : 4);
  static constexpr int kBudget = (kBlocks == 2 ? 113 : 227) * 1024 - 2 * kQueryBytes -
                                 kValueStages * kProbabilityBytes - 2048 - 64 * kRows;
  static constexpr int kFit = kBudget / kTileBytes - kValueStages;
  static constexpr int kKeyStages = kFit < 8 ? kFit : 8;
  static_assert(kKeyStages >= 2, "keys need two stages");

  struct Shared {
    alignas(1024) std::byte keys[kKeyStages][kTileBytes];
    alignas(1024) std::byte values[kValueStages][kTileBytes];
    alignas(1024) std::byte queries[2][kQueryBytes];
    alignas(1024) std::byte probabilities[kValueStages][kProbabilityBytes];
    float factors[kValueStages][kRows];      // for results before a kept tile is added
    float maxima[2][kConsumerWarps][kRows];  // of each warp's keys; tiles alternate
    float sums[kConsumerWarps][kRows];
    float below[2][kRows];  // of an item: what the tested value must stay below for a skip
    int nan[2][kConsumerWarps];
    Item items[2];
    Tile tiles[kKeyStages];
    int kept[kValueStages];  // tile index
    // Of a stage's Tile, with the Item of an item's first; of its keys. keys_empty frees both.
    uint64_t tiles_full[kKeyStages], keys_full[kKeyStages], keys_empty[kKeyStages];
    uint64_t values_full[kValueStages];
    uint64_t queries_full[2], queries_empty[2];
  };
};

// A position in a ring of stages.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

}  // namespace blasst::cuda::decode
