// Checks that the kernels for GPUs share. No CUDA types here.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <utility>

#include "attention/checks.h"
#include "blasst/blasst.hpp"

namespace blasst::cuda {

// What is valid but not done here.
template <typename... Args>
[[noreturn]] void refuse(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(BLASST_UNSUPPORTED, "cuda-sm90: " + fmt::format(format, std::forward<Args>(args)...));
}

// The copy engine's rules: addresses and strides of whole 16 bytes.
inline void check_aligned(std::string_view name, const View& view) {
  if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0)
    refuse("{}.data is {}; it must be 16-byte aligned", name, view.data);
  for (const auto& [stride_name, stride] :
       {std::pair{"stride_request", view.stride_request},
        std::pair{"stride_token", view.stride_token}, std::pair{"stride_head", view.stride_head}}) {
    if (stride >= int64_t{1} << 39)
      refuse("{}.{} is {}; it must be less than 2^39 elements, 1 TiB", name, stride_name, stride);
    if (stride % 8 != 0)
      refuse("{}.{} is {}; it must be a multiple of 8 elements, 16 bytes", name, stride_name,
             stride);
  }
}

// Keys and values as tensors [outer, tokens, kv_heads, dim], and the most keys of a request.
struct KeyRoom {
  int64_t outer, tokens, most;
};

// Whole tokens in a ragged view, `limit` at most.
inline int64_t tokens_in(const View& view, int64_t heads, int64_t dim, int64_t limit) {
  const __int128 first = static_cast<__int128>(heads - 1) * view.stride_head + dim;
  if (!view.data || view.elements < first) return 0;
  if (view.stride_token == 0) return limit;
  return std::min(limit, 1 + static_cast<int64_t>(view.elements - first) / view.stride_token);
}

// What is the same for all requests of a page table. Returns the most keys of a request.
inline int64_t check_page_table(const KeysValues& kv, int64_t limit) {
  using attention::check_range;
  using attention::fail;
  if (!kv.lengths) fail("kv.lengths is null; paged keys need the length of each request");
  check_range("kv.page_size", kv.page_size, 1, 256);
  if (kv.page_size < 16 || (kv.page_size & (kv.page_size - 1)) != 0)
    refuse("kv.page_size is {}; it does 16, 32, 64, 128 and 256", kv.page_size);
  check_range("kv.pages", kv.pages, 0, limit);
  check_range("kv.page_table_stride", kv.page_table_stride, 0, limit);
  check_range("kv.key_length", kv.key_length, 0, limit);
  const int64_t table = kv.page_table_stride * kv.page_size;
  if (kv.key_length > table)
    fail("kv.key_length is {}; the page table has room for {}", kv.key_length, table);
  return kv.key_length > 0 ? kv.key_length : table;
}

// Layout and views of the keys and values; no count above `limit`.
template <typename Params>
KeyRoom check_keys(const Params& params, int64_t limit) {
  using attention::check_range;
  using attention::fail;
  const KeysValues& kv = params.kv;
  check_range("kv.key_length", kv.key_length, 0, limit);
  KeyRoom room{params.batch, kv.key_length, kv.key_length};
  if (kv.starts && (kv.cu_seqlens || kv.page_table))
    fail("kv.starts is set together with kv.cu_seqlens or kv.page_table; it is for dense keys");
  if (kv.cu_seqlens) {
    if (kv.page_table || kv.lengths)
      fail("kv.cu_seqlens is set together with kv.page_table or kv.lengths; choose one layout");
    attention::check_view("k", kv.k, params.dtype, 0, 0, 0, 0);  // its strides, for tokens_in
    attention::check_view("v", kv.v, params.dtype, 0, 0, 0, 0);
    room.outer = 1;
    room.tokens = std::min(tokens_in(kv.k, params.kv_heads, params.head_dim, limit),
                           tokens_in(kv.v, params.kv_heads, params.value_dim, limit));
    if (room.most == 0) room.most = room.tokens;
  } else if (kv.page_table) {
    room.most = check_page_table(kv, limit);
    room.outer = kv.pages;
    room.tokens = kv.page_size;
  }
  check_range("the most keys of a request", room.most, 0, limit);
  check_range("tokens of k", room.tokens, 0, limit);
  if (room.most == 0 || room.outer == 0) return room;
  for (const auto& [name, view] : {std::pair{"k", &kv.k}, std::pair{"v", &kv.v}}) {
    attention::check_view(name, *view, params.dtype, room.outer, room.tokens, params.kv_heads,
                          params.head_dim);
    check_aligned(name, *view);
  }
  return room;
}

}  // namespace blasst::cuda
