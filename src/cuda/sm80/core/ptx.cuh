// Thin wrappers over the PTX of sm_80: asynchronous copies, matrices, products. Nothing here knows
// about attention.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/core/ptx.cuh"

namespace blasst::cuda::ptx {

// 16 bytes from global to shared memory, both aligned; zeros where not `valid`, whatever the
// source.
__device__ __forceinline__ void copy_16(uint32_t destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination),
               "l"(__cvta_generic_to_global(source)), "r"(valid ? 16 : 0)
               : "memory");
}

// The copies since the last commit are a group.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for this thread's groups but the kPending newest.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The transpose of an 8 x 8 matrix of 16-bit elements, of which lane l has two of row l / 4.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// d = a b + c of a warp: a [16, 16], b [16, 8], c and d [16, 8] (core/fragment.cuh).
template <typename T>
__device__ __forceinline__ void multiply(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         float c0, float c1, float c2, float c3);
#define BLASST_MULTIPLY(type, name)                                                                \
  template <>                                                                                      \
  __device__ __forceinline__ void multiply<type>(float* d, const uint32_t(&a)[4], uint32_t b0,     \
                                                 uint32_t b1, float c0, float c1, float c2,        \
                                                 float c3) {                                       \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                     \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                 \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), \
          "f"(c3));                                                                                \
  }
BLASST_MULTIPLY(__nv_bfloat16, "bf16")
BLASST_MULTIPLY(__half, "f16")
#undef BLASST_MULTIPLY

// d = a b
template <typename T>
__device__ __forceinline__ void multiply_first(float* d, const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
  multiply<T>(d, a, b0, b1, 0, 0, 0, 0);
}

// d += a b
template <typename T>
__device__ __forceinline__ void multiply_add(float* d, const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  multiply<T>(d, a, b0, b1, d[0], d[1], d[2], d[3]);
}

}  // namespace blasst::cuda::ptx
