// One half of the outputs of a block's rows, which a warpgroup adds and writes.
#pragma once

#include "cuda/core/decode/params.h"
#include "cuda/core/fragment.cuh"
#include "cuda/core/tiles.h"
#include "cuda/sm90/core/ring.cuh"
#include "cuda/sm90/core/wgmma.cuh"
#include "cuda/sm90/decode/latent/layout.cuh"

namespace blasst::cuda::decode::latent {

using Outputs = float[kHalfDim / 2];         // a thread's
using PackedTile = uint32_t[kTileKeys / 4];  // a thread's probabilities, as wgmma's first operand

__device__ __forceinline__ void clear(Outputs& o) {
#pragma unroll
  for (int i = 0; i < kHalfDim / 2; ++i) o[i] = 0;
}

// The room of a piece of a tile may be filled again; each warp that has used it says so.
__device__ __forceinline__ void release(Shared& shared, int stage, Piece piece,
                                        const ThreadPlace& at) {
  ptx::mbarrier_arrive_if(address(shared.empty[stage][piece]), at.lane == 0);
}

template <Piece kPiece>
__device__ __forceinline__ uint32_t values_of(const Shared& shared, int stage) {
  return ptx::shared_address(shared.latents[stage]) + first_panel(kPiece) * Latents::kPanelBytes;
}

// Values that no row sees, outside `valid`, may be anything, NaN too, and are multiplied by zero.
// kPiece's number is that of the warpgroup's named barrier, too.
template <Piece kPiece>
__device__ __forceinline__ void clear_unseen(const Shared& shared, int stage, Range valid) {
  if (valid.begin <= 0 && valid.end >= kTileKeys) [[likely]]
    return;
  const uint32_t values = values_of<kPiece>(shared, stage);
  constexpr int kVectors = kPanelRowBytes / 16;  // of a swizzled row; swizzling stays within it
#pragma unroll 1
  for (int i = threadIdx.x % 128; i < panels(kPiece) * kTileKeys * kVectors; i += 128) {
    const int key = i / kVectors % kTileKeys;
    if (key < valid.begin || key >= valid.end)
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(values + 16 * i), "r"(0));
  }
  ptx::fence_proxy_async();
  ptx::named_barrier_sync(kPiece, 128);
}

// Starts to add the values of half kHalf, 0 or 1, of the keys of a tile in `stage`. kPiece: kLeft
// or kRight.
template <typename Element, Piece kPiece, int kHalf>
__device__ __forceinline__ void start_values(Shared& shared, int stage, const PackedTile& p,
                                             Outputs& o) {
  const uint64_t v = ptx::wgmma_descriptor(values_of<kPiece>(shared, stage), Latents::kPanelBytes);
  if constexpr (kHalf == 0) ptx::fence_registers(o);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kTileKeys / 32; ++i) {
    const int step = kHalf * kTileKeys / 32 + i;
    ptx::Wgmma<Element, kHalfDim>::add_registers_by_columns(
        o, p + 4 * step, ptx::advance(v, 16 * step * kPanelRowBytes));
  }
  ptx::wgmma_commit();
}

// They are added; their room goes back.
template <Piece kPiece>
__device__ __forceinline__ void finish_values(Shared& shared, int stage, const ThreadPlace& at,
                                              Outputs& o) {
  ptx::wgmma_wait<0>();
  ptx::fence_registers(o);
  release(shared, stage, kPiece, at);
}

template <Piece kPiece>
__device__ __forceinline__ void write_outputs(const Plan& plan, int slot, int rows,
                                              const ThreadPlace& at, const Outputs& o) {
  float* partial = plan.partial + int64_t{slot} * plan.rows * kValueDim +
                   (kPiece == kRight ? kHalfDim : 0) + at.column();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float* to = partial + int64_t{at.row(r)} * kValueDim;
#pragma unroll
    for (int j = 0; j < kHalfDim / 8; ++j) {
      if (at.row(r) < rows)
        *reinterpret_cast<float2*>(to + 8 * j) =
            make_float2(o[4 * j + 2 * r], o[4 * j + 2 * r + 1]);
    }
  }
}

// Probabilities on their way from one warpgroup to the other, as the copy engine would lay them.

__device__ __forceinline__ uint32_t address_of_matrix(uint32_t base, int row, int vector) {
  return base + row * kPanelRowBytes + 16 * (vector ^ row % 8);
}

__device__ __forceinline__ void store_probabilities(Shared& shared, const ThreadPlace& at,
                                                    const PackedTile& p) {
  const uint32_t base = ptx::shared_address(shared.probabilities);
#pragma unroll
  for (int step = 0; step < kTileKeys / 16; ++step) {
    const uint32_t to =
        address_of_matrix(base, 16 * at.warp + at.lane % 16, 2 * step + at.lane / 16);
    const uint32_t x[4] = {p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3]};
    ptx::store_matrices(to, x);
  }
}

__device__ __forceinline__ void load_probabilities(Shared& shared, const ThreadPlace& at,
                                                   PackedTile& p) {
  const uint32_t base = ptx::shared_address(shared.probabilities);
#pragma unroll
  for (int step = 0; step < kTileKeys / 16; ++step) {
    uint32_t x[4];
    ptx::load_matrices(
        x, address_of_matrix(base, 16 * at.warp + at.lane % 16, 2 * step + at.lane / 16));
#pragma unroll
    for (int i = 0; i < 4; ++i) p[4 * step + i] = x[i];
  }
}

}  // namespace blasst::cuda::decode::latent
