// Queries, keys and values into shared memory, by all threads of a block.
#pragma once

#include <cstdint>

#include "cuda/core/keys.cuh"
#include "cuda/core/prefill/rows.cuh"
#include "cuda/sm80/core/copies.cuh"
#include "cuda/sm80/prefill/config.cuh"

namespace blasst::cuda::prefill::sm80 {

template <typename C>
__device__ __forceinline__ void copy_queries(const Params& p, const Tensor& q, const Work& work,
                                             uint32_t destination) {
  const auto* first = static_cast<const uint16_t*>(q.data) + work.head * q.stride_head +
                      row_in_tensor(p, work.request, work.output_row) * q.stride_token;
  if (!p.cu_seqlens_q) first += work.request * q.stride_outer;
  using Copies = ThreadCopies<typename C::Queries, C::kThreads>;
  Copies::start(destination, [&](int pass) {
    const int row = Copies::row() + pass * Copies::kPassRows;
    return row < work.rows ? first + row * q.stride_token + Copies::element() : nullptr;
  });
}

// Copies keys or values of an item, a tile at a time.
template <typename C, typename Tile>
class KeyCopies {
 public:
  __device__ __forceinline__ KeyCopies(const Params& p, const Tensor& tensor, const Work& work)
      : p_(p), tensor_(tensor), source_(p, work), keys_(ptx::warp_uniform(work.keys)) {
    first_ = static_cast<const uint16_t*>(tensor.data) + source_.kv_head * tensor.stride_head;
    if (!p_.keys.page_table)
      first_ += source_.outer * tensor.stride_outer + source_.first_token * tensor.stride_token;
  }

  // Those of a tile; zeros behind the last.
  __device__ __forceinline__ void start(uint32_t destination, int tile) const {
    const int first_key = tile * Tile::kRows;
    if (!p_.keys.page_table && first_key + Tile::kRows <= keys_)
      Copies::start_whole(destination, first_ + first_key * tensor_.stride_token,
                          tensor_.stride_token);
    else
      start_checked(destination, first_key);
  }

 private:
  using Copies = ThreadCopies<Tile, C::kThreads>;

  __device__ __forceinline__ void start_checked(uint32_t destination, int first_key) const {
    const int page_bits = 31 - __clz(p_.keys.page_size);  // a power of two
    Copies::start(destination, [&](int pass) -> const uint16_t* {
      const int token = first_key + Copies::row() + pass * Copies::kPassRows;
      if (token >= keys_) return nullptr;
      const uint16_t* from = first_ + Copies::element();
      if (!p_.keys.page_table) return from + token * tensor_.stride_token;
      const int page = source_.pages[token >> page_bits];
      if (page < 0 || page >= p_.keys.pages) return nullptr;
      return from + page * tensor_.stride_outer +
             (token & (p_.keys.page_size - 1)) * tensor_.stride_token;
    });
  }

  const Params& p_;
  const Tensor& tensor_;
  const KeySource source_;
  const int keys_;
  const uint16_t* first_;
};

}  // namespace blasst::cuda::prefill::sm80
