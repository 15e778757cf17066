// Shared memory of the decode kernel, and what travels with a tile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/core/decode/params.h"
#include "cuda/core/decode/rows.cuh"
#include "cuda/core/decode/work.cuh"
#include "cuda/sm90/core/panels.cuh"
#include "cuda/sm90/decode/digits.cuh"
#include "cuda/sm90/decode/places.cuh"

namespace blasst::cuda::decode {

inline constexpr int kConsumers = 32 * kWarps;

struct CacheItem : Item {  // of keys in 8 bits
  float k_scale, v_scale;
};

// kRows: query rows, rounded up. Queries and keys have kQkDim elements, values kValueDim.
template <int kQkDim, int kValueDim, int kRows, Cache kCache = Cache::kOfQueries>
struct Layout {
  // In 8 bits.
  static constexpr bool kNarrowKeys = narrow_keys(kCache), kNarrowValues = narrow_values(kCache);
  using Work = std::conditional_t<kNarrowKeys, CacheItem, Item>;
  template <int kDim, bool kNarrow>
  using Cached = std::conditional_t<kNarrow, BytePanels<kTileKeys, kDim>, Panels<kTileKeys, kDim>>;
  using Keys = Cached<kQkDim, kNarrowKeys>;
  using Values = Cached<kValueDim, kNarrowValues>;
  using Queries = Panels<kRows, kQkDim>;
  using QueryDigits = BytePanels<kNarrowKeys ? kQueryDigits * kRows : 0, kQkDim>;
  using Probabilities =
      std::conditional_t<kNarrowValues, BytePanels<kProbabilityDigits * kRows, kTileKeys>,
                         Panels<kRows, kTileKeys>>;

  // Two blocks share a multiprocessor where 113 KiB and 168 registers a thread are enough; three
  // where 75 KiB and 128 are, which leave no room for a warp that feeds values.
  static constexpr bool kSmall = kNarrowValues && kValueDim <= 128 && kRows <= 16;
  static constexpr int kBlocks = kValueDim == 256 || kRows > (kQkDim == 192 ? 8 : 16) ? 1
                                 : kSmall                                             ? 3
                                                                                      : 2;
  static constexpr bool kFeedsValues = kBlocks < 3;
  static constexpr int kThreads = kConsumers + 32 + kFeedsValues * 32;

  // Kept tiles whose values are on their way, and the one that is added.
  static constexpr int kValueStages = kValueDim == 256 ? (kRows > 16 ? 2 : 3)
                                      : kBlocks == 1   ? 4
                                                       : (kValueDim == 128 ? 3 : 4);
  static constexpr int kRoom = kBlocks == 3 ? 75 : kBlocks == 2 ? 113 : 227;  // KiB
  static constexpr int kBudget = kRoom * 1024 - 2 * Queries::kBytes - QueryDigits::kBytes -
                                 kValueStages * (Values::kBytes + Probabilities::kBytes) - 2048 -
                                 64 * kRows;
  static constexpr int kFit = kBudget / Keys::kBytes;
  static constexpr int kKeyStages = kFit < 8 ? kFit : 8;
  static_assert(kKeyStages >= 2, "keys need two stages");

  struct StoredSoftmax {
    float maximum[kRows], sum[kRows];
  };

  struct Shared {
    alignas(1024) std::byte keys[kKeyStages][Keys::kBytes];
    alignas(1024) std::byte values[kValueStages][Values::kBytes];
    alignas(1024) std::byte queries[2][Queries::kBytes];
    alignas(1024) std::byte probabilities[kValueStages][Probabilities::kBytes];
    alignas(kNarrowKeys ? 1024 : 1) std::byte query_digits[kNarrowKeys ? QueryDigits::kBytes : 1];
    float factors[kValueStages][kRows];  // for results before a kept tile is added
    float weights[kNarrowValues ? kValueStages : 1][kNarrowValues ? kRows : 1];  // for its own
    float below[2][kRows];  // of an item: what the tested value must stay below for a skip
    // Of each warp: of the split before the one at hand, and of its group's earlier ones.
    StoredSoftmax before[kWarps], total[kWarps];
    SharedRows<kRows> rows;
    Work items[2];
    Tile tiles[kKeyStages];     // of keys
    Tile wanted[kValueStages];  // of values, as they are asked for
    int kept[kValueStages];     // tiles whose values came, or are on their way
    // Of a stage's Tile, with the Item of an item's first; of its keys. keys_empty frees both.
    uint64_t tiles_full[kKeyStages], keys_full[kKeyStages], keys_empty[kKeyStages];
    uint64_t values_wanted[kValueStages], values_full[kValueStages];
    uint64_t queries_full[2], below_full[2], queries_empty[2];  // the last frees both
    float query_units[kNarrowKeys ? kRows : 1];  // of an item: of its queries' digits
  };
  static_assert(sizeof(Shared) <= kRoom * 1024);
};

// What is compiled into a kernel.
template <typename T, int kQkDim_, int kValueDim_, int kRows_, Variant kVariant_,
          Cache kCache_ = Cache::kOfQueries>
struct Config {
  static constexpr Cache kCache = kCache_;
  using Element = T;  // of queries and of probabilities, if they are not split into digits
  using Layout = decode::Layout<kQkDim_, kValueDim_, kRows_, kCache>;
  using Shared = typename Layout::Shared;
  using Work = typename Layout::Work;
  static constexpr int kQkDim = kQkDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr int kRows = kRows_;
  static constexpr bool kTests = kVariant_ != Variant::kDense;
  static constexpr bool kReports = kVariant_ == Variant::kReport;
  static constexpr bool kFiniteKeys = Layout::kNarrowKeys;  // 8 bits have no infinity
};

}  // namespace blasst::cuda::decode
