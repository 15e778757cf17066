// What the parts of the prefill kernel share: its shared memory, and how its threads are split.
#pragma once

#include <cstdint>

#include "cuda/core/prefill/params.h"
#include "cuda/core/prefill/work.cuh"
#include "cuda/core/tensor.h"
#include "cuda/sm80/core/panels.cuh"
#include "cuda/sm80/prefill/shape.h"

namespace blasst::cuda::prefill::sm80 {

// Where a thread's rows of one strip are (core/prefill/reports.cuh). A query tile belongs to
// 64 / (16 * kStrips) neighbouring warps.
template <int kStrips>
struct Place {
  static constexpr int kTileWarps = kQueryTileRows / 16 / kStrips;
  int warp;   // of the block
  int which;  // of the warp's strips
  __device__ __forceinline__ int tile() const { return warp / kTileWarps; }
  __device__ __forceinline__ int strip() const { return warp % kTileWarps * kStrips + which; }
  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }
  __device__ __forceinline__ int rank() const { return strip() * 32 + lane(); }
  __device__ __forceinline__ int row(int r) const { return strip() * 16 + lane() / 4 + 8 * r; }
  __device__ __forceinline__ int column() const { return 2 * (lane() % 4); }
};

// Where a block's item reads keys and values (copy.cuh).
struct ItemSources {
  const uint16_t *keys, *values;
  const int* pages;  // null: not paged
};

template <typename T, int kQkDim_, int kValueDim_, Variant kVariant_>
struct Config {
  using Element = T;
  static constexpr int kQkDim = kQkDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr Variant kVariant = kVariant_;
  static constexpr bool kTests = kVariant_ != Variant::kDense;

  static constexpr int kQueryTiles = query_tiles(kValueDim);
  static constexpr int kRowsPerBlock = rows_per_block(kValueDim);
  static constexpr int kKeys = tile_keys(kQkDim);

  // A warp has 16 or 32 rows. Two strips of 16 use a fragment of keys or values twice, which halves
  // what is read from shared memory; outputs of 256 leave registers for one.
  static constexpr int kStrips = kValueDim > 128 ? 1 : 2;
  static constexpr int kWarps = kRowsPerBlock / 16 / kStrips;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTileWarps = kQueryTileRows / 16 / kStrips;  // that decide together
  using Place = sm80::Place<kStrips>;

  static constexpr int kStages = 2;  // of keys, and of values

  using Queries = Panels32<kRowsPerBlock, kQkDim>;
  using Keys = Panels32<kKeys, kQkDim>;
  using Values = Panels32<kKeys, kValueDim>;

  struct Shared {
    alignas(128) uint8_t query[Queries::kBytes];
    alignas(128) uint8_t key[kStages][Keys::kBytes];
    alignas(128) uint8_t value[kStages][Values::kBytes];
    Work work;
    ItemSources sources;
    // Of each strip's rows; tiles alternate. Reports only.
    float gap[2][2][4], maximum[2][2][4];
  };
};

// Where the tensors are.
struct Sources {
  Tensor q, k, v;
};

}  // namespace blasst::cuda::prefill::sm80
