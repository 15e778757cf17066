// What attends to what: the arguments that prefill, decode and the backward pass share, and where
// a call runs.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <optional>

#include "blasst/blasst.hpp"
#include "tensors.h"

namespace blasst::binding {

struct Arguments {
  Tensor q, k, v;
  OptionalTensor starts = {}, lengths = {}, query_lengths = {};
  OptionalTensor cu_seqlens_q = {}, cu_seqlens_k = {}, page_table = {};
  std::optional<int64_t> max_seqlen_q = {}, max_seqlen_k = {};
  double scale = 0, softcap = 0;
  OptionalTensor sinks = {};
  bool causal = false;
  int64_t window_left = -1, window_right = -1;
  OptionalTensor bands = {}, blocks = {};
  OptionalTensor k_scale = {}, v_scale = {};  // of k and v in 8 bits

  int64_t rows() const { return cu_seqlens_q ? q.size(0) : q.size(0) * q.size(1); }
};

// The arguments of an operator between v and what it decides by, as torch passes them, and the
// struct of them; it takes q, k, v, max_seqlen_q and max_seqlen_k, too.
#define BLASST_ARGUMENTS                                                                    \
  OptionalTensor starts, OptionalTensor lengths, OptionalTensor query_lengths,              \
      OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor page_table,  \
      double scale, double softcap, OptionalTensor sinks, bool causal, int64_t window_left, \
      int64_t window_right, OptionalTensor bands, OptionalTensor blocks
#define BLASST_ARGUMENTS_GIVEN                                                                     \
  Arguments {                                                                                      \
    q, k, v, starts, lengths, query_lengths, cu_seqlens_q, cu_seqlens_k, page_table, max_seqlen_q, \
        max_seqlen_k, scale, softcap, sinks, causal, window_left, window_right, bands, blocks      \
  }

// The device of a call's tensors and torch's stream there, or torch's number of threads.
class Place {
 public:
  explicit Place(const Tensor& first);

  const Execution& execution() const { return execution_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  Execution execution_;
};

enum class Phase { kPrefill, kDecode };

// Checks the arguments of a phase against each other and makes the problem that they describe; the
// core checks the rest. The tensors are made fit to be read in place and must outlive the call. Of
// `out`, the type alone.
Problem describe(Arguments& a, Phase phase);

Plan plan(const AttentionParams& p, Phase phase);

// The block mask is of the tiles that the call decides on. CUDA's arrays are not read here.
void check_blocks(const AttentionParams& p, Phase phase, const OptionalTensor& blocks);

// Words of tile bits.
inline int64_t bit_words(const Plan& plan) {
  return plan.tile_heads * plan.query_tiles * plan.tile_words;
}

}  // namespace blasst::binding
