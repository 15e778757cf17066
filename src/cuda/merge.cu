#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/core/runtime.h"
#include "cuda/merge.h"

namespace blasst::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPiece = 8;  // elements of a thread, 16 bytes

template <typename T>
__device__ const T* row_of(const View& view, int64_t request, int64_t token, int64_t head) {
  return static_cast<const T*>(view.data) + request * view.stride_request +
         token * view.stride_token + head * view.stride_head;
}

template <typename T>
__global__ void merge_rows(const __grid_constant__ MergeParams p) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t pieces = p.value_dim / kPiece, rows = p.batch * p.query_length;
  const int64_t at = index % pieces * kPiece, head = index / pieces % p.heads;
  const int64_t row = index / pieces / p.heads;
  if (row >= rows) return;

  const int64_t cell = head * rows + row;
  const float a = p.lse_a[cell], b = p.lse_b[cell];
  const float most = fmaxf(a, b);
  const bool empty = most == -INFINITY && !isnan(a) && !isnan(b);
  float share_a = empty ? 0 : expf(a - most), share_b = empty ? 0 : expf(b - most);
  const float sum = share_a + share_b;
  if (p.lse && at == 0) p.lse[cell] = empty ? -INFINITY : most + logf(sum);
  if (!empty) share_a /= sum, share_b /= sum;

  const int64_t request = row / p.query_length, token = row % p.query_length;
  const auto load = [&](const View& view) {
    return *reinterpret_cast<const uint4*>(row_of<T>(view, request, token, head) + at);
  };
  const uint4 from_a = load(p.out_a), from_b = load(p.out_b);
  uint4 merged;
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    const float x = reinterpret_cast<const T*>(&from_a)[i],
                y = reinterpret_cast<const T*>(&from_b)[i];
    // What has no share adds nothing, whatever it is.
    reinterpret_cast<T*>(&merged)[i] =
        T((share_a == 0 ? 0 : share_a * x) + (share_b == 0 ? 0 : share_b * y));
  }
  *reinterpret_cast<uint4*>(const_cast<T*>(row_of<T>(p.out, request, token, head)) + at) = merged;
}

}  // namespace

void launch_merge(const MergeParams& p) {
  const int64_t threads = p.batch * p.query_length * p.heads * (p.value_dim / kPiece);
  if (threads == 0) return;
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  const auto stream = static_cast<cudaStream_t>(p.execution.stream);
  enqueue(p.out.dtype == BLASST_FLOAT16 ? merge_rows<__half> : merge_rows<__nv_bfloat16>,
          static_cast<int>(blocks), kThreads, stream, p);
}

}  // namespace blasst::cuda
