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

// Where an item's keys and values are: of its KV head, the request's first token; where there are
// pages, the first page.
__device__ __forceinline__ ItemSources sources_of(const Params& p, const Sources& sources,
                                                  const Work& work) {
  const KeySource source(p, work);
  const auto first = [&](const Tensor& tensor) {
    const auto* data =
        static_cast<const uint16_t*>(tensor.data) + source.kv_head * tensor.stride_head;
    return source.pages ? data
                        : data + source.outer * tensor.stride_outer +
                              source.first_token * tensor.stride_token;
  };
  return {first(sources.k), first(sources.v), source.pages};
}

// Copies keys or values of an item, a tile at a time. `first` and `pages` stay in shared memory:
// the loop around has no registers for them.
template <typename C, typename Tile>
class KeyCopies {
 public:
  __device__ __forceinline__ KeyCopies(const Params& p, const Tensor& tensor, int keys,
                                       const uint16_t* const& first, const int* const& pages)
      : p_(p),
        tensor_(tensor),
        keys_(ptx::warp_uniform(keys)),
        plain_tiles_(p.keys.page_table ? 0 : keys_ / Tile::kRows),
        first_(first),
        pages_(pages) {}

  // Those of a tile, if it is wanted; zeros behind the last. One branch for the usual case.
  __device__ __forceinline__ void start(bool wanted, uint32_t destination, int tile) const {
    const int first_key = tile * Tile::kRows;
    if (wanted && tile < plain_tiles_)
      Copies::start_whole(destination, first_ + first_key * tensor_.stride_token,
                          tensor_.stride_token);
    else if (wanted)
      start_checked(destination, first_key);
  }

 private:
  using Copies = ThreadCopies<Tile, C::kThreads>;

  __device__ __forceinline__ void start_checked(uint32_t destination, int first_key) const {
    const int page_bits = 31 - __clz(p_.keys.page_size);  // a power of two
    const uint16_t* first = first_ + Copies::element();
    const int* pages = pages_;
    Copies::start(destination, [&](int pass) -> const uint16_t* {
      const int token = first_key + Copies::row() + pass * Copies::kPassRows;
      if (token >= keys_) return nullptr;
      if (!pages) return first + token * tensor_.stride_token;
      const int page = pages[token >> page_bits];
      if (page < 0 || page >= p_.keys.pages) return nullptr;
      return first + page * tensor_.stride_outer +
             (token & (p_.keys.page_size - 1)) * tensor_.stride_token;
    });
  }

  const Params& p_;
  const Tensor& tensor_;
  const int keys_;
  const int plain_tiles_;  // the first ones: whole, not paged
  const uint16_t* const& first_;
  const int* const& pages_;
};

}  // namespace blasst::cuda::prefill::sm80
