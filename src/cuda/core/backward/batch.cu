#include <cuda_runtime.h>

#include <cmath>
#include <cub/block/block_reduce.cuh>

#include "cuda/core/backward/batch.h"
#include "cuda/core/backward/places.cuh"
#include "cuda/core/math.cuh"
#include "cuda/core/prefill/key_tiles.cuh"
#include "cuda/core/runtime.h"

namespace blasst::cuda::backward {
namespace {

template <typename T>
__device__ __forceinline__ const T* row_of(const OutputRows& rows, const prefill::Params& p,
                                           int request, int head, int row) {
  return static_cast<const T*>(rows.data) + (p.cu_seqlens_q ? 0 : request * rows.stride_request) +
         prefill::row_in_tensor(p, request, row) * rows.stride_token + head * rows.stride_head;
}

// A block for each query tile of each head; eight threads a row.
constexpr int kMeasureThreads = 256, kRowThreads = 8;
template <typename T>
__global__ void __launch_bounds__(kMeasureThreads)
    measure(const __grid_constant__ Params b, int dim) {
  const prefill::Params& p = b.forward;
  const int place = blockIdx.x % b.query_tiles, head = blockIdx.x / b.query_tiles;
  int request;
  if (p.cu_seqlens_q) {
    if (place >= p.first_query_tile[p.batch]) return;
    request = prefill::request_of(p.first_query_tile, p.batch, place);
  } else {
    request = place / ceil_div(p.query_length, kQueryTileRows);
  }
  const Span rows = spans_of(p, request).rows;
  const int first = (place - first_query_tile(p, request)) * kQueryTileRows;
  RowBlock& to = b.rows[blockIdx.x];
  const int lane = threadIdx.x % kRowThreads;
  for (int i = threadIdx.x / kRowThreads; i < kQueryTileRows; i += kMeasureThreads / kRowThreads) {
    const bool exists = first + i < rows.count;
    const int row = rows.first + first + i;
    float sum = 0;
    if (exists) {
      const T* out = row_of<T>(p.out, p, request, head, row);
      const T* dout = row_of<T>(b.dout, p, request, head, row);
      for (int d = 8 * lane; d < dim; d += 8 * kRowThreads) {
        const uint4 o = *reinterpret_cast<const uint4*>(out + d);
        const uint4 g = *reinterpret_cast<const uint4*>(dout + d);
        const auto add = [&](uint32_t x, uint32_t y) {
          const float2 a = unpack2<T>(x), c = unpack2<T>(y);
          sum = fmaf(a.x, c.x, sum);
          sum = fmaf(a.y, c.y, sum);
        };
        add(o.x, g.x), add(o.y, g.y), add(o.z, g.z), add(o.w, g.w);
      }
    }
#pragma unroll
    for (int lanes = 1; lanes < kRowThreads; lanes *= 2)
      sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    if (lane != 0) continue;
    float lse = INFINITY, delta = 0;
    if (exists) {
      const int64_t cell = int64_t{head} * p.rows + row;
      // A row that has seen nothing but -inf has no weights.
      if (b.lse[cell] != -INFINITY) lse = b.lse[cell] * kLog2e;
      delta = sum - (b.dlse ? b.dlse[cell] : 0);
    }
    to.lse[i] = lse, to.delta[i] = delta;
  }
}

// A block for each head of each request. A warp turns 32 query tiles x 32 key tiles at a time.
constexpr int kListThreads = 512;
__global__ void __launch_bounds__(kListThreads)
    transpose_bits(const __grid_constant__ Params b, int tile_keys) {
  const prefill::Params& p = b.forward;
  const int request = blockIdx.x % p.batch, head = blockIdx.x / p.batch;
  const RequestSpans spans = spans_of(p, request);
  const int query_tiles = ceil_div(spans.rows.count, kQueryTileRows);
  const int key_tiles = ceil_div(spans.keys.count, tile_keys);
  const unsigned* from =
      b.tile_bits + (int64_t{head} * b.query_tiles + first_query_tile(p, request)) * b.tile_words;
  unsigned* to = b.keepers + (int64_t{head} * b.key_tiles +
                              prefill::first_key_tile(p.keys, request, tile_keys)) *
                                 b.keeper_words;
  const int lane = threadIdx.x % 32;
  const int across = ceil_div(key_tiles, 32), all = across * ceil_div(query_tiles, 32);
  for (int i = threadIdx.x / 32; i < all; i += kListThreads / 32) {
    const int query_word = i / across, key_word = i % across;
    const int query_tile = 32 * query_word + lane;
    const unsigned mine =
        query_tile < query_tiles ? from[int64_t{query_tile} * b.tile_words + key_word] : 0;
    unsigned turned = 0;
#pragma unroll
    for (int key = 0; key < 32; ++key) {
      const unsigned column = __ballot_sync(kAllLanes, mine >> key & 1);
      if (key == lane) turned = column;
    }
    const int key_tile = 32 * key_word + lane;
    if (key_tile < key_tiles) to[int64_t{key_tile} * b.keeper_words + query_word] = turned;
  }
}

// A block for each slot, KV head and gradient; a thread adds eight elements of a key at a time.
constexpr int kPartThreads = 256;
template <typename T>
__global__ void __launch_bounds__(kPartThreads)
    sum_parts(const __grid_constant__ Params b, int tile_keys, int qk_dim, int value_dim) {
  const prefill::Params& p = b.forward;
  const bool values = blockIdx.x % 2;
  const int kv_head = blockIdx.x / 2 % p.kv_heads, slot = blockIdx.x / 2 / p.kv_heads;
  const int request = request_of_slot(b, slot, tile_keys);
  if (request < 0) return;
  const int dim = values ? value_dim : qk_dim;
  const int size = tile_keys * dim, both = tile_keys * (qk_dim + value_dim);
  const int parts = p.heads / p.kv_heads;
  const float* from =
      b.sums + int64_t{blockIdx.x / 2} * parts * both + (values ? tile_keys * qk_dim : 0);
  const OutputRows& to = values ? b.dv : b.dk;
  T* first = key_row<T>(to, p, request, kv_head, keys_of_request(p.keys, request).first);
  const float factor = values ? 1 : b.scale;
  for (int i = 8 * threadIdx.x; i < size; i += 8 * kPartThreads) {
    float x[8] = {};
    for (int part = 0; part < parts; ++part) {
#pragma unroll
      for (int e = 0; e < 8; e += 4) {
        const float4 add = *reinterpret_cast<const float4*>(from + int64_t{part} * both + i + e);
        x[e] += add.x, x[e + 1] += add.y, x[e + 2] += add.z, x[e + 3] += add.w;
      }
    }
    uint32_t packed[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) packed[e] = pack2<T>(x[2 * e] * factor, x[2 * e + 1] * factor);
    *reinterpret_cast<uint4*>(first + i / dim * to.stride_token + i % dim) =
        make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
}

// A block for each head. A sink's probability in a row is exp(sink - lse), and its score takes
// -probability * delta.
constexpr int kSinkThreads = 512;
__global__ void __launch_bounds__(kSinkThreads) sum_sinks(const __grid_constant__ Params b) {
  using Reduce = cub::BlockReduce<double, kSinkThreads>;
  __shared__ typename Reduce::TempStorage storage;
  const prefill::Params& p = b.forward;
  const int head = blockIdx.x;
  const float sink = p.sinks[head] * kLog2e;
  const int places = p.cu_seqlens_q ? p.first_query_tile[p.batch] : b.query_tiles;
  const RowBlock* rows = b.rows + int64_t{head} * b.query_tiles;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < int64_t{places} * kQueryTileRows; i += kSinkThreads) {
    const RowBlock& block = rows[i / kQueryTileRows];
    const int row = i % kQueryTileRows;
    // A row with neither a key nor a sink has nothing for it to scale.
    if (block.lse[row] < INFINITY) sum -= exp2f(sink - block.lse[row]) * block.delta[row];
  }
  // Rows in use before every key are padding, but the sink is all that they have.
  if (b.dlse && prefill::may_be_padded(p) && p.sinks[head] > -INFINITY) {
    for (int row = threadIdx.x; row < p.rows; row += kSinkThreads) {
      const int request = row / p.query_length;
      if (row < spans_of(p, request).rows.first) sum += b.dlse[int64_t{head} * p.rows + row];
    }
  }
  sum = Reduce(storage).Sum(sum);
  if (threadIdx.x == 0) b.dsinks[head] = static_cast<float>(sum);
}

__device__ __forceinline__ void clear_row(const OutputRows& to, int64_t outer, int64_t token,
                                          int heads, int dim) {
  auto* row = static_cast<uint16_t*>(to.data) + outer * to.stride_request + token * to.stride_token;
  const int pieces = dim / 8;  // of 16 bytes, a head
  for (int i = threadIdx.x; i < heads * pieces; i += blockDim.x)
    *reinterpret_cast<uint4*>(row + i / pieces * to.stride_head + i % pieces * 8) = {};
}

// A block for each row.
__global__ void clear_padding_rows(const __grid_constant__ Params b, int dim) {
  const prefill::Params& p = b.forward;
  const int row = blockIdx.x, request = row / p.query_length;
  const Span seen = spans_of(p, request).rows;
  if (row >= seen.first && row < seen.first + seen.count) return;
  clear_row(b.dq, request, prefill::row_in_tensor(p, request, row), p.heads, dim);
}

// A block for each token.
__global__ void clear_unused_keys(const __grid_constant__ Params b, int tokens, int qk_dim,
                                  int value_dim) {
  const prefill::Params& p = b.forward;
  const int outer = blockIdx.x / tokens, token = blockIdx.x % tokens;
  Span used = {0, 0};
  if (p.keys.cu_seqlens)
    used.count = p.keys.cu_seqlens[p.batch];
  else
    used = keys_of_request(p.keys, outer);
  if (token >= used.first && token < used.first + used.count) return;
  clear_row(b.dk, outer, token, p.kv_heads, qk_dim);
  clear_row(b.dv, outer, token, p.kv_heads, value_dim);
}

}  // namespace

void measure_rows(const Params& b, Element element, int value_dim, void* stream) {
  const auto kernel = element == Element::kHalf ? measure<__half> : measure<__nv_bfloat16>;
  enqueue(kernel, b.forward.heads * b.query_tiles, kMeasureThreads,
          static_cast<cudaStream_t>(stream), b, value_dim);
}

void list_keepers(const Params& b, int tile_keys, void* stream) {
  enqueue(transpose_bits, b.forward.batch * b.forward.heads, kListThreads,
          static_cast<cudaStream_t>(stream), b, tile_keys);
}

void add_parts(const Params& b, Element element, int tile_keys, int qk_dim, int value_dim,
               void* stream) {
  const auto kernel = element == Element::kHalf ? sum_parts<__half> : sum_parts<__nv_bfloat16>;
  enqueue(kernel, 2 * b.sum_slots * b.forward.kv_heads, kPartThreads,
          static_cast<cudaStream_t>(stream), b, tile_keys, qk_dim, value_dim);
}

void add_sinks(const Params& b, void* stream) {
  enqueue(sum_sinks, b.forward.heads, kSinkThreads, static_cast<cudaStream_t>(stream), b);
}

void clear_unused(const Params& b, int64_t key_outer, int64_t key_tokens, int qk_dim, int value_dim,
                  void* cuda_stream) {
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  const prefill::Params& p = b.forward;
  if (prefill::may_be_padded(p) && p.rows > 0)
    enqueue(clear_padding_rows, p.rows, 128, stream, b, qk_dim);
  const bool all_used = !p.keys.cu_seqlens && !p.keys.starts && !p.keys.lengths;
  const auto tokens = static_cast<int>(key_tokens);
  if (!all_used && key_outer * key_tokens > 0)
    enqueue(clear_unused_keys, static_cast<unsigned>(key_outer * key_tokens), 128, stream, b,
            tokens, qk_dim, value_dim);
}

}  // namespace blasst::cuda::backward
