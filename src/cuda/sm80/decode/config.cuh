// What the parts of the decode kernel share: its shared memory, and what is compiled into it.
#pragma once

#include <cstdint>

#include "cuda/core/decode/params.h"
#include "cuda/core/decode/rows.cuh"
#include "cuda/core/decode/work.cuh"
#include "cuda/core/tensor.h"
#include "cuda/sm80/core/panels.cuh"

namespace blasst::cuda::decode::sm80 {

inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kWarpKeys = kTileKeys / kWarps;

// kRows: query rows, rounded up. Queries and keys have kQkDim elements, values kValueDim.
template <typename T, int kQkDim_, int kValueDim_, int kRows_, Variant kVariant>
struct Config {
  using Element = T;
  using Work = Item;
  static constexpr int kQkDim = kQkDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr int kRows = kRows_;
  static constexpr bool kTests = kVariant != Variant::kDense;
  static constexpr bool kReports = kVariant == Variant::kReport;
  static constexpr bool kFiniteKeys = false;

  using Keys = Panels32<kWarpKeys, kQkDim>;  // of a warp
  using Values = Panels32<kWarpKeys, kValueDim>;
  using Queries = Panels32<kRows, kQkDim>;

  // What belongs to a tile, until its values are added.
  struct Stage {
    alignas(128) uint8_t keys[kWarps][Keys::kBytes];
    alignas(128) uint8_t values[kWarps][Values::kBytes];
    // Of each warp's keys and every eight rows, as lanes hold them for the product.
    uint2 probabilities[kWarps][kRows / 8][32];
    float factors[kRows];  // for results before a kept tile is added
    int pages[kWarps];     // of each warp's keys
  };
  struct Shared {
    alignas(128) uint8_t queries[Queries::kBytes];
    SharedRows<kRows> rows;
    int next_item;
    Stage stages[1];  // as many as the launch has room for
  };
};

// Where the tensors are, and what the launch adds to the plan.
struct Sources {
  Tensor q, k, v;
  int stages;
};

}  // namespace blasst::cuda::decode::sm80
