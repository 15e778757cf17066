// What attends to what: the arguments that prefill, decode and the backward pass share, and where
// a call runs.
#pragma once

#include <torch/csrc/stable/accelerator.h>

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

  template <typename Params>
  void set(Params& p) const {
    p.backend = backend_;
    p.threads = threads_;
    if constexpr (requires { p.stream; }) p.stream = stream_;
  }
  void* stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  Backend backend_ = BLASST_BACKEND_CPU;
  int32_t threads_ = 0;
  void* stream_ = nullptr;
};

// Checks the arguments against each other and fills the part of the parameters that they make; the
// core checks the rest. The tensors are made fit to be read in place and must outlive the call.
// What is left out: starts and query_lengths. For PrefillParams and DecodeParams.
template <typename Params>
void describe(Params& p, Arguments& a);

// The block mask is of the tiles that the call decides on. CUDA's arrays are not read here.
template <typename Params>
void check_blocks(const Params& p, const OptionalTensor& blocks);

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles of a call, as many as there may be: what is in index arrays is not looked at, so that the
// sizes of reports follow from the sizes of tensors.
struct Tiles {
  int64_t heads, query_tiles, key_tiles;  // query tiles of all requests; key tiles of the longest

  int64_t bit_words() const { return heads * query_tiles * ceil_div(key_tiles, 32); }
};

template <typename Params>
Tiles tiles_of(const Params& p, const Arguments& a);

}  // namespace blasst::binding
