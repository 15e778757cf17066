#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/core/math.cuh"
#include "cuda/core/prefill/key_tiles.cuh"
#include "cuda/core/runtime.h"
#include "cuda/sm90/prefill/quantize.h"
#include "cuda/sm90/prefill/shape.h"

namespace blasst::cuda::prefill {
namespace {

constexpr int kThreads = 256;
constexpr int kMeanThreads = 1024;

// A row of a request's keys, null where its page is none.
template <typename T>
__device__ __forceinline__ const T* key_row(const KeyLayout& keys, const Tensor& k, int request,
                                            int first, int token, int kv_head) {
  int page = 0;
  if (keys.page_table) {
    page = keys.page_table[request * keys.page_table_stride + token / keys.page_size];
    if (page < 0 || page >= keys.pages) return nullptr;
  }
  const TokenPlace at = place_of_token(keys, request, first, token, page);
  return static_cast<const T*>(k.data) + kv_head * k.stride_head + at.outer * k.stride_outer +
         at.token * k.stride_token;
}

// A tile, and its place among the tiles of all requests and KV heads.
struct Place {
  int request, tile, first, count;  // first: of the request's keys; count: keys in the tile
  int64_t at;
};

template <int kKeys>
__device__ __forceinline__ Place place_of_block(const Params& p) {
  const KeyTile t = key_tile_at(p.keys, p.batch, blockIdx.x, kKeys);
  const Span keys = keys_of_request(p.keys, t.request);
  return {t.request, t.tile, keys.first, min(kKeys, keys.count - t.tile * kKeys),
          int64_t{blockIdx.y} * p.quantized.tiles + blockIdx.x};
}

// Sums of the finite elements of each tile. Eight elements of a key a thread; group g adds keys g,
// g + kGroups, ... A block for each tile and KV head.
template <typename T, int kDim, int kKeys>
__global__ void __launch_bounds__(kThreads)
    sum_tiles(const __grid_constant__ Params p, const __grid_constant__ Tensor k) {
  constexpr int kLanes = kDim / 8, kGroups = kThreads / kLanes, kRows = kKeys / kGroups;
  __shared__ double shared[kGroups][kDim];
  const Place place = place_of_block<kKeys>(p);
  if (place.count <= 0) return;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  uint4 raw[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int key = group + i * kGroups;
    const T* row = key < place.count
                       ? key_row<T>(p.keys, k, place.request, place.first, place.tile * kKeys + key,
                                    static_cast<int>(blockIdx.y))
                       : nullptr;
    raw[i] = row ? reinterpret_cast<const uint4*>(row)[lane] : uint4{};
  }
  double sum[8] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const uint32_t words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 pair = unpack2<T>(words[w]);
      sum[2 * w] += isfinite(pair.x) ? pair.x : 0.0;
      sum[2 * w + 1] += isfinite(pair.y) ? pair.y : 0.0;
    }
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) shared[group][8 * lane + e] = sum[e];
  __syncthreads();
  if (threadIdx.x >= kDim) return;
  double total = 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) total += shared[g][threadIdx.x];
  p.quantized.sums[place.at * kDim + threadIdx.x] = total;
}

// The mean key of each request. Group g adds tiles g, g + 32, ... of 32 elements. A block for each
// 32 elements of a request, and KV head.
template <int kDim, int kKeys>
__global__ void __launch_bounds__(kMeanThreads) mean_keys(const __grid_constant__ Params p) {
  __shared__ double shared[32][33];
  const int kv_head = static_cast<int>(blockIdx.y), request = blockIdx.x / (kDim / 32);
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int element = blockIdx.x % (kDim / 32) * 32 + lane;
  const int keys = keys_of_request(p.keys, request).count, tiles = ceil_div(keys, kKeys);
  const int64_t first =
      int64_t{kv_head} * p.quantized.tiles + first_key_tile(p.keys, request, kKeys);
  const double* from = p.quantized.sums + first * kDim + element;
  double sum = 0;
#pragma unroll 8
  for (int tile = group; tile < tiles; tile += 32) sum += from[int64_t{tile} * kDim];
  shared[group][lane] = sum;
  __syncthreads();
  if (group > 0) return;
  double total = 0;
#pragma unroll
  for (int g = 0; g < 32; ++g) total += shared[g][lane];
  p.quantized.means[(int64_t{request} * p.kv_heads + kv_head) * kDim + element] =
      keys > 0 ? static_cast<float>(total / keys) : 0.f;
}

// x becomes its product with the Hadamard matrix; a warp has a row, lane l the kWidth elements from
// l * kWidth.
template <int kWidth>
__device__ __forceinline__ void rotate(float (&x)[kWidth]) {
#pragma unroll
  for (int bit = 1; bit < kWidth; bit *= 2) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      if (e & bit) continue;
      const float a = x[e], b = x[e + bit];
      x[e] = a + b, x[e + bit] = a - b;
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const float sign = threadIdx.x & lanes ? -1.f : 1.f;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) x[e] = __shfl_xor_sync(kAllLanes, x[e], lanes) + sign * x[e];
  }
}

// A block for each tile and KV head; warp w has keys w, w + 8, ...
template <typename T, int kDim, int kKeys>
__global__ void __launch_bounds__(kThreads)
    round_tiles(const __grid_constant__ Params p, const __grid_constant__ Tensor k) {
  constexpr int kWidth = kDim / 32, kWarps = kThreads / 32, kRows = kKeys / kWarps;
  using Vector =
      std::conditional_t<kWidth == 2, uint32_t, std::conditional_t<kWidth == 4, uint2, uint4>>;
  __shared__ float maxima[kWarps];
  __shared__ unsigned broken[4];
  const Place place = place_of_block<kKeys>(p);
  if (place.count <= 0) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int kv_head = static_cast<int>(blockIdx.y);
  if (threadIdx.x < 4) broken[threadIdx.x] = 0;
  __syncthreads();

  // 1. Keys without their mean, rotated.
  float mean[kWidth];
#pragma unroll
  for (int e = 0; e < kWidth; ++e)
    mean[e] =
        p.quantized
            .means[(int64_t{place.request} * p.kv_heads + kv_head) * kDim + lane * kWidth + e];
  Vector raw[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int key = i * kWarps + warp;
    const T* row = key < place.count ? key_row<T>(p.keys, k, place.request, place.first,
                                                  place.tile * kKeys + key, kv_head)
                                     : nullptr;
    raw[i] = row ? reinterpret_cast<const Vector*>(row)[lane] : Vector{};
  }
  float x[kRows][kWidth];
  float most = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int key = i * kWarps + warp;
#pragma unroll
    for (int e = 0; e < kWidth; e += 2) {
      const float2 pair =
          unpack2<T>(reinterpret_cast<const uint32_t(&)[kWidth / 2]>(raw[i])[e / 2]);
      x[i][e] = key < place.count ? pair.x - mean[e] : 0.f;
      x[i][e + 1] = key < place.count ? pair.y - mean[e + 1] : 0.f;
    }
    rotate(x[i]);
    float magnitude = 0;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) magnitude = max_nan(magnitude, fabsf(x[i][e]));
    if (__any_sync(kAllLanes, !isfinite(magnitude))) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) x[i][e] = 0;
      if (lane == 0) atomicOr(&broken[key / 32], 1u << key % 32);
    } else {
      most = fmaxf(most, magnitude);
    }
  }

  // 2. The tile's unit.
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2)
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, lanes));
  if (lane == 0) maxima[warp] = most;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) most = fmaxf(most, maxima[w]);
  const float inverse = most > 0 ? __fdiv_rn(127.f, most) : 0.f;
  if (threadIdx.x == 0) {
    const BrokenKeys keys = {{broken[0], broken[1], broken[2], broken[3]}};
    const unsigned any = keys.words[0] | keys.words[1] | keys.words[2] | keys.words[3];
    p.quantized.units[place.at] = {most * (rsqrtf(kDim) / 127), any != 0};
    p.quantized.broken[place.at] = keys;
  }

  // 3. Bytes.
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    int8_t* to = p.quantized.data + (place.at * kKeys + i * kWarps + warp) * kDim;
#pragma unroll
    for (int e = 0; e < kWidth; e += 2) {
      const int c = lane * kWidth + e, within = c % 16;
      const int byte = c - within + within % 8 * 2 + within / 8 * 2;
      *reinterpret_cast<uint16_t*>(to + byte) = static_cast<uint16_t>(
          round_to_bytes(__fmul_rn(x[i][e], inverse), __fmul_rn(x[i][e + 1], inverse), 0, 0));
    }
  }
}

// Keys that are bytes already. A block for each tile and KV head, a thread 16 elements at a time.
template <int kDim, int kKeys>
__global__ void __launch_bounds__(kThreads)
    arrange_tiles(const __grid_constant__ Params p, const __grid_constant__ Tensor k,
                  const __grid_constant__ blasst_scales scales) {
  constexpr int kLanes = kDim / 16, kGroups = kThreads / kLanes, kRows = kKeys / kGroups;
  const Place place = place_of_block<kKeys>(p);
  if (place.count <= 0) return;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int kv_head = static_cast<int>(blockIdx.y);
  uint4 raw[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int key = group + i * kGroups;
    const int8_t* row = key < place.count ? key_row<int8_t>(p.keys, k, place.request, place.first,
                                                            place.tile * kKeys + key, kv_head)
                                          : nullptr;
    raw[i] = row ? reinterpret_cast<const uint4*>(row)[lane] : uint4{};
  }
  uint4* to = reinterpret_cast<uint4*>(p.quantized.data + place.at * kKeys * kDim);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const auto [a, b, c, d] = raw[i];
    to[(group + i * kGroups) * kLanes + lane] =
        make_uint4(__byte_perm(a, c, 0x5410), __byte_perm(a, c, 0x7632), __byte_perm(b, d, 0x5410),
                   __byte_perm(b, d, 0x7632));
  }
  if (threadIdx.x > 0) return;
  const int64_t at = place.request * scales.stride_request + kv_head * scales.stride_head;
  p.quantized.units[place.at] = {scales.values ? scales.values[at] : 1.f, 0};
}

template <typename T, int kDim, int kKeys>
void quantize(const Params& p, const Tensor& k, cudaStream_t stream) {
  const dim3 tiles(p.quantized.tiles, p.kv_heads);
  const dim3 means(p.batch * (kDim / 32), p.kv_heads);
  enqueue(sum_tiles<T, kDim, kKeys>, tiles, kThreads, stream, p, k);
  enqueue(mean_keys<kDim, kKeys>, means, kMeanThreads, stream, p);
  enqueue(round_tiles<T, kDim, kKeys>, tiles, kThreads, stream, p, k);
}

template <int kDim, int kKeys>
void quantize(const Params& p, const Tensor& k, Element element, cudaStream_t stream) {
  element == Element::kHalf ? quantize<__half, kDim, kKeys>(p, k, stream)
                            : quantize<__nv_bfloat16, kDim, kKeys>(p, k, stream);
}

}  // namespace

void quantize_keys(const Params& p, const Tensor& k, Element element, int dim, void* cuda_stream) {
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  if (p.quantized.tiles == 0) return;
  if (dim == 64) return quantize<64, tile_keys(64)>(p, k, element, stream);
  if (dim == 128) return quantize<128, tile_keys(128)>(p, k, element, stream);
  quantize<256, tile_keys(256)>(p, k, element, stream);
}

void arrange_keys(const Params& p, const Tensor& k, const blasst_scales& scales, int dim,
                  void* cuda_stream) {
  if (p.quantized.tiles == 0) return;
  const auto enqueue_tiles = [&](auto kernel) {
    enqueue(kernel, dim3(p.quantized.tiles, p.kv_heads), kThreads,
            static_cast<cudaStream_t>(cuda_stream), p, k, scales);
  };
  if (dim == 64) return enqueue_tiles(arrange_tiles<64, tile_keys(64)>);
  if (dim == 128) return enqueue_tiles(arrange_tiles<128, tile_keys(128)>);
  enqueue_tiles(arrange_tiles<256, tile_keys(256)>);
}

}  // namespace blasst::cuda::prefill
