#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "cpu/backend.h"
#include "cpu/thread_pool.h"
#include "problem/element.h"
#include "problem/problem.h"

namespace blasst::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

void merge_row(const MergeParams& p, int64_t row, int64_t head) {
  const int64_t cell = head * p.batch * p.query_length + row;
  const float a = p.lse_a[cell], b = p.lse_b[cell];
  const float most = std::max(a, b);
  const bool empty = most == -kInf && !std::isnan(a) && !std::isnan(b);
  float share_a = empty ? 0 : std::exp(a - most), share_b = empty ? 0 : std::exp(b - most);
  const float sum = share_a + share_b;
  if (p.lse) p.lse[cell] = empty ? -kInf : most + std::log(sum);
  if (!empty) share_a /= sum, share_b /= sum;

  const int64_t request = row / p.query_length, token = row % p.query_length;
  const DType dtype = p.out.dtype;
  const std::byte* from_a = problem::row_at(p.out_a, request, token, head);
  const std::byte* from_b = problem::row_at(p.out_b, request, token, head);
  std::byte* to = problem::row_at(p.out, request, token, head);
  const int64_t bytes = problem::element_bytes(dtype);
  for (int64_t d = 0; d < p.value_dim; ++d) {
    const auto part = [&](float share, const std::byte* row) {
      // What has no share adds nothing, whatever it is.
      if (share == 0) return 0.0f;
      return share * static_cast<float>(problem::load_element(dtype, row + d * bytes));
    };
    problem::store_element(dtype, to + d * bytes, part(share_a, from_a) + part(share_b, from_b));
  }
}

}  // namespace

void merge(const MergeParams& params, int threads) {
  parallel_for(params.batch * params.query_length, threads, [&](int64_t row, int) {
    for (int64_t head = 0; head < params.heads; ++head) merge_row(params, row, head);
  });
}

}  // namespace blasst::cpu
