// How a consumer multiplies the keys and values of a tile: S^T = K Q^T and O^T = V^T P.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/core/decode/place.cuh"
#include "cuda/core/math.cuh"
#include "cuda/sm90/core/panels.cuh"
#include "cuda/sm90/core/ptx.cuh"
#include "cuda/sm90/core/wgmma.cuh"
#include "cuda/sm90/decode/layout.cuh"

namespace blasst::cuda::decode {

// As they lie in shared memory, in the type of the queries.
template <typename C>
class SharedKeys {
  using L = typename C::Layout;
  using Mma = ptx::Wgmma<typename C::OfKeys, C::kRows>;
  static constexpr int kSums = C::kRows / 2;

 public:
  static __device__ __forceinline__ void scores(const ThreadPlace&, float (&s)[kSums],
                                                uint32_t keys, uint32_t queries) {
#pragma unroll
    for (int x = 0; x < kSums; ++x) s[x] = 0;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < C::kQkDim; k += 16) {
      const int panel = k / kPanel, bytes = k % kPanel * 2;
      Mma::add(s, ptx::wgmma_descriptor(keys + panel * L::Keys::kPanelBytes + bytes),
               ptx::wgmma_descriptor(queries + panel * L::Queries::kPanelBytes + bytes));
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::fence_registers(s);
  }
};

template <typename C>
class SharedValues {
  using L = typename C::Layout;
  using Mma = ptx::Wgmma<typename C::Element, C::kRows>;
  static constexpr int kSums = C::kRows / 2;
  static constexpr int kPanels = C::kValueDim / 64;

 public:
  static __device__ __forceinline__ void add(const ThreadPlace&, float (&o)[kPanels][kSums],
                                             uint32_t values, uint32_t probabilities) {
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTileKeys; k += 16)
#pragma unroll
      for (int i = 0; i < kPanels; ++i)
        Mma::template add<true>(
            o[i], ptx::wgmma_descriptor(values + i * L::Values::kPanelBytes + k * kPanelRowBytes),
            ptx::wgmma_descriptor(probabilities + k * 2));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kPanels; ++i) ptx::fence_registers(o[i]);
  }

  // The value element, of a panel's 64, of a thread's half.
  static __device__ __forceinline__ int value_element(const ThreadPlace& at, int half) {
    return at.key(half);
  }
};

// Four elements of 8 bits as two pairs of fp16, without rounding: bytes {0, 1} and {2, 3}, or, of
// what a transposed load gives, {0, 2} and {1, 3}.
template <Cache kCache>
struct Widen;

template <>
struct Widen<Cache::kFloat8> {
  static __device__ __forceinline__ void neighbours(uint32_t bytes, uint32_t& low, uint32_t& high) {
    asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, a;\ncvt.rn.f16x2.e4m3x2 %1, b;\n}"
        : "=r"(low), "=r"(high)
        : "r"(bytes));
  }
  static __device__ __forceinline__ void alternate(uint32_t bytes, uint32_t& even, uint32_t& odd) {
    neighbours(__byte_perm(bytes, 0, 0x3120), even, odd);
  }
};

// A byte x + 128 below the byte 0x64 is the fp16 number 1,152 + x.
template <>
struct Widen<Cache::kInt8> {
  static __device__ __forceinline__ void neighbours(uint32_t bytes, uint32_t& low, uint32_t& high) {
    widen<0x4140, 0x4342>(bytes, low, high);
  }
  static __device__ __forceinline__ void alternate(uint32_t bytes, uint32_t& even, uint32_t& odd) {
    widen<0x4240, 0x4341>(bytes, even, odd);
  }

 private:
  template <unsigned kFirst, unsigned kSecond>
  static __device__ __forceinline__ void widen(uint32_t bytes, uint32_t& first, uint32_t& second) {
    const uint32_t raised = bytes ^ 0x80808080;
    first = subtract(__byte_perm(raised, 0x64646464, kFirst));
    second = subtract(__byte_perm(raised, 0x64646464, kSecond));
  }
  static __device__ __forceinline__ uint32_t subtract(uint32_t pair) {
    uint32_t y;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(pair), "r"(0x64806480));
    return y;
  }
};

// ptx::load_matrices of transposed matrices.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address));
}

inline constexpr int kChunk = 16;  // bytes, elements of a key or value in 8 bits

// In 8 bits, widened to fp16 on the way to the tensor core, in registers. Queries are fp16, too.
//
// A 16-byte chunk of a key that a thread loads as a matrix row gives it elements 4 c to 4 c + 3,
// c = lane % 4, where the product wants 2 c, 2 c + 1, 2 c + 8 and 2 c + 9: the queries' elements
// are permuted alike.
template <typename C>
class WidenedKeys {
  using L = typename C::Layout;
  using Mma = ptx::Wgmma<typename C::OfKeys, C::kRows>;
  using To = Widen<C::kCache == Cache::kInt8Keys ? Cache::kInt8 : C::kCache>;
  static constexpr int kSums = C::kRows / 2;

 public:
  // Queries in shared memory, as they were copied, become fp16 in the order above, each row times a
  // power of two that makes its largest element 2^14 or more; writes its inverse to `units`. All
  // consumers.
  template <typename Stored>
  static __device__ __forceinline__ void prepare_queries(std::byte* queries, float* units) {
    constexpr int kGroups = C::kQkDim / kChunk;  // of two 16-byte chunks of queries
    static_assert(kGroups <= 16 && 32 % kGroups == 0, "neighbouring lanes share a row");
#pragma unroll
    for (int first = 0; first < C::kRows * kGroups; first += kConsumers) {
      const int task = first + static_cast<int>(threadIdx.x);
      if (C::kRows * kGroups < kConsumers && task >= C::kRows * kGroups) break;  // whole warps
      const int row = task / kGroups, chunk = 2 * (task % kGroups);
      std::byte* panel = queries + chunk / 8 * L::Queries::kPanelBytes + row * kPanelRowBytes;
      auto* even = reinterpret_cast<uint4*>(panel + (chunk % 8 ^ row % 8) * 16);
      auto* odd = reinterpret_cast<uint4*>(panel + ((chunk % 8 + 1) ^ row % 8) * 16);
      const uint4 a = *even, b = *odd;
      const uint32_t stored[] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
      float2 pairs[8];
      uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        pairs[i] = unpack2<Stored>(stored[i]);
        largest = max(largest, __float_as_uint(fabsf(pairs[i].x)));
        largest = max(largest, __float_as_uint(fabsf(pairs[i].y)));
      }
#pragma unroll
      for (int lanes = 1; lanes < kGroups; lanes *= 2)
        largest = max(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
      // Of what is not finite, the exponent of the largest number that is.
      const int exponent = min(max(static_cast<int>(largest >> 23), 15), 254);
      const float factor = __uint_as_float((268 - exponent) << 23);
      const auto pack = [&](int i) {
        return pack2<__half>(__fmul_rn(pairs[i].x, factor), __fmul_rn(pairs[i].y, factor));
      };
      *even = make_uint4(pack(0), pack(2), pack(4), pack(6));
      *odd = make_uint4(pack(1), pack(3), pack(5), pack(7));
      if (chunk == 0) units[row] = __uint_as_float((exponent - 14) << 23);
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(1, kConsumers);
  }

  static __device__ __forceinline__ void scores(const ThreadPlace& at, float (&s)[kSums],
                                                uint32_t keys, uint32_t queries) {
    constexpr int kSteps = C::kQkDim / kChunk;
    uint32_t a[kSteps][4];
    const int key = 16 * at.warp + at.lane % 16;
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {
      uint32_t x[4];
      ptx::load_matrices(x, keys + place_of_vector<typename L::Keys>(key, step + at.lane / 16));
#pragma unroll
      for (int i = 0; i < 4; ++i)  // keys 8 (i % 2) on, step i / 2
        To::neighbours(x[i], a[step + i / 2][i % 2], a[step + i / 2][i % 2 + 2]);
    }
    const uint64_t q = ptx::wgmma_descriptor(queries);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint64_t b = ptx::advance(q, step / 4 * L::Queries::kPanelBytes + step % 4 * 32);
      step == 0 ? Mma::first_registers(s, a[step], b) : Mma::add_registers(s, a[step], b);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::fence_registers(s);
  }
};

// Of a value's 16-byte chunk a thread gets elements 2 r and 2 r + 1, r = lane / 4, for the
// product's rows r and r + 8: so the output is permuted. Probabilities are fp16, too.
template <typename C>
class WidenedValues {
  using L = typename C::Layout;
  using Mma = ptx::Wgmma<typename C::Element, C::kRows>;
  using To = Widen<C::kCache>;
  static constexpr int kSums = C::kRows / 2;
  static constexpr int kPanels = C::kValueDim / 64;

 public:
  static __device__ __forceinline__ void add(const ThreadPlace& at, float (&o)[kPanels][kSums],
                                             uint32_t values, uint32_t probabilities) {
    constexpr int kSteps = kTileKeys / 16;
    // All that is multiplied at once is in registers: of four panels, one at a time.
    constexpr int kAtOnce = kPanels == 4 ? 1 : kPanels;
    const uint64_t p = ptx::wgmma_descriptor(probabilities);
#pragma unroll
    for (int first = 0; first < kPanels; first += kAtOnce) {
      uint32_t a[kAtOnce][kSteps][4];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int step = 0; step < kSteps; step += 2) {
          uint32_t x[4];
          load_matrices_transposed(x, values + place_of_vector<typename L::Values>(
                                                   16 * step + at.lane, 4 * (first + i) + at.warp));
#pragma unroll
          for (int j = 0; j < 4; ++j) {  // keys 8 (j % 2) on, step j / 2
            uint32_t* to = a[i][step + j / 2] + j % 2 * 2;
            To::alternate(x[j], to[0], to[1]);
          }
        }
      }
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          Mma::add_registers(o[first + i], a[i][step], ptx::advance(p, step * 32));
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) ptx::fence_registers(o[first + i]);
    }
  }

  // The value element, of a panel's 64, of a thread's half.
  static __device__ __forceinline__ int value_element(const ThreadPlace& at, int half) {
    return 16 * at.warp + 2 * (at.lane / 4) + half;
  }
};

}  // namespace blasst::cuda::decode
