#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "blasst/blasst.h"
#include "cuda/core/prefill/batch.h"
#include "cuda/core/prefill/rows.cuh"
#include "cuda/core/runtime.h"
#include "cuda/core/tiles.h"

namespace blasst::cuda::prefill {
namespace {

// A block for each row.
__global__ void clear_padding_rows(const __grid_constant__ Params p, int value_dim) {
  const int row = blockIdx.x, request = row / p.query_length;
  const Span seen = rows_of_request(p, request, keys_of_request(p.keys, request).count);
  if (row >= seen.first && row < seen.first + seen.count) return;
  auto* out = static_cast<uint16_t*>(p.out.data) + request * p.out.stride_request +
              row_in_tensor(p, request, row) * p.out.stride_token;
  const int pieces = value_dim / 8;  // of 16 bytes, a head
  for (int i = threadIdx.x; i < p.heads * pieces; i += blockDim.x)
    *reinterpret_cast<uint4*>(out + i / pieces * p.out.stride_head + i % pieces * 8) = {};
  const bool in_use = row < seen.first;
  for (int head = threadIdx.x; head < p.heads; head += blockDim.x) {
    const int64_t cell = int64_t{head} * p.rows + row;
    if (p.report.lse) p.report.lse[cell] = in_use && p.sinks ? p.sinks[head] : -INFINITY;
    if (p.report.dropped_mass_bound) p.report.dropped_mass_bound[cell] = 0;
  }
}

// Query tiles that no request has: nothing was visited. Some blocks of 256.
__global__ void clear_maxima(float* maxima, int64_t count) {
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll)
    maxima[i] = -INFINITY;
}

// One block of threads.
constexpr int kListThreads = 512;
__global__ void __launch_bounds__(kListThreads)
    list_requests(const __grid_constant__ Params p, int block_rows) {
  using Scan = cub::BlockScan<int, kListThreads>;
  __shared__ typename Scan::TempStorage storage;
  const auto list = [&](int* first, int rows_each) {
    int before = 0;
    for (int base = 0; base < p.batch; base += kListThreads) {
      const int request = base + static_cast<int>(threadIdx.x);
      int count = 0, of_block, here;
      if (request < p.batch) {
        const int rows = rows_of_request(p, request, keys_of_request(p.keys, request).count).count;
        count = ceil_div(rows, rows_each);
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
  if (p.cu_seqlens_q) list(p.first_query_tile, kQueryTileRows);
}

}  // namespace

void clear_report(const Params& p, void* cuda_stream) {
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  const ReportArrays& r = p.report;
  const auto heads = static_cast<std::size_t>(p.heads);
  clear(r.visitable, p.batch * heads * sizeof(*r.visitable), stream);
  clear(r.skipped, p.batch * heads * sizeof(*r.skipped), stream);
  clear(r.gap_histogram, heads * BLASST_GAP_BINS * sizeof(*r.gap_histogram), stream);
  if (!rows_differ(p)) return;
  // Requests have room for more query tiles than they use.
  const auto tiles = heads * static_cast<std::size_t>(r.query_tiles);
  clear(r.tile_bits, tiles * r.tile_words * sizeof(*r.tile_bits), stream);
  const auto maxima = static_cast<int64_t>(tiles) * r.tile_maxima_stride;
  if (r.tile_maxima && maxima > 0) enqueue(clear_maxima, 256, 256, stream, r.tile_maxima, maxima);
}

void list_blocks(const Params& p, int block_rows, void* stream) {
  enqueue(list_requests, 1, kListThreads, static_cast<cudaStream_t>(stream), p, block_rows);
}

void clear_padding(const Params& p, int value_dim, void* stream) {
  enqueue(clear_padding_rows, p.rows, 128, static_cast<cudaStream_t>(stream), p, value_dim);
}

}  // namespace blasst::cuda::prefill
