// How a consumer multiplies the keys and values of a tile: S^T = K Q^T and O^T = V^T P.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/core/decode/place.cuh"
#include "cuda/core/math.cuh"
#include "cuda/sm90/core/panels.cuh"
#include "cuda/sm90/core/ptx.cuh"
#include "cuda/sm90/core/wgmma.cuh"
#include "cuda/sm90/decode/digits.cuh"
#include "cuda/sm90/decode/layout.cuh"

namespace blasst::cuda::decode {

// As they lie in shared memory, in the type of the queries.
template <typename C>
class SharedKeys {
  using L = typename C::Layout;
  using Mma = ptx::Wgmma<typename C::Element, C::kRows>;
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
  // Of a tile, packed into shared memory as [query row, key].
  static __device__ __forceinline__ void store_probabilities(const ThreadPlace& at,
                                                             const float (&p)[kSums],
                                                             uint32_t probabilities) {
    const int chunk = 2 * at.warp + at.lane / 8 % 2;  // 8 keys
    const auto place = [&](int row) {
      return probabilities + row * kPanelRowBytes + (chunk ^ row % 8) * 16;
    };
    const auto pack = [&](int x) { return pack2<typename C::Element>(p[x], p[x + 1]); };
    if constexpr (C::kRows == 8) {
      ptx::store_transposed_2(place(at.lane % 8), pack(0), pack(2));
    } else {
#pragma unroll
      for (int j = 0; j < C::kRows / 8; j += 2)
        ptx::store_transposed_4(place(8 * j + at.lane / 16 * 8 + at.lane % 8), pack(4 * j),
                                pack(4 * j + 2), pack(4 * j + 4), pack(4 * j + 6));
    }
  }

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

// In 8 bits, as they lie in shared memory, in the type of the queries' digits.
template <typename C>
class ByteKeys {
  using L = typename C::Layout;
  using D = Digits<C::kCache>;
  using Sum = typename D::Sum;
  using Mma = typename D::template KeyProduct<kQueryDigits * C::kRows>;
  static constexpr int kSums = C::kRows / 2;

 public:
  // Queries in shared memory, as they were copied, are split into digits, each row times a power of
  // two that brings its largest element to 2^kLargestQuery or more; writes its inverse to `units`.
  // Of a row with an infinity, what is infinite alone counts. All consumers.
  template <typename Stored>
  static __device__ __forceinline__ void split_queries(const std::byte* queries, std::byte* digits,
                                                       float* units) {
    constexpr int kVectors = C::kQkDim / 16;  // of digits, of a row
    static_assert(kVectors <= 16 && 32 % kVectors == 0, "neighbouring lanes share a row");
#pragma unroll
    for (int first = 0; first < C::kRows * kVectors; first += kConsumers) {
      const int task = first + static_cast<int>(threadIdx.x);
      if (C::kRows * kVectors < kConsumers && task >= C::kRows * kVectors) break;  // whole warps
      const int row = task / kVectors, vector = task % kVectors;
      float x[4][4];
      uint32_t largest = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 stored = *reinterpret_cast<const uint4*>(
            queries + place_of_vector<typename L::Queries>(row, 2 * vector + half));
        const uint32_t pairs[] = {stored.x, stored.y, stored.z, stored.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 pair = unpack2<Stored>(pairs[i]);
          x[2 * half + i / 2][i % 2 * 2] = pair.x;
          x[2 * half + i / 2][i % 2 * 2 + 1] = pair.y;
          largest =
              max(largest, max(__float_as_uint(fabsf(pair.x)), __float_as_uint(fabsf(pair.y))));
        }
      }
#pragma unroll
      for (int lanes = 1; lanes < kVectors; lanes *= 2)
        largest = max(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
      const bool finite = largest < 0x7f800000;
      const int exponent = max(static_cast<int>(largest >> 23), D::kLargestQuery + 1);
      const float factor = __uint_as_float((254 + D::kLargestQuery - exponent) << 23);
      uint32_t split[4][kQueryDigits];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (float& y : x[i]) y = finite ? __fmul_rn(y, factor) : isinf(y) ? copysignf(1, y) : 0;
        D::split_queries(x[i], split[i]);
      }
#pragma unroll
      for (int digit = 0; digit < kQueryDigits; ++digit)
        *reinterpret_cast<uint4*>(
            digits + place_of_vector<typename L::QueryDigits>(digit * C::kRows + row, vector)) =
            make_uint4(split[0][digit], split[1][digit], split[2][digit], split[3][digit]);
      if (vector == 0)
        units[row] = __uint_as_float(finite ? (exponent - D::kLargestQuery) << 23 : largest);
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(1, kConsumers);
  }

  static __device__ __forceinline__ void scores(const ThreadPlace& at, float (&s)[kSums],
                                                uint32_t keys, uint32_t digits,
                                                const float (&units)[C::kRows / 4]) {
    Sum sums[kQueryDigits * kSums];
    const uint64_t a = ptx::wgmma_descriptor<L::Keys::kRowBytes>(keys);
    const uint64_t b = ptx::wgmma_descriptor<L::QueryDigits::kRowBytes>(digits);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < C::kQkDim; k += 32) {
      const int panel = k / L::Keys::kRowBytes, bytes = k % L::Keys::kRowBytes;
      const uint64_t key = ptx::advance(a, panel * L::Keys::kPanelBytes + bytes);
      const uint64_t digit = ptx::advance(b, panel * L::QueryDigits::kPanelBytes + bytes);
      k == 0 ? Mma::first(sums, key, digit) : Mma::add(sums, key, digit);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::fence_registers(sums);
#pragma unroll
    for (int c = 0; c < C::kRows / 4; ++c)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int x = at.element(c, half);
        s[x] = __fmul_rn(join_digits<D, kSums>(sums, x), units[c]);
      }
  }
};

// Of a value's 16-byte vector a thread gets elements 2 r and 2 r + 1, r = lane / 4, for the
// product's rows r and r + 8: so the output is permuted. Of 16 keys it gets 2 c, 2 c + 1, 2 c + 8
// and 2 c + 9, c = lane % 4, side by side: probabilities are in this order, too.
template <typename C>
class ByteValues {
  using L = typename C::Layout;
  using D = Digits<C::kCache>;
  using Sum = typename D::Sum;
  using Mma = typename D::template ValueProduct<D::kValueSums * C::kRows>;
  static constexpr int kSums = C::kRows / 2;
  static constexpr int kPanels = C::kValueDim / 64;
  // Products of all digits: side by side, or one after the other into one sum.
  static constexpr int kPasses = kProbabilityDigits / D::kValueSums;

 public:
  static constexpr int kOne = D::kOne;  // probabilities come times 2^kOne

  // Of a tile, packed into shared memory as [digit, query row, key].
  static __device__ __forceinline__ void store_probabilities(const ThreadPlace& at,
                                                             const float (&p)[kSums],
                                                             uint32_t probabilities) {
    constexpr int kBlocks = C::kRows / 8;  // of rows
    uint32_t blocks[kProbabilityDigits * kBlocks];
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      const float x[4] = {p[4 * j], p[4 * j + 2], p[4 * j + 1], p[4 * j + 3]};
      uint32_t digits[kProbabilityDigits];
      D::split_probabilities(x, digits);
#pragma unroll
      for (int digit = 0; digit < kProbabilityDigits; ++digit)
        blocks[digit * kBlocks + j] = digits[digit];
    }
    const auto place = [&](int block) {
      return probabilities +
             place_of_vector<typename L::Probabilities>(8 * block + at.lane % 8, at.warp);
    };
    if constexpr (kBlocks == 1) {
      ptx::store_transposed_2(place(at.lane / 8 % 2), blocks[0], blocks[1]);
    } else {
#pragma unroll
      for (int j = 0; j < kProbabilityDigits * kBlocks; j += 4)
        ptx::store_transposed_4(place(j + at.lane / 8), blocks[j], blocks[j + 1], blocks[j + 2],
                                blocks[j + 3]);
    }
  }

  // weights: what makes the product an output, of each row, in shared memory: read under it.
  static __device__ __forceinline__ void add(const ThreadPlace& at, float (&o)[kPanels][kSums],
                                             uint32_t values, uint32_t probabilities,
                                             const float* weights) {
    constexpr int kSteps = kTileKeys / 32;
    // All that is multiplied at once is in registers: of many rows, one panel at a time.
    constexpr int kAtOnce = C::kRows <= 16 && kPanels >= 2 ? 2 : 1;
    const uint64_t b = ptx::wgmma_descriptor<L::Probabilities::kRowBytes>(probabilities);
#pragma unroll
    for (int first = 0; first < kPanels; first += kAtOnce) {
      uint32_t a[kAtOnce][kSteps][4];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          uint32_t x[4];  // 8 keys each
          ptx::load_matrices_transposed(
              x, values + place_of_vector<typename L::Values>(32 * step + at.lane,
                                                              4 * (first + i) + at.warp));
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            a[i][step][2 * j] = __byte_perm(x[2 * j], x[2 * j + 1], 0x6240);
            a[i][step][2 * j + 1] = __byte_perm(x[2 * j], x[2 * j + 1], 0x7351);
          }
        }
      Sum sums[kAtOnce][D::kValueSums * kSums];
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass)
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const uint64_t p =
                ptx::advance(b, pass * C::kRows * L::Probabilities::kRowBytes + 32 * step);
            step == 0 && pass == 0 ? Mma::first_registers(sums[i], a[i][step], p)
                                   : Mma::add_registers(sums[i], a[i][step], p);
          }
      ptx::wgmma_commit();
      float weight[C::kRows / 4];
#pragma unroll
      for (int c = 0; c < C::kRows / 4; ++c) weight[c] = weights[at.row(c)];
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        ptx::fence_registers(sums[i]);
#pragma unroll
        for (int c = 0; c < C::kRows / 4; ++c)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int x = at.element(c, half);
            o[first + i][x] =
                __fmaf_rn(join_digits<D, kSums>(sums[i], x), weight[c], o[first + i][x]);
          }
      }
    }
  }

  // The value element, of a panel's 64, of a thread's half.
  static __device__ __forceinline__ int value_element(const ThreadPlace& at, int half) {
    return 16 * at.warp + 2 * (at.lane / 4) + half;
  }
};

}  // namespace blasst::cuda::decode
