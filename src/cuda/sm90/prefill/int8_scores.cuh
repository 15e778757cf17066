// Scores of bytes, of the 64 rows of a consumer warpgroup. Keys come rounded (quantize.h), queries
// are rounded here. A score is the integer product times a unit of the row and the tile, a base-2
// logarithm. What the keys' mean adds to all scores of a row is left out (level()); with a soft
// cap, which needs it, it is in.
#pragma once

#include <cstddef>

#include "cuda/core/fragment.cuh"
#include "cuda/core/online_softmax.cuh"
#include "cuda/core/prefill/key_tiles.cuh"
#include "cuda/sm90/core/ring.cuh"
#include "cuda/sm90/core/wgmma.cuh"
#include "cuda/sm90/prefill/config.cuh"

namespace blasst::cuda::prefill {

template <typename C>
class Int8Scores {
  using L = typename C::Layout;
  using Shared = typename C::Shared;
  using Element = typename C::Element;
  static constexpr int kScores = C::kKeys / 2;
  // Exponentials that are not left to last_exponentials(), which waits for outputs. Without a test
  // these come too late for that to pay.
  static constexpr int kFirst = C::kTests ? kScores / 4 * 3 : kScores;
  static constexpr int kSteps = C::kQkDim / 32;
  static constexpr int kElements = C::kQkDim / 4;  // of each of its rows that a thread holds
  using Row = float[kElements];

 public:
  using Score = int;
  // Integers; of a tile that is not plain, and once they are exponentials, the bits of floats.
  using Tile = Score[kScores];
  static constexpr Score kMasked = static_cast<Score>(0xff800000);  // -inf
  static constexpr bool kQueriesInRegisters = true;                 // or in a place of their own

  // This warpgroup's queries, rotated as the keys are, each row in units of its own. Runs once an
  // item and is long: a loop over the thread's two rows, so that less of the instruction cache goes
  // to it.
  __device__ __forceinline__ void load_queries(const Params& p, const Work& work, Shared& s,
                                               ThreadPlace at) {
    const float* means =
        p.quantized.means +
        (int64_t{work.request} * p.kv_heads + work.head / (p.heads / p.kv_heads)) * C::kQkDim;
    const bool as_stored = p.quantized.as_stored;
    uint32_t bytes[2][kElements / 4];
#pragma unroll 1
    for (int r = 0; r < 2; ++r) {
      Row x;
      load_row(s, at, r, x);
      float shift = 0;
      if (p.quantized.level) shift = dot_with(x, means, at) * p.quantized.dot_to_log2;
      if (!as_stored) rotate(x, at);
      float most = 0;
#pragma unroll
      for (float value : x) most = max_nan(most, fabsf(value));
      most = max_nan(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = max_nan(most, __shfl_xor_sync(kAllLanes, most, 2));
      const float inverse = most > 0 ? __fdiv_rn(127.f, most) : 0.f;
      // The second row pushes the first to its place: registers have no index at run time.
      row_unit_[0] = row_unit_[1], shift_[0] = shift_[1];
      // NaN if the row is not finite.
      row_unit_[1] =
          most * ((as_stored ? 1.f : rsqrtf(C::kQkDim)) / 127) * p.quantized.dot_to_log2 +
          (most - most);
      shift_[1] = shift;
#pragma unroll
      for (int i = 0; i < kElements / 4; ++i) {
        bytes[0][i] = bytes[1][i];
        bytes[1][i] =
            round_to_bytes(__fmul_rn(x[4 * i], inverse), __fmul_rn(x[4 * i + 1], inverse),
                           __fmul_rn(x[4 * i + 2], inverse), __fmul_rn(x[4 * i + 3], inverse));
      }
    }
    ptx::mbarrier_arrive_if(address(s.barriers.query_empty), at.lane() == 0);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < kElements / 4; ++i) {
        if constexpr (L::kRoundedQueries)
          store_query(s, at, r, i, bytes[r][i]);
        else
          q_[i / 2][r + 2 * (i % 2)] = bytes[r][i];
      }
    }
    if constexpr (L::kRoundedQueries) {
      ptx::fence_proxy_async();
      ptx::named_barrier_sync(1 + at.warpgroup, 128);
    }
  }

  // t = Q K^T of a key stage. base: address of Shared.
  __device__ __forceinline__ void start(Tile& t, uint32_t base, int warpgroup, int stage,
                                        int) const {
    const uint64_t q = ptx::advance(
        ptx::wgmma_descriptor<L::RoundedQueries::kRowBytes>(base + offsetof(Shared, rounded_query)),
        warpgroup * L::RoundedQueries::kBytes);
    const uint64_t k =
        ptx::advance(ptx::wgmma_descriptor<L::Keys::kRowBytes>(base + offsetof(Shared, key)),
                     stage * L::Keys::kBytes);
    using Product = ptx::WgmmaInt8<C::kKeys>;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint64_t b = ptx::advance(k, step / 4 * L::Keys::kPanelBytes + step % 4 * 32);
      const uint64_t a = ptx::advance(q, step % 4 * 32);
      if constexpr (L::kRoundedQueries)
        step == 0 ? Product::first(t, a, b) : Product::add(t, a, b);
      else
        step == 0 ? Product::first_registers(t, q_[step], b)
                  : Product::add_registers(t, q_[step], b);
    }
  }

  // The tile's unit, as its product starts: the stage is theirs until they are there.
  __device__ __forceinline__ void read_stage(const Shared& s, int stage) {
    const KeyTileUnit& unit = s.unit[stage];
    unit_[0] = row_unit_[0] * unit.unit, unit_[1] = row_unit_[1] * unit.unit;
    any_broken_ = unit.any_broken;
  }
  __device__ __forceinline__ bool any_broken() const { return any_broken_; }

  // A tile that is not plain: what softmax sees before the mask, as floats.
  __device__ __forceinline__ void cap(Tile& t, const Params& p, const Work& work, int tile,
                                      ThreadPlace at) const {
    const bool caps = p.softcap > 0;
    for_each_rolled<8>(t, [&](Score score, int i, int) {
      const int r = i / 2 % 2;
      const float x = __int2float_rn(score) * unit_[r];
      return __float_as_int(caps ? tanh_exact((x + shift_[r]) * p.softcap_scale) : x);
    });
    if (!any_broken_) return;
    const uint32_t* broken = broken_keys(p, work, tile).words;
    for_each_rolled<8>(t, [&](Score score, int i, int first) {
      const int column = at.column() + 2 * first + i / 4 * 8 + i % 2;
      return broken[column / 32] >> column % 32 & 1 ? __float_as_int(NAN) : score;
    });
  }

  // What is missing in a row's scores, as a base-2 logarithm; read only where it counts.
  __device__ __forceinline__ float level(const Params& p, int r) const {
    return p.softcap > 0 ? 0 : shift_[r];
  }

  __device__ __forceinline__ void maxima(const Tile& t, float (&maximum)[2]) const {
    int most[2];
    row_maxima(t, most);
#pragma unroll
    for (int r = 0; r < 2; ++r) maximum[r] = __int2float_rn(most[r]) * unit_[r];
  }
  // Of a tile that is not plain.
  __device__ __forceinline__ void capped_maxima(const Tile& t, float (&maximum)[2]) const {
    float x[kScores];
#pragma unroll
    for (int j = 0; j < kScores; ++j) x[j] = __int_as_float(t[j]);
    row_maxima(x, maximum);
  }

  // Probabilities in place, and their sums beside what was summed before. Of the last quarter only
  // the exponents: last_exponentials() takes them.
  __device__ __forceinline__ void exponentials(Tile& t, bool floats, const float (&alpha)[2],
                                               const OnlineSoftmaxApart& softmax) {
    // Two forms behind one branch that lanes take together.
    if (floats) [[unlikely]]
      exponentials_of<true>(t, alpha, softmax);
    else
      exponentials_of<false>(t, alpha, softmax);
  }
  __device__ __forceinline__ void last_exponentials(Tile& t, OnlineSoftmaxApart& softmax) {
#pragma unroll
    for (int i = kFirst; i < kScores; ++i) {
      const float x = exp2_approx(__int_as_float(t[i]));
      t[i] = __float_as_int(x);
      sums_[i / 2 % 2][i % 2] += x;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) softmax.sum[r] = sums_[r][0] + sums_[r][1];
  }

 private:
  // The thread's row r of the queries in shared memory: x[2 * i + e] is element
  // 8 * i + 2 * (lane % 4) + e.
  static __device__ __forceinline__ void load_row(const Shared& s, ThreadPlace at, int r, Row& x) {
    using Panels = typename L::Queries;
    const int row = at.row(r);
    const uint8_t* base = s.query[at.warpgroup] + row * kPanelRowBytes + 4 * (at.lane() % 4);
#pragma unroll
    for (int i = 0; i < kElements / 2; ++i) {
      const int vector = i % 8 ^ (row % 8);  // the copy engine's swizzle
      const auto pair = unpack2<Element>(
          *reinterpret_cast<const uint32_t*>(base + i / 8 * Panels::kPanelBytes + 16 * vector));
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
  }

  // Four bytes of row r, `four` of them before, as the swizzle of 64-byte rows has them.
  static __device__ __forceinline__ void store_query(Shared& s, ThreadPlace at, int r, int four,
                                                     uint32_t bytes) {
    static_assert(L::RoundedQueries::kRowBytes == 64);
    const int row = at.row(r), vector = four ^ (row / 2 % 4);
    *reinterpret_cast<uint32_t*>(
        &s.rounded_query[at.warpgroup][64 * row + 16 * vector + 4 * (at.lane() % 4)]) = bytes;
  }

  static __device__ __forceinline__ const BrokenKeys& broken_keys(const Params& p, const Work& work,
                                                                  int tile) {
    const int64_t first = int64_t{work.head / (p.heads / p.kv_heads)} * p.quantized.tiles +
                          first_key_tile(p.keys, work.request, C::kKeys);
    return p.quantized.broken[first + tile];
  }

  // Exponents are computed eight ahead of what they are for: the assembler alone has all of them
  // first, on an idle exponential unit.
  template <bool kFloats>
  __device__ __forceinline__ void exponentials_of(Tile& t, const float (&alpha)[2],
                                                  const OnlineSoftmaxApart& softmax) {
    const auto exponent = [&](int i) {
      const int r = i / 2 % 2;
      return kFloats ? fmaf(__int_as_float(t[i]), softmax.score_to_log2, -softmax.log2_maximum(r))
                     : fmaf(__int2float_rn(t[i]), unit_[r], -softmax.log2_maximum(r));
    };
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = exponent(i);
#pragma unroll
    for (int i = 0; i < kFirst; ++i) {
      const int r = i / 2 % 2, e = i % 2;
      const float y = exp2_approx(x[i % 8]);
      t[i] = __float_as_int(y);
      if (i >= 4)
        sums_[r][e] += y;
      else
        sums_[r][e] = e == 0 ? fmaf(softmax.sum[r], alpha[r], y) : y;
      if (i + 8 < kScores) x[i % 8] = exponent(i + 8);
    }
#pragma unroll
    for (int i = kFirst; i < kScores; ++i)
      t[i] = __float_as_int(i < kFirst + 8 ? x[i % 8] : exponent(i));
  }

  // Of a row with a vector.
  static __device__ __forceinline__ float dot_with(const Row& x, const float* vector,
                                                   ThreadPlace at) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kElements; i += 2) {
      const auto pair = *reinterpret_cast<const float2*>(vector + 4 * i + at.column());
      sum += x[i] * pair.x + x[i + 1] * pair.y;
    }
    return quad_sum(sum);
  }

  // x becomes its product with the Hadamard matrix, in quantize.h's order: bit 0 of an element's
  // number lies in the thread, bits 1 and 2 in the quad, the others in the thread again.
  static __device__ __forceinline__ void rotate(Row& x, ThreadPlace at) {
    rotate_within<1>(x);
#pragma unroll
    for (int lanes = 1; lanes <= 2; lanes *= 2) {
      const float sign = at.lane() & lanes ? -1.f : 1.f;
#pragma unroll
      for (float& value : x) value = __shfl_xor_sync(kAllLanes, value, lanes) + sign * value;
    }
    rotate_within<2>(x), rotate_within<4>(x), rotate_within<8>(x);
    if constexpr (kElements > 16) rotate_within<16>(x);
    if constexpr (kElements > 32) rotate_within<32>(x);
  }
  template <int kBit>
  static __device__ __forceinline__ void rotate_within(Row& x) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (i & kBit) continue;
      const float a = x[i], b = x[i + kBit];
      x[i] = a + b, x[i + kBit] = a - b;
    }
  }

  uint32_t q_[L::kRoundedQueries ? 1 : kSteps][4];
  float row_unit_[2], shift_[2];
  float unit_[2];     // of the tile at hand
  float sums_[2][2];  // of the exponentials so far
  int any_broken_;
};

}  // namespace blasst::cuda::prefill
