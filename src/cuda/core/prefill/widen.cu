#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/core/keys.cuh"
#include "cuda/core/math.cuh"
#include "cuda/core/prefill/widen.h"
#include "cuda/core/runtime.h"

namespace blasst::cuda::prefill {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = 8;  // a thread's

enum class Stored { kInt8, kFloat8, kOfQueries };

// Elements 2 i and 2 i + 1 of eight.
template <Stored kStored, typename T>
__device__ __forceinline__ float2 pair_of(const uint32_t* words, int i) {
  if constexpr (kStored == Stored::kOfQueries) {
    return unpack2<T>(words[i]);
  } else {
    const uint32_t bits = words[i / 2] >> 16 * (i % 2);
    if constexpr (kStored == Stored::kInt8)
      return {static_cast<float>(static_cast<int8_t>(bits)),
              static_cast<float>(static_cast<int8_t>(bits >> 8))};
    const __half2 halves =
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(bits), __NV_E4M3);
    return __half22float2(halves);
  }
}

struct Source {
  const std::byte* data;
  int64_t stride_outer, stride_token, stride_head;  // bytes
  blasst_scales scales;
};

// The keys of a request and KV head, kThreads * kElements elements a block; to int8, their bytes. A
// page that is none reads as zeros.
template <Stored kStored, typename T>
__global__ void __launch_bounds__(kThreads)
    widen_rows(const __grid_constant__ KeyLayout keys, const __grid_constant__ Source from, T* to,
               int64_t tokens, int dim) {
  const int request = static_cast<int>(blockIdx.z), kv_head = static_cast<int>(blockIdx.y);
  const int parts = dim / kElements;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const auto token = static_cast<int>(index / parts);
  const int element = static_cast<int>(index % parts) * kElements;
  const Span span = keys_of_request(keys, request);
  if (token >= span.count) return;
  int page = 0;
  bool is_none = false;
  if (keys.page_table) {
    page = keys.page_table[request * keys.page_table_stride + token / keys.page_size];
    is_none = page < 0 || page >= keys.pages;
  }
  constexpr int kBytes = kStored == Stored::kOfQueries ? 2 : 1;
  uint32_t words[kElements * kBytes / 4] = {};
  if (!is_none) {
    const TokenPlace at = place_of_token(keys, request, span.first, token, page);
    const std::byte* row = from.data + at.outer * from.stride_outer + at.token * from.stride_token +
                           kv_head * from.stride_head;
    if constexpr (kBytes == 2) {
      const uint4 x = reinterpret_cast<const uint4*>(row)[element / kElements];
      words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
    } else {
      const uint2 x = reinterpret_cast<const uint2*>(row)[element / kElements];
      words[0] = x.x, words[1] = x.y;
    }
  }
  // Where the request's token lies in a tensor of its layout without pages.
  const int64_t outer = keys.cu_seqlens ? 0 : request;
  const int64_t heads = gridDim.y;
  T* row = to + ((outer * tokens + span.first + token) * heads + kv_head) * dim;
  if constexpr (std::is_same_v<T, int8_t>) {
    *reinterpret_cast<uint2*>(row + element) = make_uint2(words[0], words[1]);
  } else {
    const blasst_scales& s = from.scales;
    const float scale =
        s.values ? s.values[request * s.stride_request + kv_head * s.stride_head] : 1;
    uint32_t wide[kElements / 2];
#pragma unroll
    for (int i = 0; i < kElements / 2; ++i) {
      const float2 x = pair_of<kStored, T>(words, i);
      wide[i] = pack2<T>(__fmul_rn(x.x, scale), __fmul_rn(x.y, scale));
    }
    *reinterpret_cast<uint4*>(row + element) = make_uint4(wide[0], wide[1], wide[2], wide[3]);
  }
}

template <Stored kStored, typename T>
void enqueue_rows(const Widening& w, const Widened& t, cudaStream_t stream) {
  const int64_t bytes = kStored == Stored::kOfQueries ? 2 : 1;
  const Source from{static_cast<const std::byte*>(t.from.data), t.from.stride_outer * bytes,
                    t.from.stride_token * bytes, t.from.stride_head * bytes, t.scales};
  const auto dim = static_cast<int>(t.from.dim);
  const int64_t parts = int64_t{w.keys.length} * (dim / kElements);
  const dim3 blocks(static_cast<unsigned>((parts + kThreads - 1) / kThreads), w.kv_heads, w.batch);
  enqueue(widen_rows<kStored, T>, blocks, kThreads, stream, w.keys, from, static_cast<T*>(t.to),
          t.tokens, dim);
}

template <typename T>
void enqueue_tensor(const Widening& w, const Widened& t, cudaStream_t stream) {
  switch (t.type) {
    case BLASST_INT8:
      return enqueue_rows<Stored::kInt8, T>(w, t, stream);
    case BLASST_FLOAT8_E4M3:
      return enqueue_rows<Stored::kFloat8, T>(w, t, stream);
    default:
      return enqueue_rows<Stored::kOfQueries, T>(w, t, stream);
  }
}

}  // namespace

void widen(const Widening& w) {
  if (w.batch == 0 || w.keys.length == 0 || w.k.tokens == 0) return;
  const auto stream = static_cast<cudaStream_t>(w.params.execution.stream);
  for (const Widened* t : {&w.k, &w.v}) {
    if (!t->to) continue;
    if (t->to_type == BLASST_INT8)
      enqueue_rows<Stored::kInt8, int8_t>(w, *t, stream);
    else if (w.element == BLASST_FLOAT16)
      enqueue_tensor<__half>(w, *t, stream);
    else
      enqueue_tensor<__nv_bfloat16>(w, *t, stream);
  }
}

}  // namespace blasst::cuda::prefill
