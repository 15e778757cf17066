// Shared memory of the prefill kernel, and how its threads are split.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/core/prefill/params.h"
#include "cuda/core/prefill/work.cuh"
#include "cuda/sm90/core/panels.cuh"
#include "cuda/sm90/core/ptx.cuh"
#include "cuda/sm90/prefill/shape.h"

namespace blasst::cuda::prefill {

// A tensor tile [rows, dim] lies as dim / 64 panels of [rows, 64]. Queries and keys have kQkDim
// elements, values and outputs kValueDim. With scores in int8 keys are bytes.
template <int kQkDim, int kValueDim, Scores kScores, bool kTests>
struct Layout {
  static constexpr bool kInt8 = kScores == Scores::kInt8;
  static constexpr int kWarpgroups = warpgroups(kQkDim);
  static constexpr int kRowsPerBlock = rows_per_block(kQkDim);
  static constexpr int kThreads = 128 * (1 + kWarpgroups);
  static constexpr int kConsumerWarps = 4 * kWarpgroups;
  static constexpr int kKeys = tile_keys(kQkDim);
  // Outputs leave through shared memory where there is room for them. With a test a fourth stage of
  // keys is worth more at d = 128 than they are.
  static constexpr bool kStagedOutputs = kQkDim <= 64 || (kQkDim == 128 && (kInt8 || !kTests));
  static constexpr int kKeyStages = kQkDim == 256   ? (kInt8 ? 4 : 3)
                                    : kQkDim == 192 ? 2
                                    : kQkDim == 128 ? (kInt8            ? 6
                                                       : kStagedOutputs ? 3
                                                                        : 4)
                                                    : (kInt8 ? 6 : 4);
  // Parts of a key tile that come and are given back on their own: where there are two stages, the
  // first part's place is needed before the last one's product is done.
  static constexpr int kKeyParts = kQkDim == 192 ? 3 : 1;
  static constexpr int kValueStages = 2;
  // Tiles that a warpgroup can be ahead of the values' producers. Of barriers there are twice as
  // many: it does not look at those of tiles that it skips, and a parity tells one phase only.
  static constexpr int kMostAhead = kInt8 ? 8 : 4;
  static constexpr int kValueBarriers = 2 * kMostAhead;

  using Queries = Panels<kQueryTileRows, kQkDim>;  // of one warpgroup
  using Keys = std::conditional_t<kInt8, BytePanels<kKeys, kQkDim>, Panels<kKeys, kQkDim>>;
  using KeyPart = Panels<kKeys, kQkDim / kKeyParts>;  // of exact scores
  using Values = Panels<kKeys, kValueDim>;
  using Outputs = Panels<kQueryTileRows, kValueDim>;  // of one warpgroup
  // Three warpgroups have no registers for queries.
  static constexpr bool kRoundedQueries = kInt8 && kWarpgroups == 3;
  using RoundedQueries = BytePanels<kQueryTileRows, kQkDim>;

  static constexpr int kProducerRegisters = kValueDim == 256 ? 24 : kWarpgroups == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kValueDim == 256 ? 240 : kWarpgroups == 3 ? 160 : 232;
  static_assert(kProducerRegisters + kWarpgroups * kConsumerRegisters <=
                (1 + kWarpgroups) * ptx::starting_registers(kThreads));

  struct Barriers {
    uint64_t query_full, query_empty;
    uint64_t key_full[kKeyStages][kKeyParts], key_empty[kKeyStages][kKeyParts];
    uint64_t value_full[kValueBarriers], value_done[kValueBarriers];  // of visit v: v % that
    uint64_t
        settled[kMostAhead];  // tests only: the values of visit v were loaded, or are not wanted
    uint64_t output_full[kWarpgroups], output_empty[kWarpgroups];
    uint64_t work_full[2], work_empty[2];
  };
  struct Shared {
    alignas(1024) uint8_t query[kWarpgroups][Queries::kBytes];
    alignas(1024) uint8_t key[kKeyStages][Keys::kBytes];
    alignas(1024) uint8_t value[kValueStages][Values::kBytes];
    alignas(1024)
        uint8_t output[kStagedOutputs ? kWarpgroups : 1][kStagedOutputs ? Outputs::kBytes : 16];
    // Queries in bytes, where they do not stay in registers. Each warpgroup writes its own.
    alignas(1024) uint8_t rounded_query[kRoundedQueries ? kWarpgroups : 1]
                                       [kRoundedQueries ? RoundedQueries::kBytes : 16];
    KeyTileUnit unit[kInt8 ? kKeyStages : 1];  // of key; scores in int8 only
    Barriers barriers;
    Work work[2];
    // The newest visit that each warpgroup has decided on: 2 * visit + kept.
    int decision[kValueStages][kWarpgroups];
    // Of each warp's rows; tiles alternate. Reports only.
    float gap[2][kWarpgroups][4], maximum[2][kWarpgroups][4];
  };
};

}  // namespace blasst::cuda::prefill
