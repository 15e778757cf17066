// Thin wrappers over the PTX that sm_90a has beside core/ptx.cuh: mbarriers, bulk tensor copies,
// named barriers.
//
// Shared-memory addresses are 32-bit (shared_address). Nothing here knows about attention.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/core/ptx.cuh"

namespace blasst::cuda::ptx {

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

// For a word that others poll. Atomic, so that race checkers know it is meant; an exchange, because
// the assembler puts the whole warp's own maximum before a reduction.
__device__ __forceinline__ void post_shared_if(uint32_t address, int value, bool condition) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b32 old;\n"
      "setp.ne.u32 p, %2, 0;\n"
      "@p atom.shared.exch.b32 old, [%0], %1;\n}" ::"r"(address),
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

// The same; sleeps for so many nanoseconds at most.
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, uint32_t parity,
                                                  uint32_t nanoseconds) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, %3;\n"
      "selp.b32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity), "r"(nanoseconds)
      : "memory");
  return done != 0;
}

// The same, without a sleep.
__device__ __forceinline__ bool mbarrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
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

// One box of a 5-dimensional tensor whose innermost dimension is a panel (tensor_map.h).
__device__ __forceinline__ void copy_panels(uint32_t destination, const CUtensorMap* map,
                                            uint32_t barrier, int y, int z, int panel, int w,
                                            L2Hint hint) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(destination),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(0), "r"(y), "r"(z), "r"(panel),
      "r"(w), "l"(static_cast<uint64_t>(hint))
      : "memory");
}

// Bytes to shared memory, a multiple of 16 between 16-byte aligned addresses; completes on the
// barrier.
__device__ __forceinline__ void copy_bytes(uint32_t destination, const void* source, uint32_t bytes,
                                           uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(destination),
      "l"(reinterpret_cast<uint64_t>(source)), "r"(bytes), "r"(barrier)
      : "memory");
}

// One box of a 4-dimensional tensor from shared memory. Of the thread's group of stores.
__device__ __forceinline__ void store_box(const CUtensorMap* map, uint32_t source, int x, int y,
                                          int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          reinterpret_cast<uint64_t>(map)),
      "r"(source), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// The thread's stores have read shared memory, which may be written again.
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void wait_stores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Shared memory written by ordinary stores becomes visible to the copy engine and to wgmma.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- barriers and registers ---------------------------------------------------------------------

// A thread's, as a kernel with so many threads a block starts. Warpgroups share out no more than
// these: who asks for more than the others give back waits for ever.
constexpr int starting_registers(int threads) { return 65536 / threads / 8 * 8; }

template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- matrices in shared memory ----------------------------------------------------------------

// Four 8 x 8 blocks of 2-byte elements as load_matrices reads them.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

// Stores transposed 8 x 8 blocks of 2-byte elements; lane 8 * b + i gives the address of row i of
// block b. A block's fragment is one register a thread.
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

}  // namespace blasst::cuda::ptx
