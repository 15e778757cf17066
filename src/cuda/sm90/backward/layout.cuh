// Shared memory of the backward kernel, and how its threads are split.
#pragma once

#include <cstdint>

#include "cuda/core/backward/places.cuh"
#include "cuda/sm90/backward/shape.h"
#include "cuda/sm90/core/panels.cuh"
#include "cuda/sm90/core/ptx.cuh"
#include "cuda/sm90/prefill/shape.h"

namespace blasst::cuda::backward {

// Whose gradients a block of threads finds. Those rows stay in shared memory; what they meet passes
// by, in blocks of 64, or of passing_rows():
//            stays      passes by   scores    weights' gradients   sums
//   kKeys    K, V       Q, dout     K Q^T     V dout^T             dv += P^T dout, dk += dS^T Q
//   kQueries Q, dout    K, V        Q K^T     dout V^T             dq += dS K
enum class Side { kKeys, kQueries };

// What a block of threads works on.
struct Work {
  bool any;  // false: nothing
  int request;
  int kv_head;
  int head;     // kKeys: the first; kQueries: of the rows
  int heads;    // kKeys: the group's, or one of them
  int tile;     // kKeys: of the request's keys; kQueries: the first of the request's query tiles
  float* sums;  // kKeys: where to leave dk and dv of one of several parts; null: they are whole
  RequestSpans spans;
};

// What a block that passes by is: its rows or keys, and who has to do with it.
struct alignas(16) Step {
  int first;        // position of its first row, or its first key
  int count;        // rows or keys from there on
  unsigned wanted;  // bit w: by warpgroup w; bit kWarpgroups + w: masked there; 0: no more blocks
  int least, most;  // distances that the head looks across
};

template <Side kSide_, int kQkDim_, int kValueDim_, bool kCapped_>
struct Layout {
  static constexpr Side kSide = kSide_;
  static constexpr int kQkDim = kQkDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr bool kCapped = kCapped_;  // scores have a soft cap
  static constexpr int kThreads = 128 * (1 + kWarpgroups);
  static constexpr int kConsumerWarps = 4 * kWarpgroups;
  static constexpr int kTileKeys = prefill::tile_keys(kQkDim);

  // Operands of scores are the first, of weights' gradients the second.
  static constexpr int kBoxRows = passing_rows(kQkDim);  // of q and dout, that a copy takes
  static constexpr int kPassing = kSide == Side::kKeys ? kBoxRows : kBlock;
  using FirstFixed = Panels<kBlock, kQkDim>;
  using SecondFixed = Panels<kBlock, kValueDim>;
  using First = Panels<kPassing, kQkDim>;
  using Second = Panels<kPassing, kValueDim>;
  // Where sums of two gradients do not fit in a warpgroup's registers, one finds dv and hands the
  // weights over to the other, which finds dk.
  static constexpr bool kByGradient = kSide == Side::kKeys && kQkDim == 256;
  static constexpr int kFixedBlocks = kByGradient ? 1 : kWarpgroups;
  static constexpr int kFirstStages = kQkDim == 256 ? 2 : kPassing == kBlock ? 4 : 6;
  static constexpr int kSecondStages =
      kQkDim > 128 && kSide == Side::kQueries ? kFirstStages - 1 : kFirstStages;
  static constexpr int kHandovers = 2;

  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  static_assert(kProducerRegisters + kWarpgroups * kConsumerRegisters <=
                (1 + kWarpgroups) * ptx::starting_registers(kThreads));

  struct Barriers {
    uint64_t fixed_full;
    uint64_t first_full[kFirstStages], first_empty[kFirstStages];
    uint64_t second_full[kSecondStages], second_empty[kSecondStages];
    uint64_t weights_full[kHandovers], weights_empty[kHandovers];  // kByGradient only
  };
  struct Shared {
    alignas(1024) uint8_t first_fixed[kFixedBlocks][FirstFixed::kBytes];
    alignas(1024) uint8_t second_fixed[kFixedBlocks][SecondFixed::kBytes];
    alignas(1024) uint8_t first[kFirstStages][First::kBytes];
    alignas(1024) uint8_t second[kSecondStages][Second::kBytes];
    RowBlock rows[kSide == Side::kKeys ? kFirstStages : 1];  // of first; kPassing of each
    Step step[kFirstStages];                                 // of first
    float weights[kByGradient ? kHandovers : 1][kByGradient ? kPassing / 2 : 1][128];
    Work work;
    Barriers barriers;
  };
};

}  // namespace blasst::cuda::backward
