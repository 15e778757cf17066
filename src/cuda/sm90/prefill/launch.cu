#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/core/prefill/frame.h"
#include "cuda/core/runtime.h"
#include "cuda/sm90/core/tensor_map.h"
#include "cuda/sm90/prefill/kernels.h"
#include "cuda/sm90/prefill/launch.h"
#include "cuda/sm90/prefill/quantize.h"
#include "cuda/sm90/prefill/shape.h"

namespace blasst::cuda::prefill {
namespace {

// Boxes of one panel by `tokens`.
CUtensorMap map_of(const Tensor& t, Element element, int tokens) {
  return tensor_map(t, element,
                    {{{t.tokens, t.stride_token, tokens},
                      {t.heads, t.stride_head, 1},
                      {t.outer, t.stride_outer, 1}}},
                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
}

// The keys' bytes, one tile a box.
Tensor quantized_keys(const Params& p, int dim, int keys) {
  const int64_t tokens = int64_t{p.quantized.tiles} * keys;
  return {p.quantized.data,          1,   tokens,      p.kv_heads, dim,
          tokens * p.kv_heads * dim, dim, tokens * dim};
}

Tensor outputs(const Params& p, int dim) {
  const int64_t outer = p.cu_seqlens_q ? 1 : p.batch;
  return {p.out.data,
          outer,
          p.cu_seqlens_q ? p.rows : p.query_length,
          p.heads,
          dim,
          p.out.stride_request,
          p.out.stride_token,
          p.out.stride_head};
}

}  // namespace

void launch(const Launch& l) {
  launch_items(l, rows_per_block(l.qk_dim), [&](const Params& p, int items) {
    const int keys = tile_keys(l.qk_dim);
    const int key_rows = p.keys.page_table ? std::min(p.keys.page_size, keys) : keys;
    const CUtensorMap q = map_of(l.q, l.element, kQueryTileRows);
    // Without keys nothing is copied; any tensor will do.
    const bool keys_at_all = p.keys.length > 0 && l.k.tokens > 0 && l.k.outer > 0;
    const bool int8 = l.scores == Scores::kInt8 && keys_at_all;
    const CUtensorMap k = int8 ? map_of(quantized_keys(p, l.qk_dim, keys), Element::kInt8, keys)
                               : map_of(keys_at_all ? l.k : l.q, l.element, key_rows);
    const CUtensorMap v = map_of(keys_at_all ? l.v : l.q, l.element, key_rows);
    const CUtensorMap o = map_of(outputs(p, l.value_dim), l.element, kQueryTileRows);
    const Kernel kernel = find_kernel(l.element, l.qk_dim, l.value_dim, l.scores, l.variant);
    allow_shared_memory(kernel.function, kernel.shared_bytes);
    const int blocks = std::min(items, multiprocessors());
    return [&l, &p, q, k, v, o, int8, kernel, blocks] {
      const auto stream = static_cast<cudaStream_t>(l.stream);
      if (int8 && p.quantized.as_stored)
        arrange_keys(p, l.k, l.k_scales, l.qk_dim, stream);
      else if (int8)
        quantize_keys(p, l.k, l.element, l.qk_dim, stream);
      enqueue(kernel.function, blocks, kernel.threads, kernel.shared_bytes, stream,
              {&p, &q, &k, &v, &o});
    };
  });
}

}  // namespace blasst::cuda::prefill
