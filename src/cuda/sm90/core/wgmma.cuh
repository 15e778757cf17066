// The tensor cores' instructions of sm_90a: a warpgroup multiplies 64 rows.
//
// Thread t of the warpgroup holds, for column block j and half h, the elements at row
// 16 * warp + lane / 4 + 8 * h and columns 8 * j + 2 * (lane % 4) + {0, 1}: d[4 * j + 2 * h + e].
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace blasst::cuda::ptx {

// Descriptor of an operand in shared memory, in rows of 128 or 64 bytes with the swizzle of that
// width, its 8-row blocks contiguous and 1,024-byte aligned.
//   K-major (a row runs along k): `panel_bytes` is not used.
//   MN-major (a row runs along m or n): the distance to the next row's worth of them.
template <int kRowBytes = 128>
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint32_t panel_bytes = 16) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(panel_bytes >> 4) << 16 | uint64_t{8 * kRowBytes >> 4} << 32 |
         uint64_t{kRowBytes == 128 ? 1 : 2} << 62;
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
__device__ __forceinline__ void fence_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void fence_registers(int (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// One k = 16 step, d [64, kN] in float32; b is K-major in shared memory unless said otherwise:
//   first       d = a * b^T, a K-major in shared memory
//   add         d += a * b^T, a in shared memory, K-major or (kTransposed) M-major
//   first_registers, add_registers   a in registers
//   add_registers_by_columns   d += a * b, a in registers, b [16, kN] MN-major
template <typename T, int kN>
struct Wgmma;

#define BLASST_REGS_4 "%0, %1, %2, %3"
#define BLASST_REGS_8 BLASST_REGS_4 ", %4, %5, %6, %7"
#define BLASST_REGS_12 BLASST_REGS_8 ", %8, %9, %10, %11"
#define BLASST_REGS_16 BLASST_REGS_12 ", %12, %13, %14, %15"
#define BLASST_REGS_24 BLASST_REGS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define BLASST_REGS_32 \
  BLASST_REGS_24       \
  ", %24, %25, %26, %27, %28, %29, %30, %31"
#define BLASST_REGS_48 \
  BLASST_REGS_32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define BLASST_REGS_64 \
  BLASST_REGS_48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BLASST_REGS_96                                                               \
  BLASST_REGS_64                                                                     \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define BLASST_REGS_128                                                                          \
  BLASST_REGS_96                                                                                 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"
#define BLASST_EACH_4(mode, i) mode(d[i]), mode(d[i + 1]), mode(d[i + 2]), mode(d[i + 3])
#define BLASST_EACH_8(mode, i) BLASST_EACH_4(mode, i), BLASST_EACH_4(mode, i + 4)
#define BLASST_EACH_12(mode, i) BLASST_EACH_8(mode, i), BLASST_EACH_4(mode, i + 8)
#define BLASST_EACH_16(mode, i) BLASST_EACH_8(mode, i), BLASST_EACH_8(mode, i + 8)
#define BLASST_EACH_24(mode, i) BLASST_EACH_16(mode, i), BLASST_EACH_8(mode, i + 16)
#define BLASST_EACH_32(mode, i) BLASST_EACH_16(mode, i), BLASST_EACH_16(mode, i + 16)
#define BLASST_EACH_48(mode, i) BLASST_EACH_32(mode, i), BLASST_EACH_16(mode, i + 32)
#define BLASST_EACH_64(mode, i) BLASST_EACH_32(mode, i), BLASST_EACH_32(mode, i + 32)
#define BLASST_EACH_96(mode, i) BLASST_EACH_64(mode, i), BLASST_EACH_32(mode, i + 64)
#define BLASST_EACH_128(mode, i) BLASST_EACH_64(mode, i), BLASST_EACH_64(mode, i + 64)
#define BLASST_OUT "=f"
#define BLASST_INOUT "+f"

// n and its half; the operand numbers after the accumulators; PTX's and C++'s element types.
#define BLASST_WGMMA(n, half, A0, A1, A2, A3, A4, ptx_type, type)                               \
  template <>                                                                                   \
  struct Wgmma<type, n> {                                                                       \
    static __device__ __forceinline__ void first(float (&d)[half], uint64_t a, uint64_t b) {    \
      asm volatile(                                                                             \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"                                            \
          "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." ptx_type "." ptx_type               \
          " {" BLASST_REGS_##half "}, %" A0 ", %" A1 ", p, 1, 1, 0, 0;\n}"                      \
          : BLASST_EACH_##half(BLASST_OUT, 0)                                                   \
          : "l"(a), "l"(b));                                                                    \
    }                                                                                           \
    template <bool kTransposed = false>                                                         \
    static __device__ __forceinline__ void add(float (&d)[half], uint64_t a, uint64_t b) {      \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." ptx_type "." ptx_type      \
                   " {" BLASST_REGS_##half "}, %" A0 ", %" A1 ", 1, 1, 1, %" A2 ", 0;"          \
                   : BLASST_EACH_##half(BLASST_INOUT, 0)                                        \
                   : "l"(a), "l"(b), "n"(int{kTransposed}));                                    \
    }                                                                                           \
    static __device__ __forceinline__ void first_registers(float (&d)[half], const uint32_t* a, \
                                                           uint64_t b) {                        \
      asm volatile(                                                                             \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"                                            \
          "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." ptx_type "." ptx_type               \
          " {" BLASST_REGS_##half "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" A4               \
                                  ", p, 1, 1, 0;\n}"                                            \
          : BLASST_EACH_##half(BLASST_OUT, 0)                                                   \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                \
    }                                                                                           \
    static __device__ __forceinline__ void add_registers(float (&d)[half], const uint32_t* a,   \
                                                         uint64_t b) {                          \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." ptx_type "." ptx_type      \
                   " {" BLASST_REGS_##half "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" A4      \
                                           ", 1, 1, 1, 0;"                                      \
                   : BLASST_EACH_##half(BLASST_INOUT, 0)                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                       \
    }                                                                                           \
    static __device__ __forceinline__ void add_registers_by_columns(float (&d)[half],           \
                                                                    const uint32_t* a,          \
                                                                    uint64_t b) {               \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." ptx_type "." ptx_type      \
                   " {" BLASST_REGS_##half "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" A4      \
                                           ", 1, 1, 1, 1;"                                      \
                   : BLASST_EACH_##half(BLASST_INOUT, 0)                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                       \
    }                                                                                           \
  };

#define BLASST_WGMMA_SHAPES(ptx_type, type)                            \
  BLASST_WGMMA(8, 4, "4", "5", "6", "7", "8", ptx_type, type)          \
  BLASST_WGMMA(16, 8, "8", "9", "10", "11", "12", ptx_type, type)      \
  BLASST_WGMMA(32, 16, "16", "17", "18", "19", "20", ptx_type, type)   \
  BLASST_WGMMA(64, 32, "32", "33", "34", "35", "36", ptx_type, type)   \
  BLASST_WGMMA(128, 64, "64", "65", "66", "67", "68", ptx_type, type)  \
  BLASST_WGMMA(192, 96, "96", "97", "98", "99", "100", ptx_type, type) \
  BLASST_WGMMA(256, 128, "128", "129", "130", "131", "132", ptx_type, type)
BLASST_WGMMA_SHAPES("bf16", __nv_bfloat16)
BLASST_WGMMA_SHAPES("f16", __half)

// One k = 32 step of bytes, d [64, kN], b K-major in shared memory: as above. Of a in registers a
// thread has four bytes side by side where 16-bit operands have two elements: a[h + 2 * half] at
// row lane / 4 + 8 * h, bytes 16 * half + 4 * (lane % 4) on.
//   WgmmaInt8          int8 x int8, exactly, in int32
//   WgmmaInt8Uint8     int8 x uint8, exactly, in int32
//   WgmmaFloat8        float8_e4m3 x float8_e4m3 in float32, of which a step keeps the 13 binary
//                      digits behind the largest product's or sum's first
template <int kN>
struct WgmmaInt8;
template <int kN>
struct WgmmaInt8Uint8;
template <int kN>
struct WgmmaFloat8;

#define BLASST_OUT_INT "=r"
#define BLASST_INOUT_INT "+r"
// signs: of float operands
#define BLASST_WGMMA_BYTES(name, n, half, A0, A1, A2, A3, A4, types, sum, OUT, INOUT, signs)   \
  template <>                                                                                  \
  struct name<n> {                                                                             \
    static __device__ __forceinline__ void first(sum (&d)[half], uint64_t a, uint64_t b) {     \
      asm volatile(                                                                            \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"                                           \
          "wgmma.mma_async.sync.aligned.m64n" #n "k32." types " {" BLASST_REGS_##half          \
          "}, %" A0 ", %" A1 ", p" signs ";\n}"                                                \
          : BLASST_EACH_##half(OUT, 0)                                                         \
          : "l"(a), "l"(b));                                                                   \
    }                                                                                          \
    static __device__ __forceinline__ void add(sum (&d)[half], uint64_t a, uint64_t b) {       \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k32." types " {" BLASST_REGS_##half \
                   "}, %" A0 ", %" A1 ", 1" signs ";"                                          \
                   : BLASST_EACH_##half(INOUT, 0)                                              \
                   : "l"(a), "l"(b));                                                          \
    }                                                                                          \
    static __device__ __forceinline__ void first_registers(sum (&d)[half], const uint32_t* a,  \
                                                           uint64_t b) {                       \
      asm volatile(                                                                            \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"                                           \
          "wgmma.mma_async.sync.aligned.m64n" #n "k32." types " {" BLASST_REGS_##half          \
          "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" A4 ", p" signs ";\n}"                   \
          : BLASST_EACH_##half(OUT, 0)                                                         \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                               \
    }                                                                                          \
    static __device__ __forceinline__ void add_registers(sum (&d)[half], const uint32_t* a,    \
                                                         uint64_t b) {                         \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k32." types " {" BLASST_REGS_##half \
                   "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" A4 ", 1" signs ";"             \
                   : BLASST_EACH_##half(INOUT, 0)                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                      \
    }                                                                                          \
  };
#define BLASST_WGMMA_INT8(n, half, A0, A1, A2, A3, A4)                                         \
  BLASST_WGMMA_BYTES(WgmmaInt8, n, half, A0, A1, A2, A3, A4, "s32.s8.s8", int, BLASST_OUT_INT, \
                     BLASST_INOUT_INT, "")
#define BLASST_WGMMA_INT8_UINT8(n, half, A0, A1, A2, A3, A4)                        \
  BLASST_WGMMA_BYTES(WgmmaInt8Uint8, n, half, A0, A1, A2, A3, A4, "s32.s8.u8", int, \
                     BLASST_OUT_INT, BLASST_INOUT_INT, "")
#define BLASST_WGMMA_FLOAT8(n, half, A0, A1, A2, A3, A4)                                           \
  BLASST_WGMMA_BYTES(WgmmaFloat8, n, half, A0, A1, A2, A3, A4, "f32.e4m3.e4m3", float, BLASST_OUT, \
                     BLASST_INOUT, ", 1, 1")
// Products of three digits of queries, in decode; of two of probabilities.
#define BLASST_WGMMA_DIGITS(SHAPE)            \
  SHAPE(24, 12, "12", "13", "14", "15", "16") \
  SHAPE(48, 24, "24", "25", "26", "27", "28") \
  SHAPE(96, 48, "48", "49", "50", "51", "52") \
  SHAPE(192, 96, "96", "97", "98", "99", "100")
#define BLASST_WGMMA_PAIRS(SHAPE)             \
  SHAPE(8, 4, "4", "5", "6", "7", "8")        \
  SHAPE(16, 8, "8", "9", "10", "11", "12")    \
  SHAPE(32, 16, "16", "17", "18", "19", "20") \
  SHAPE(64, 32, "32", "33", "34", "35", "36") \
  SHAPE(128, 64, "64", "65", "66", "67", "68")
BLASST_WGMMA_DIGITS(BLASST_WGMMA_INT8)
BLASST_WGMMA_INT8(64, 32, "32", "33", "34", "35", "36")
BLASST_WGMMA_INT8(128, 64, "64", "65", "66", "67", "68")
BLASST_WGMMA_PAIRS(BLASST_WGMMA_INT8_UINT8)
BLASST_WGMMA_DIGITS(BLASST_WGMMA_FLOAT8)
BLASST_WGMMA_PAIRS(BLASST_WGMMA_FLOAT8)

#undef BLASST_WGMMA_PAIRS
#undef BLASST_WGMMA_DIGITS
#undef BLASST_WGMMA_FLOAT8
#undef BLASST_WGMMA_INT8_UINT8
#undef BLASST_WGMMA_BYTES
#undef BLASST_WGMMA_INT8
#undef BLASST_INOUT_INT
#undef BLASST_OUT_INT
#undef BLASST_WGMMA_SHAPES
#undef BLASST_WGMMA
#undef BLASST_INOUT
#undef BLASST_OUT
#undef BLASST_EACH_128
#undef BLASST_EACH_64
#undef BLASST_EACH_48
#undef BLASST_EACH_32
#undef BLASST_EACH_24
#undef BLASST_EACH_16
#undef BLASST_EACH_12
#undef BLASST_EACH_8
#undef BLASST_EACH_4
#undef BLASST_REGS_128
#undef BLASST_REGS_64
#undef BLASST_REGS_48
#undef BLASST_REGS_32
#undef BLASST_REGS_24
#undef BLASST_REGS_16
#undef BLASST_REGS_12
#undef BLASST_REGS_8
#undef BLASST_REGS_4

}  // namespace blasst::cuda::ptx
