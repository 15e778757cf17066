// wgmma for few columns: keys or value elements are the 64 rows, query rows the 8 to 64 columns.
//
// Thread t of the warpgroup holds, for column block j and half h, the elements at row
// 16 * warp + lane / 4 + 8 * h and columns 8 * j + 2 * (lane % 4) + {0, 1}: d[4 * j + 2 * h + e].
#pragma once

#include "cuda/sm90/ptx.cuh"

namespace blasst::cuda::decode {

// One k = 16 step, d [64, kN] += a * b. b is K-major in shared memory, a K-major (keys) or M-major
// (values, kTransposed).
template <typename T, int kN>
struct NarrowMma;

#define BLASST_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define BLASST_D8(i) BLASST_D4(i), BLASST_D4(i + 4)
#define BLASST_D16(i) BLASST_D8(i), BLASST_D8(i + 8)
#define BLASST_D32(i) BLASST_D16(i), BLASST_D16(i + 16)
#define BLASST_R4 "%0, %1, %2, %3"
#define BLASST_R8 BLASST_R4 ", %4, %5, %6, %7"
#define BLASST_R16 BLASST_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define BLASST_R32 \
  BLASST_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

// n and its half; the operand numbers after the accumulators; PTX's and C++'s element types.
#define BLASST_NARROW(n, half, A, B, Transpose, ptx_type, type)                             \
  template <>                                                                               \
  struct NarrowMma<type, n> {                                                               \
    template <bool kTransposed>                                                             \
    static __device__ __forceinline__ void step(float (&d)[half], uint64_t a, uint64_t b) { \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." ptx_type "." ptx_type  \
                   " {" BLASST_R##half "}, %" A ", %" B ", 1, 1, 1, %" Transpose ", 0;"     \
                   : BLASST_D##half(0)                                                      \
                   : "l"(a), "l"(b), "n"(int{kTransposed}));                                \
    }                                                                                       \
  };
#define BLASST_NARROW_SHAPES(ptx_type, type)              \
  BLASST_NARROW(8, 4, "4", "5", "6", ptx_type, type)      \
  BLASST_NARROW(16, 8, "8", "9", "10", ptx_type, type)    \
  BLASST_NARROW(32, 16, "16", "17", "18", ptx_type, type) \
  BLASST_NARROW(64, 32, "32", "33", "34", ptx_type, type)
BLASST_NARROW_SHAPES("bf16", __nv_bfloat16)
BLASST_NARROW_SHAPES("f16", __half)

#undef BLASST_NARROW_SHAPES
#undef BLASST_NARROW
#undef BLASST_R32
#undef BLASST_R16
#undef BLASST_R8
#undef BLASST_R4
#undef BLASST_D32
#undef BLASST_D16
#undef BLASST_D8
#undef BLASST_D4

// Stores transposed 8 x 8 blocks of 2-byte elements; lane 8 * b + i gives the address of row i of
// block b. A block's fragment is one register a thread, as above.
__device__ __forceinline__ void store_transposed_2(uint32_t address, uint32_t r0, uint32_t r1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address),
               "r"(r0), "r"(r1)
               : "memory");
}
__device__ __forceinline__ void store_transposed_4(uint32_t address, uint32_t r0, uint32_t r1,
                                                   uint32_t r2, uint32_t r3) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(r0), "r"(r1), "r"(r2), "r"(r3)
      : "memory");
}

}  // namespace blasst::cuda::decode
