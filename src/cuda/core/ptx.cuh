// Thin wrappers over the PTX that every architecture from sm_80 on has. Nothing here knows about
// attention.
#pragma once

#include <cstdint>

namespace blasst::cuda::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A value that is the same in all lanes, in a form that the assembler knows to be so.
__device__ __forceinline__ int warp_uniform(int value) {
  return __shfl_sync(0xffffffffu, value, 0);
}

// All `threads` of the named barrier meet; 1 to 15, 0 is __syncthreads.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Whether `vote` holds in every one of the `threads`. The result is the same everywhere, but the
// assembler cannot know: pass it through a vote of the warp before a branch around wgmma.
__device__ __forceinline__ bool named_barrier_all(int id, int threads, bool vote) {
  uint32_t all;
  asm volatile(
      "{\n.reg .pred in, out;\n"
      "setp.ne.u32 in, %3, 0;\n"
      "barrier.cta.red.and.pred out, %1, %2, in;\n"
      "selp.b32 %0, 1, 0, out;\n}"
      : "=r"(all)
      : "r"(id), "r"(threads), "r"(static_cast<uint32_t>(vote))
      : "memory");
  return all != 0;
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address));
}

// load_matrices, each transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address));
}

}  // namespace blasst::cuda::ptx
