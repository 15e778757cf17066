// Writing a thread's share of the outputs.
#pragma once

#include <cstdint>

#include "cuda/core/fragment.cuh"
#include "cuda/core/math.cuh"
#include "cuda/core/prefill/rows.cuh"
#include "cuda/core/prefill/work.cuh"

namespace blasst::cuda::prefill {

// Two rows of a query tile, each times its weight. place: C::Place (reports.cuh); output_row: of
// the tile's first row, among the rows of all requests; rows: of the tile that exist.
template <typename Element, typename Place, int kOutputs>
__device__ __forceinline__ void write_rows(const Params& p, const Work& work, Place place,
                                           int output_row, int rows, const float (&weight)[2],
                                           const float (&o)[kOutputs]) {
  auto* out = static_cast<Element*>(p.out.data) + work.head * p.out.stride_head +
              row_in_tensor(p, work.request, output_row) * p.out.stride_token;
  if (!p.cu_seqlens_q) out += work.request * p.out.stride_request;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = place.row(r);
    Element* to = out + row * p.out.stride_token + 8 * (place.lane() % 4);
    // The four threads of a row trade pairs, so that each has eight elements side by side.
#pragma unroll
    for (int j = 0; j < kOutputs / 16; ++j) {
      uint32_t x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float* pair = &o[16 * j + 4 * e + 2 * r];
        x[e] = pack2<Element>(pair[0] * weight[r], pair[1] * weight[r]);
      }
      transpose_in_quad(x);
      if (row < rows) *reinterpret_cast<uint4*>(to + 32 * j) = make_uint4(x[0], x[1], x[2], x[3]);
    }
  }
}

}  // namespace blasst::cuda::prefill
