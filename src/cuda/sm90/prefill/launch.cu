#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cub/block/block_scan.cuh>

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

// Rows that are padding: their output is 0. Their LSE is that of a row without a key, or -inf where
// a row is not in use. A block each.
__global__ void clear_padding(const __grid_constant__ Params p, int dim) {
  const int row = blockIdx.x, request = row / p.query_length;
  const Span seen = rows_of_request(p, request, keys_of_request(p, request).count);
  if (row >= seen.first && row < seen.first + seen.count) return;
  auto* out = static_cast<uint16_t*>(p.out) + request * p.out_stride_request +
              row_in_tensor(p, request, row) * p.out_stride_token;
  const int pieces = dim / 8;  // of 16 bytes, a head
  for (int i = threadIdx.x; i < p.heads * pieces; i += blockDim.x)
    *reinterpret_cast<uint4*>(out + i / pieces * p.out_stride_head + i % pieces * 8) = {};
  const bool in_use = row < seen.first;
  for (int head = threadIdx.x; head < p.heads; head += blockDim.x) {
    const int64_t cell = int64_t{head} * p.rows + row;
    if (p.lse) p.lse[cell] = in_use && p.sinks ? p.sinks[head] : -INFINITY;
    if (p.dropped_mass_bound) p.dropped_mass_bound[cell] = 0;
  }
}

// Query tiles that no request has: nothing was visited. Some blocks of 256.
__global__ void clear_maxima(float* maxima, int64_t count) {
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll)
    maxima[i] = -INFINITY;
}

// Where the blocks of each request begin, and the query tiles of a ragged batch; no item is taken
// yet. One block.
constexpr int kListThreads = 512;
__global__ void __launch_bounds__(kListThreads)
    list_blocks(const __grid_constant__ Params p, int block_rows) {
  using Scan = cub::BlockScan<int, kListThreads>;
  __shared__ typename Scan::TempStorage storage;
  const auto list = [&](int* first, int rows_each) {
    int before = 0;
    for (int base = 0; base < p.batch; base += kListThreads) {
      const int request = base + static_cast<int>(threadIdx.x);
      int count = 0, of_block, here;
      if (request < p.batch) {
        const int rows = rows_of_request(p, request, keys_of_request(p, request).count).count;
        count = (rows + rows_each - 1) / rows_each;
      }
      Scan(storage).ExclusiveSum(count, here, of_block);
      __syncthreads();
      if (request < p.batch) first[request] = before + here;
      before += of_block;
    }
    if (threadIdx.x == 0) first[p.batch] = before;
  };
  if (threadIdx.x == 0) *p.next_item = 0;
  list(p.first_block, block_rows);
  if (p.cu_seqlens_q) list(p.first_query_tile, kRowsPerWarpgroup);
}

void clear_report(const Params& p, cudaStream_t stream) {
  const auto heads = static_cast<std::size_t>(p.heads);
  clear(p.visitable, p.batch * heads * sizeof(*p.visitable), stream);
  clear(p.skipped, p.batch * heads * sizeof(*p.skipped), stream);
  clear(p.gap_histogram, heads * BLASST_GAP_BINS * sizeof(*p.gap_histogram), stream);
  if (!rows_differ(p)) return;
  // Requests have room for more query tiles than they use.
  const auto tiles = heads * static_cast<std::size_t>(p.query_tiles);
  clear(p.tile_bits, tiles * p.tile_words * sizeof(*p.tile_bits), stream);
  const auto maxima = static_cast<int64_t>(tiles) * p.tile_maxima_stride;
  if (p.tile_maxima && maxima > 0) enqueue(clear_maxima, 256, 256, stream, p.tile_maxima, maxima);
}

// The parts of the parameters that say who does what. Returns the most items that there can be.
int plan_work(Params& p, int dim, int* workspace) {
  const int block_rows = rows_per_block(dim);
  p.next_item = workspace;
  p.row_blocks = (p.query_length + block_rows - 1) / block_rows;
  if (rows_differ(p)) {
    p.first_block = workspace + 4;
    p.first_query_tile = p.first_block + p.batch + 1;
  }
  p.section_heads = section_heads(p.key_length, dim, p.first_block ? 1 : p.batch, p.heads,
                                  p.kv_heads, kSectionBytes);
  return static_cast<int>(p.heads * most_blocks(p.rows, p.batch, p.query_length, block_rows));
}

}  // namespace

// All that can fail on the host comes before the first write.
void launch(const Launch& l) {
  Params p = l.params;
  const auto stream = static_cast<cudaStream_t>(l.stream);
  const int items = p.rows == 0 ? 0 : plan_work(p, l.dim, l.workspace);
  if (items == 0) return clear_report(p, stream);

  const int keys = tile_keys(l.dim);
  const int key_rows = p.page_table ? std::min(p.page_size, keys) : keys;
  const CUtensorMap q = map_of(l.q, l, kRowsPerWarpgroup);
  // Without keys nothing is copied; any tensor will do.
  const bool keys_at_all = p.key_length > 0 && l.k.tokens > 0 && l.k.outer > 0;
  const CUtensorMap k = map_of(keys_at_all ? l.k : l.q, l, key_rows);
  const CUtensorMap v = map_of(keys_at_all ? l.v : l.q, l, key_rows);
  const Kernel kernel = find_kernel(l.element, l.dim, l.variant);
  allow_shared_memory(kernel.function, kernel.shared_bytes);
  const int blocks = std::min(items, multiprocessors());

  clear_report(p, stream);
  if (p.first_block)
    enqueue(list_blocks, 1, kListThreads, stream, p, rows_per_block(l.dim));
  else
    clear(p.next_item, sizeof(int), stream);
  enqueue(kernel.function, blocks, kernel.threads, kernel.shared_bytes, stream, {&p, &q, &k, &v});
  if (may_be_padded(p)) enqueue(clear_padding, p.rows, 128, stream, p, l.dim);
}

}  // namespace blasst::cuda::prefill
