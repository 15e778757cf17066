// Shared memory of the kernel, and what its warpgroups tell each other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/core/decode/params.h"
#include "cuda/sm90/core/panels.cuh"
#include "cuda/sm90/core/ptx.cuh"
#include "cuda/sm90/decode/latent/shape.h"
#include "cuda/sm90/decode/layout.cuh"

namespace blasst::cuda::decode::latent {

// A warpgroup that feeds and two that compute. The first of those, left, scores and decides; of the
// outputs each has one half of the columns.
inline constexpr int kBlockThreads = 384;
inline constexpr int kFeedRegisters = 72, kLeftRegisters = 248, kRightRegisters = 184;
static_assert(kFeedRegisters + kLeftRegisters + kRightRegisters <=
              3 * ptx::starting_registers(kBlockThreads));

inline constexpr int kStages = 2;  // all that there is room for beside the queries
inline constexpr int kHalfDim = kValueDim / 2;

using Latents = Panels<kTileKeys, kQkDim>;
using Queries = Panels<kMostRows, kQkDim>;
using Probabilities = Panels<kMostRows, kTileKeys>;

// A tile comes, and its room is given back, in pieces: what only scores need, and the values of
// either half.
enum Piece { kRotary, kLeft, kRight, kPieces };
__device__ __forceinline__ constexpr int first_panel(Piece piece) {
  return piece == kRotary ? 8 : piece == kLeft ? 0 : 4;
}
__device__ __forceinline__ constexpr int panels(Piece piece) { return piece == kRotary ? 1 : 4; }

// What the left warpgroup tells the right one.
struct Message {
  enum Kind : int { kAdd, kWrite, kStop };
  int kind;
  int stage, parity;           // kAdd: of the tile, in the ring
  int valid_begin, valid_end;  // kAdd: keys of the tile that some row sees
  int slot, rows;              // kWrite: of the result
};

struct Shared {
  alignas(1024) std::byte latents[kStages][Latents::kBytes];
  alignas(1024) std::byte queries[Queries::kBytes];
  alignas(1024) std::byte probabilities[Probabilities::kBytes];  // of a message
  float factors[kMostRows];  // of a message: for earlier outputs
  float below[kMostRows];    // of an item: what the tested value must stay below for a skip
  float gap[4];              // of each warp's rows; reports only
  Message message;
  Item item;
  TileInfo tiles[kStages];
  // A tile's info comes with its rotary piece, an item with its queries.
  uint64_t full[kStages][kPieces], empty[kStages][kPieces];
  uint64_t queries_full, queries_empty, message_full, message_empty;
};
static_assert(sizeof(Shared) <= 227 * 1024);

template <typename T, Variant kVariant_>
struct Config {
  using Element = T;
  static constexpr bool kTests = kVariant_ != Variant::kDense;
  static constexpr bool kReports = kVariant_ == Variant::kReport;
};

// Where a thread's scores and outputs are (core/fragment.cuh): rows of its warp's 16, columns of
// every 8.
struct ThreadPlace {
  const int warp = ptx::warp_uniform(threadIdx.x % 128 / 32);
  const int lane = threadIdx.x % 32;
  __device__ __forceinline__ int row(int r) const { return 16 * warp + lane / 4 + 8 * r; }
  __device__ __forceinline__ int column() const { return 2 * (lane % 4); }
};

}  // namespace blasst::cuda::decode::latent
