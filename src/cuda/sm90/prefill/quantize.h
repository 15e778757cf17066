// Keys rounded to bytes, for scores in int8. No CUDA types here.
//
// Of each request and KV head, in float32 and in this order: the mean of the finite elements of its
// keys (summed in double, in which it does not depend on the order) is taken off; each key is
// rotated by the Hadamard matrix of `dim` (butterflies from the lowest bit of the element's number
// on, not scaled); a tile of keys is rounded to -127..127 in units of its largest magnitude / 127,
// whose scale 1 / sqrt(dim) goes into the unit.
//
// Within 16 elements, byte 4 l + 2 h + e is element 8 h + 2 l + e: what a thread holds of a row in
// the fragments of 16-bit products is then what it needs of it in those of bytes.
//
// A key that is not finite is marked (BrokenKeys): its scores are NaN, those of its neighbours are
// not.
//
// Keys that are int8 already are only put in that order; their scale is the unit of their tiles.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/core/prefill/params.h"
#include "cuda/core/tensor.h"

namespace blasst::cuda::prefill {

// Where a call's bytes lie in its workspace.
struct QuantizedLayout {
  int64_t tiles;  // of each KV head
  // Offsets of the arrays, and the end; the data is at 0. Stored bytes have neither means nor sums.
  std::size_t units, broken, means, sums, bytes;
};

// tokens: of a ragged batch's keys; -1: requests have room for key_length keys each.
constexpr QuantizedLayout quantized_layout(int64_t batch, int64_t kv_heads, int64_t key_length,
                                           int64_t tokens, int dim, int tile_keys, bool as_stored) {
  const int64_t tiles =
      tokens < 0 ? batch * ((key_length + tile_keys - 1) / tile_keys) : tokens / tile_keys + batch;
  const auto all = static_cast<std::size_t>(tiles * kv_heads);
  const auto width = static_cast<std::size_t>(dim);
  QuantizedLayout l{};
  l.tiles = tiles;
  l.units = all * width * static_cast<std::size_t>(tile_keys);
  l.broken = l.units + all * sizeof(KeyTileUnit);
  l.means = l.broken + all * sizeof(BrokenKeys);
  l.sums = l.means + static_cast<std::size_t>(batch * kv_heads) * width * sizeof(float);
  l.bytes = as_stored ? l.means : l.sums + all * width * sizeof(double);
  return l;
}

// Enqueues the rounding of all keys, into params.quantized.
void quantize_keys(const Params& params, const Tensor& k, Element element, int dim, void* stream);

// The same of keys in int8, with their scales.
void arrange_keys(const Params& params, const Tensor& k, const blasst_scales& scales, int dim,
                  void* stream);

}  // namespace blasst::cuda::prefill
