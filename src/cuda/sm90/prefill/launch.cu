#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/sm90/prefill/kernels.h"
#include "cuda/sm90/prefill/launch.h"
#include "cuda/sm90/prefill/layout.cuh"
#include "cuda/sm90/prefill/request.cuh"
#include "cuda/sm90/prefill/schedule.h"
#include "cuda/sm90/runtime.h"

namespace blasst::cuda::prefill {
namespace {

// Of the L2's 50 to 60 MB, what the keys and values of one section may take.
constexpr int64_t kSectionBytes = int64_t{32} << 20;

// Boxes of one panel by `tokens`.
CUtensorMap map_of(const Tensor& t, const Launch& l, int tokens) {
  return tensor_map(t.data, l.element, l.dim,
                    {{{t.tokens, t.stride_token, tokens},
                      {t.heads, t.stride_head, 1},
                      {t.outer, t.stride_outer, 1}}},
                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
}

// Rows that are padding: their output is 0, their LSE -inf. A block each.
__global__ void clear_padding(const __grid_constant__ Params p, int dim) {
  const int row = blockIdx.x, request = row / p.query_length;
  const Span used = rows_of_request(p, request, keys_of_request(p, request).count);
  if (row >= used.first && row < used.first + used.count) return;
  auto* out = static_cast<uint16_t*>(p.out) + request * p.out_stride_request +
              row_in_tensor(p, request, row) * p.out_stride_token;
  const int pieces = dim / 8;  // of 16 bytes, a head
  for (int i = threadIdx.x; i < p.heads * pieces; i += blockDim.x)
    *reinterpret_cast<uint4*>(out + i / pieces * p.out_stride_head + i % pieces * 8) = {};
  for (int head = threadIdx.x; head < p.heads; head += blockDim.x) {
    const int64_t cell = int64_t{head} * p.rows + row;
    if (p.lse) p.lse[cell] = -INFINITY;
    if (p.dropped_mass_bound) p.dropped_mass_bound[cell] = 0;
  }
}

// Query tiles that no request has: nothing was visited. Some blocks of 256.
__global__ void clear_maxima(float* maxima, int64_t count) {
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll)
    maxima[i] = -INFINITY;
}

}  // namespace

void launch(const Launch& l) {
  Params p = l.params;
  const auto stream = static_cast<cudaStream_t>(l.stream);
  const std::size_t heads = static_cast<std::size_t>(p.heads);
  clear(p.visitable, p.batch * heads * sizeof(*p.visitable), stream);
  clear(p.skipped, p.batch * heads * sizeof(*p.skipped), stream);
  clear(p.gap_histogram, heads * BLASST_GAP_BINS * sizeof(*p.gap_histogram), stream);
  const bool padded = p.starts || p.query_lengths;
  if (padded) {  // requests have room for more query tiles than they use
    const std::size_t tiles =
        p.batch *
        static_cast<std::size_t>((p.query_length + kRowsPerWarpgroup - 1) / kRowsPerWarpgroup);
    clear(p.tile_bits, heads * tiles * p.tile_words * sizeof(*p.tile_bits), stream);
    const auto maxima = static_cast<int64_t>(heads * tiles) * p.tile_maxima_stride;
    if (p.tile_maxima && maxima > 0) {
      clear_maxima<<<multiprocessors(), 256, 0, stream>>>(p.tile_maxima, maxima);
      check(cudaGetLastError(), "clear_maxima");
    }
  }
  p.row_blocks = (p.query_length + rows_per_block(l.dim) - 1) / rows_per_block(l.dim);
  p.items = p.batch * p.heads * p.row_blocks;
  if (p.items == 0 || p.rows == 0) return;
  p.section_heads = section_heads(p.key_length, l.dim, p.batch, p.heads, p.kv_heads, kSectionBytes);
  p.next_item = l.workspace;

  const int keys = tile_keys(l.dim);
  const int key_rows = p.page_table ? std::min(p.page_size, keys) : keys;
  const CUtensorMap q = map_of(l.q, l, kRowsPerWarpgroup);
  // Without keys nothing is copied; any tensor will do.
  const bool keys_at_all = p.key_length > 0 && l.k.tokens > 0 && l.k.outer > 0;
  const CUtensorMap k = map_of(keys_at_all ? l.k : l.q, l, key_rows);
  const CUtensorMap v = map_of(keys_at_all ? l.v : l.q, l, key_rows);

  clear(p.next_item, sizeof(int), stream);
  const Kernel kernel = find_kernel(l.element, l.dim, l.variant);
  allow_shared_memory(kernel.function, kernel.shared_bytes);
  void* arguments[] = {&p, const_cast<CUtensorMap*>(&q), const_cast<CUtensorMap*>(&k),
                       const_cast<CUtensorMap*>(&v)};
  check(cudaLaunchKernel(kernel.function, dim3(std::min(p.items, multiprocessors())),
                         dim3(kernel.threads), arguments, kernel.shared_bytes, stream),
        "cudaLaunchKernel");
  if (padded) {
    clear_padding<<<p.rows, 128, 0, stream>>>(p, l.dim);
    check(cudaGetLastError(), "clear_padding");
  }
}

}  // namespace blasst::cuda::prefill
