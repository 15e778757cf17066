// Thin wrappers over the PTX of sm_90a: mbarriers, bulk tensor copies, wgmma, named barriers.
//
// Shared-memory addresses are 32-bit (shared_address). Nothing here knows about attention.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace blasst::cuda::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same value, of which the compiler knows nothing: it is kept, not computed again.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// --- mbarrier -----------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine and to the cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same where `condition` holds, without a branch: the assembler serialises wgmma around
// branches that lanes take differently.
__device__ __forceinline__ void mbarrier_arrive_if(uint32_t barrier, bool condition) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.u32 p, %1, 0;\n"
      "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(barrier),
      "r"(static_cast<uint32_t>(condition))
      : "memory");
}

__device__ __forceinline__ void store_shared_if(uint32_t address, int value, bool condition) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.u32 p, %2, 0;\n"
      "@p st.volatile.shared.b32 [%0], %1;\n}" ::"r"(address),
      "r"(value), "r"(static_cast<uint32_t>(condition))
      : "memory");
}

// For a word that only grows and that others poll. Atomic, so that race checkers know it is meant.
__device__ __forceinline__ void raise_shared_if(uint32_t address, int value, bool condition) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.u32 p, %2, 0;\n"
      "@p red.shared.max.s32 [%0], %1;\n}" ::"r"(address),
      "r"(value), "r"(static_cast<uint32_t>(condition))
      : "memory");
}

__device__ __forceinline__ int poll_shared(uint32_t address) {
  int value;
  asm volatile("ld.volatile.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

// Arrive, and expect `bytes` of copies before the phase completes.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Whether the phase of this parity has completed; may sleep for a short while first.
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// --- bulk tensor copies -------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// How long the L2 should keep what a copy reads (createpolicy's encodings).
enum class L2Hint : uint64_t {
  kNormal = 0x1000000000000000,
  kFirst = 0x12F0000000000000,  // evict first
  kLast = 0x14F0000000000000,   // evict last
};

// One box of a 4-dimensional tensor to shared memory; completes on the barrier.
__device__ __forceinline__ void copy_box(uint32_t destination, const CUtensorMap* map,
                                         uint32_t barrier, int x, int y, int z, int w,
                                         L2Hint hint) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(destination),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w),
      "l"(static_cast<uint64_t>(hint))
      : "memory");
}

// Shared memory written by ordinary stores becomes visible to the copy engine and to wgmma.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- barriers and registers ---------------------------------------------------------------------

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

// A value that is the same in all lanes, in a form that the assembler knows to be so.
__device__ __forceinline__ int warp_uniform(int value) {
  return __shfl_sync(0xffffffffu, value, 0);
}

template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- arithmetic ---------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// NaN if either is NaN, unlike fmaxf.
__device__ __forceinline__ float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
__device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address));
}

// --- wgmma --------------------------------------------------------------------------------------

// Descriptor of an operand in shared memory, in rows of 128 bytes with the 128-byte swizzle, its
// 8-row blocks (1,024 bytes) contiguous and 1,024-byte aligned.
//   K-major (a row is 64 elements along k): `panel_bytes` is not used.
//   MN-major (a row is 64 elements along m or n): the distance to the next 64 of them.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint32_t panel_bytes = 16) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(panel_bytes >> 4) << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

// The same operand `bytes` further on. Addresses stay in the lower word: no carry.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return (descriptor & 0xFFFFFFFF00000000) | low;
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses of these registers across.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// One k = 16 step for the 64 rows of a warpgroup, d [64, kN] in float32:
//   first       d = a * b^T, both operands K-major in shared memory
//   more        d += a * b^T
//   first_registers, more_registers   the same with a in registers
//   registers   d += a * b, a in registers, b [16, kN] MN-major in shared memory
template <typename T, int kN>
struct Wgmma;

#define BLASST_REGS_32                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define BLASST_REGS_64                                                               \
  BLASST_REGS_32                                                                     \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BLASST_REGS_128                                                                      \
  BLASST_REGS_64                                                                             \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"         \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"         \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
  "%111"                                                                                     \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, "   \
  "%126, %127"
#define BLASST_INOUT_8(d, i)                                                                  \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define BLASST_INOUT_32(d, i)                                                \
  BLASST_INOUT_8(d, i), BLASST_INOUT_8(d, i + 8), BLASST_INOUT_8(d, i + 16), \
      BLASST_INOUT_8(d, i + 24)
#define BLASST_INOUT_64(d, i) BLASST_INOUT_32(d, i), BLASST_INOUT_32(d, i + 32)
#define BLASST_INOUT_128(d, i) BLASST_INOUT_64(d, i), BLASST_INOUT_64(d, i + 64)
#define BLASST_OUT_8(d, i)                                                                    \
  "=f"(d[i]), "=f"(d[i + 1]), "=f"(d[i + 2]), "=f"(d[i + 3]), "=f"(d[i + 4]), "=f"(d[i + 5]), \
      "=f"(d[i + 6]), "=f"(d[i + 7])
#define BLASST_OUT_32(d, i) \
  BLASST_OUT_8(d, i), BLASST_OUT_8(d, i + 8), BLASST_OUT_8(d, i + 16), BLASST_OUT_8(d, i + 24)
#define BLASST_OUT_64(d, i) BLASST_OUT_32(d, i), BLASST_OUT_32(d, i + 32)
#define BLASST_OUT_128(d, i) BLASST_OUT_64(d, i), BLASST_OUT_64(d, i + 64)

// n and its half; the operand numbers after the accumulators; PTX's and C++'s element types.
#define BLASST_WGMMA(n, half, A0, A1, A2, A3, A4, ptx_type, type)                               \
  template <>                                                                                   \
  struct Wgmma<type, n> {                                                                       \
    static __device__ __forceinline__ void first(float (&d)[half], uint64_t a, uint64_t b) {    \
      asm volatile(                                                                             \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"                                            \
          "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." ptx_type "." ptx_type               \
          " {" BLASST_REGS_##half "}, %" A0 ", %" A1 ", p, 1, 1, 0, 0;\n}"                      \
          : BLASST_OUT_##half(d, 0)                                                             \
          : "l"(a), "l"(b));                                                                    \
    }                                                                                           \
    static __device__ __forceinline__ void more(float (&d)[half], uint64_t a, uint64_t b) {     \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." ptx_type "." ptx_type      \
                   " {" BLASST_REGS_##half "}, %" A0 ", %" A1 ", 1, 1, 1, 0, 0;"                \
                   : BLASST_INOUT_##half(d, 0)                                                  \
                   : "l"(a), "l"(b));                                                           \
    }                                                                                           \
    static __device__ __forceinline__ void first_registers(float (&d)[half], const uint32_t* a, \
                                                           uint64_t b) {                        \
      asm volatile(                                                                             \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"                                            \
          "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." ptx_type "." ptx_type               \
          " {" BLASST_REGS_##half "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" A4               \
                                  ", p, 1, 1, 0;\n}"                                            \
          : BLASST_OUT_##half(d, 0)                                                             \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                \
    }                                                                                           \
    static __device__ __forceinline__ void more_registers(float (&d)[half], const uint32_t* a,  \
                                                          uint64_t b) {                         \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." ptx_type "." ptx_type      \
                   " {" BLASST_REGS_##half "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" A4      \
                                           ", 1, 1, 1, 0;"                                      \
                   : BLASST_INOUT_##half(d, 0)                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                       \
    }                                                                                           \
    static __device__ __forceinline__ void registers(float (&d)[half], const uint32_t* a,       \
                                                     uint64_t b) {                              \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." ptx_type "." ptx_type      \
                   " {" BLASST_REGS_##half "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" A4      \
                                           ", 1, 1, 1, 1;"                                      \
                   : BLASST_INOUT_##half(d, 0)                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                       \
    }                                                                                           \
  };

#define BLASST_WGMMA_SHAPES(ptx_type, type)                           \
  BLASST_WGMMA(64, 32, "32", "33", "34", "35", "36", ptx_type, type)  \
  BLASST_WGMMA(128, 64, "64", "65", "66", "67", "68", ptx_type, type) \
  BLASST_WGMMA(256, 128, "128", "129", "130", "131", "132", ptx_type, type)
BLASST_WGMMA_SHAPES("bf16", __nv_bfloat16)
BLASST_WGMMA_SHAPES("f16", __half)

#undef BLASST_WGMMA_SHAPES
#undef BLASST_WGMMA
#undef BLASST_INOUT_128
#undef BLASST_INOUT_64
#undef BLASST_INOUT_32
#undef BLASST_INOUT_8
#undef BLASST_OUT_128
#undef BLASST_OUT_64
#undef BLASST_OUT_32
#undef BLASST_OUT_8
#undef BLASST_REGS_128
#undef BLASST_REGS_64
#undef BLASST_REGS_32

}  // namespace blasst::cuda::ptx
