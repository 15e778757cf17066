// The part of a launch that both phases plan alike. `Launch` is prefill's or decode's, `Call` the
// public parameters of that phase. Throws Error.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "attention/checks.h"
#include "attention/tiles.h"
#include "blasst/blasst.hpp"
#include "cuda/checks.h"
#include "cuda/sm90/tensor.h"

namespace blasst::cuda {

template <typename Call>
void check_supported(const Call& call) {
  if (call.dtype == BLASST_FLOAT32) refuse("dtype is float32; it does bfloat16 and float16");
  if (call.head_dim != call.value_dim ||
      (call.head_dim != 64 && call.head_dim != 128 && call.head_dim != 256))
    refuse("head_dim is {} and value_dim {}; it does 64, 128 and 256, both alike", call.head_dim,
           call.value_dim);
  if (call.mask.blocks) refuse("mask.blocks is set; it has no block masks");
  if (call.threads != 0) refuse("threads is {}; it must be 0", call.threads);
}

template <typename Launch, typename Call>
void plan_shapes(Launch& l, const Call& call) {
  l.element = call.dtype == BLASST_FLOAT16 ? Element::kHalf : Element::kBFloat16;
  l.dim = static_cast<int>(call.head_dim);
  l.params.batch = static_cast<int>(call.batch);
  l.params.heads = static_cast<int>(call.heads);
  l.params.kv_heads = static_cast<int>(call.kv_heads);
  l.stream = call.stream;
}

// q and out as tensors [outer, tokens, heads, dim].
template <typename Launch, typename Call>
void plan_queries(Launch& l, const Call& call, int64_t outer, int64_t tokens) {
  for (const auto& [name, view] : {std::pair{"q", &call.q}, std::pair{"out", &call.out}}) {
    attention::check_view(name, *view, call.dtype, outer, tokens, call.heads, call.head_dim);
    check_aligned(name, *view);
  }
  if (outer > 0 && tokens > 0)
    attention::check_no_overlap("out", call.out, outer, tokens, call.heads, call.value_dim);
  attention::check_not_shared("out", call.out, "q", call.q, call.dtype);
  attention::check_not_shared("out", call.out, "k", call.kv.k, call.dtype);
  attention::check_not_shared("out", call.out, "v", call.kv.v, call.dtype);
  l.q = tensor(call.q, outer, tokens, call.heads);
  l.params.query_length = static_cast<int>(call.query_length);
  l.params.out = call.out.data;
  l.params.out_stride_request = call.out.stride_request;
  l.params.out_stride_token = call.out.stride_token;
  l.params.out_stride_head = call.out.stride_head;
}

template <typename Launch, typename Call>
void plan_keys(Launch& l, const Call& call) {
  auto& p = l.params;
  const KeysValues& kv = call.kv;
  const KeyRoom room = check_keys(call, kUnlimited - 1);
  l.k = tensor(kv.k, room.outer, room.tokens, call.kv_heads);
  l.v = tensor(kv.v, room.outer, room.tokens, call.kv_heads);
  p.key_length = static_cast<int>(room.most);
  p.starts = kv.starts;
  p.lengths = kv.lengths;
  p.cu_seqlens_k = kv.cu_seqlens;
  p.page_table = kv.page_table;
  p.page_table_stride = kv.page_table_stride;
  p.page_size = static_cast<int>(kv.page_size);
  p.pages = static_cast<int>(kv.pages);
}

template <typename KernelParams, typename Call>
void plan_mask_and_test(KernelParams& p, const Call& call) {
  p.softcap = call.softcap;
  p.sinks = call.sinks;
  const attention::Distances d = attention::allowed_distances(call.mask, nullptr);
  constexpr int64_t limit = kUnlimited;
  p.least_distance = static_cast<int>(std::clamp(d.least, -limit, limit));
  p.most_distance = static_cast<int>(std::clamp(d.most, -limit, limit));
  p.order = call.order;
  p.test = call.test.kind;
  p.thresholds = call.test.values;
  p.threshold_stride_request = call.test.stride_request;
  p.threshold_stride_head = call.test.stride_head;
}

template <typename KernelParams>
void plan_report(KernelParams& p, const Report& report, int64_t tile_keys) {
  p.lse = report.lse;
  p.dropped_mass_bound = report.dropped_mass_bound;
  p.visitable = reinterpret_cast<unsigned long long*>(report.tiles_visitable);
  p.skipped = reinterpret_cast<unsigned long long*>(report.tiles_skipped);
  p.tile_bits = report.tile_bits;
  p.tile_words =
      static_cast<int>(attention::ceil_div(attention::ceil_div(p.key_length, tile_keys), 32));
  p.gap_histogram = reinterpret_cast<unsigned long long*>(report.gap_histogram);
}

}  // namespace blasst::cuda
