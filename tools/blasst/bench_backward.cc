// blasst bench backward: dense and sparse gradients on inputs whose sparsity is planted.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "bench.h"
#include "measure.h"
#include "problem/text.h"
#include "target.h"
#include "testing/backward.h"
#include "testing/element.h"

namespace blasst::command {
namespace {

using check::Access;
using check::BackwardProblem;
using check::Problem;

// The squared norm of the difference; size grows by that of `wanted`.
double norm_of_difference(std::span<const double> wanted, std::span<const float> got,
                          double& size) {
  double error = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    error += (wanted[i] - got[i]) * (wanted[i] - got[i]);
    size += wanted[i] * wanted[i];
  }
  return error;
}

// Relative error of the last tile's gradients in the last request's last KV head, against the
// reference, which would take hours for all. The query tiles that see the last key tile are a
// problem of their own, and only they see it.
double relative_error(const BackwardProblem& problem) {
  const BackwardParams& b = problem.params;
  const DType dtype = b.problem.q.dtype;
  const Access access(problem.forward.params);
  const TileShape shape = backward_plan(problem.params).shape;
  const int64_t group = b.problem.heads / b.problem.kv_heads, request = b.problem.batch - 1;
  const int64_t length = access.requests()[request].keys;
  const int64_t tiles = (length + shape.keys - 1) / shape.keys, words = (tiles + 31) / 32;
  const int64_t first = (tiles - 1) * shape.keys, rows = length - first;
  const int64_t kv_head = b.problem.kv_heads - 1, head = kv_head * group;

  BackwardParams part = b;
  part.problem.batch = 1, part.problem.heads = group, part.problem.kv_heads = 1;
  part.problem.query_length = rows;
  part.problem.kv.lengths = nullptr;
  part.problem.kv.key_length = length;
  // From a row on, the rest of the buffer; the reference only reads.
  const auto from = [&](View& view, std::byte* address) {
    view.elements -= (address - static_cast<std::byte*>(view.data)) / check::element_bytes(dtype);
    view.data = address;
  };
  from(part.problem.q, access.query(request, first, head));
  from(part.problem.out, access.output(request, first, head));
  from(part.gradients.dout, access.query_row(b.gradients.dout, request, first, head));
  from(part.gradients.dq, access.query_row(b.gradients.dq, request, first, head));
  from(part.problem.kv.k, access.key(request, 0, kv_head));
  from(part.problem.kv.v, access.value(request, 0, kv_head));
  from(part.gradients.dk, access.key_row(b.gradients.dk, request, 0, kv_head));
  from(part.gradients.dv, access.key_row(b.gradients.dv, request, 0, kv_head));
  std::vector<uint32_t> bits;
  const int64_t query_tiles = (length + shape.query_rows - 1) / shape.query_rows;
  const int64_t before = first / shape.query_rows;
  for (int64_t h = head; b.gradients.tile_bits && h < head + group; ++h) {
    const int64_t end = (h + 1) * b.problem.batch * query_tiles;
    bits.insert(bits.end(), b.gradients.tile_bits + (end - query_tiles + before) * words,
                b.gradients.tile_bits + end * words);
  }
  if (b.gradients.tile_bits) part.gradients.tile_bits = bits.data();
  const reference::Gradients wanted = reference::backward(part, shape);

  const auto load = [&](const std::byte* row, int64_t dim, std::vector<float>& to) {
    for (int64_t d = 0; d < dim; ++d)
      to.push_back(
          static_cast<float>(check::load_element(dtype, row + d * check::element_bytes(dtype))));
  };
  std::vector<float> dq, dk, dv;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t h = head; h < head + group; ++h)
      load(access.query_row(b.gradients.dq, request, first + i, h), b.problem.head_dim, dq);
    load(access.key_row(b.gradients.dk, request, first + i, kv_head), b.problem.head_dim, dk);
    load(access.key_row(b.gradients.dv, request, first + i, kv_head), b.problem.value_dim, dv);
  }
  // Together: a half underflows where a gradient alone is tiny.
  double error = 0, size = 0;
  using Pair = std::pair<const std::vector<double>&, const std::vector<float>&>;
  for (const auto& [all, got] : {Pair(wanted.dq, dq), Pair(wanted.dk, dk), Pair(wanted.dv, dv)})
    error += norm_of_difference(std::span(all).last(got.size()), got, size);
  return std::sqrt(error / size);
}

}  // namespace

nlohmann::ordered_json measure_backward(const BenchOptions& options, int64_t length,
                                        double wanted_sparsity) {
  print(stderr, "length {}, sparsity {}: errors", length, wanted_sparsity);
  Problem dense_forward = make_problem(options, length, wanted_sparsity);
  dense_forward.params.decision.test = {};
  const auto dense = make_backward_target(dense_forward, options.backend, false);
  dense->run();
  Problem sparse_forward = make_problem(options, length, wanted_sparsity);
  const auto sparse = make_backward_target(sparse_forward, options.backend, true);
  sparse->run();
  const double error = std::max(relative_error(*dense->problem), relative_error(*sparse->problem));
  const double sparsity = static_cast<double>(sum(sparse_forward.tiles_skipped)) /
                          static_cast<double>(sum(sparse_forward.tiles_visitable));

  print(stderr, ", times");
  const std::vector<double> ms = median_ms({[&] { dense->call(); }, [&] { sparse->call(); }},
                                           options.repeat, 20, [&] { dense->finish(); });
  print(stderr, "\n");
  const BackwardParams& params = dense->problem->params;
  const blasst_problem& p = params.problem;
  // Five products: three over the head dimension, two over the value dimension.
  const double flops = 2 * visible_pairs(options, length) *
                       static_cast<double>((3 * p.head_dim + 2 * p.value_dim) * p.heads * p.batch);
  nlohmann::ordered_json fields = common_fields(dense_forward, options, length, sparsity);
  fields.update({{"dense_ms", ms[0]},
                 {"sparse_ms", ms[1]},
                 {"speedup", ms[0] / ms[1]},
                 {"dense_gflops", flops / ms[0] / 1e6},
                 {"effective_gflops", flops / ms[1] / 1e6},
                 {"relative_error", error},
                 {"workspace_mb", static_cast<double>(backward_plan(params).workspace_bytes) / 1e6},
                 {"peak_rss_mb", peak_rss_mb()}});
  return fields;
}

}  // namespace blasst::command
