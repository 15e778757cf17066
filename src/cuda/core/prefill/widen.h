// Prefill over keys and values in 8 bits: they are brought to the type of the queries first, in the
// workspace. That costs 1 byte read and 2 written an element, where prefill then multiplies each
// with every query behind it. Keys in int8 whose bytes are what scores are made of stay as they
// are. No CUDA types here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "blasst/blasst.hpp"
#include "cuda/core/params.h"
#include "cuda/core/tensor.h"
#include "problem/element.h"

namespace blasst::cuda::prefill {

// A tensor that is copied: element times scale, rounded once to the type of the queries; or its
// bytes, out of pages.
struct Widened {
  Tensor from;
  DType type, to_type;   // of 8 bits, or the queries' own
  blasst_scales scales;  // by request and KV head
  void* to;              // [outer, tokens, kv_heads, dim] of the new call; null: it stays
  int64_t tokens;
};

struct Widening {
  // The same call over keys and values in the type of q: dense where they were paged. What is
  // copied begins its caller's workspace; its own is what follows.
  AttentionParams params;
  std::size_t bytes;  // of the workspace that they take, a multiple of 256

  Widened k, v;
  KeyLayout keys;  // as given
  int batch, kv_heads;
  DType element;  // of q
};

inline bool needs_widening(const AttentionParams& params) {
  const KeysValues& kv = params.problem.kv;
  const bool takes_bytes = problem::scores_take_bytes(params.decision.scores, kv.k.dtype);
  return (problem::is_8_bits(kv.k.dtype) && !takes_bytes) || problem::is_8_bits(kv.v.dtype);
}

// Of a call that needs it, from its scalars; for this backend. Throws Error.
Widening plan_widening(std::string_view backend, const AttentionParams& params);

// The views that it reads. Throws Error.
void check_widening(std::string_view backend, const AttentionParams& params);

// Enqueues it.
void widen(const Widening& widening);

}  // namespace blasst::cuda::prefill
