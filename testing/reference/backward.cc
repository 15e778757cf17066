#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "problem/checks.h"
#include "problem/element.h"
#include "problem/float_environment.h"
#include "problem/problem.h"
#include "testing/reference/reference.h"

namespace blasst::reference {
namespace {

using problem::Problem;
using problem::QueryTile;
using problem::Range;

std::vector<double> load_row(DType dtype, const std::byte* row, int64_t dim) {
  std::vector<double> values(dim);
  for (int64_t d = 0; d < dim; ++d)
    values[d] = problem::load_element(dtype, row + d * problem::element_bytes(dtype));
  return values;
}

double dot(std::span<const double> a, std::span<const double> b) {
  double sum = 0;
  for (size_t d = 0; d < a.size(); ++d) sum += a[d] * b[d];
  return sum;
}

void add(std::span<double> to, double weight, std::span<const double> row) {
  for (size_t d = 0; d < row.size(); ++d) to[d] += weight * row[d];
}

class Differentiate {
 public:
  Differentiate(const problem::BackwardProblem& b, TileShape shape)
      : b_(b), p_(b.forward), shape_(shape), geometry_(p_.geometry(shape)) {
    int64_t keys = 0;
    for (const problem::Request& r : p_.requests) {
      first_key_.push_back(keys);
      keys += r.keys;
    }
    result_.dq.resize(p_.rows * p_.heads * p_.head_dim);
    result_.dk.resize(keys * p_.kv_heads * p_.head_dim);
    result_.dv.resize(keys * p_.kv_heads * p_.value_dim);
    result_.dsinks.resize(p_.heads);
  }

  Gradients run() {
    p_.for_padding([&](int64_t request, int64_t at) {
      for (int64_t h = 0; h < p_.heads && b_.dlse; ++h)
        if (p_.has_sink_alone(request, at) && p_.sinks[h] > -kInf)
          result_.dsinks[h] += b_.dlse[h * p_.rows + at];
    });
    for (const QueryTile& tile : p_.query_tiles(shape_.query_rows))
      for (int64_t r = 0; r < tile.rows(); ++r) row(tile, r);
    return std::move(result_);
  }

 private:
  struct Key {
    int64_t token;
    double score, slope;  // slope: d score / d (q . k)
    double weight = 0;
    double dweight = 0;
  };

  void row(const QueryTile& tile, int64_t r) {
    const int64_t kv_head = tile.head / p_.group();
    const int64_t position = tile.position_of(r);
    const std::vector<double> q =
        load_row(p_.dtype, p_.query(tile.request, position, tile.head), p_.head_dim);
    const std::vector<double> dout =
        load_row(p_.dtype, p_.query_row(b_.dout, tile.request, position, tile.head), p_.value_dim);
    std::vector<Key> keys = kept_keys(tile, p_.row_keys(tile, r), q);
    const double sink = p_.sinks ? p_.sinks[tile.head] : -kInf;
    double most = sink;
    for (const Key& key : keys) most = std::max(most, key.score);
    if (most == -kInf) return;  // neither a valid key nor a sink: nothing depends on anything
    double total = std::exp(sink - most);
    for (Key& key : keys) total += key.weight = std::exp(key.score - most);
    double delta = 0;
    for (Key& key : keys) {
      key.weight /= total;
      const std::vector<double> v =
          load_row(p_.dtype, p_.value(tile.request, key.token, kv_head), p_.value_dim);
      key.dweight = dot(dout, v);
      delta += key.weight * key.dweight;
      add(row_of(result_.dv, first_key_[tile.request] + key.token, kv_head, p_.kv_heads,
                 p_.value_dim),
          key.weight, dout);
    }
    const int64_t q_row = p_.requests[tile.request].first_row + position;
    if (b_.dlse) delta -= b_.dlse[tile.head * p_.rows + q_row];  // d lse / d score is the weight
    for (const Key& key : keys) {
      const double dproduct = key.weight * (key.dweight - delta) * key.slope;
      add(row_of(result_.dq, q_row, tile.head, p_.heads, p_.head_dim), dproduct,
          load_row(p_.dtype, p_.key(tile.request, key.token, kv_head), p_.head_dim));
      add(row_of(result_.dk, first_key_[tile.request] + key.token, kv_head, p_.kv_heads,
                 p_.head_dim),
          dproduct, q);
    }
    result_.dsinks[tile.head] -= std::exp(sink - most) / total * delta;
  }

  std::vector<Key> kept_keys(const QueryTile& tile, Range seen, std::span<const double> q) const {
    std::vector<Key> keys;
    for (int64_t token = seen.begin; token < seen.end; ++token) {
      if (!b_.kept(tile, geometry_, token / shape_.keys)) continue;
      const std::vector<double> k =
          load_row(p_.dtype, p_.key(tile.request, token, tile.head / p_.group()), p_.head_dim);
      Key key{token, dot(q, k) * p_.scale, p_.scale};
      if (p_.softcap > 0) {
        const double ratio = key.score / p_.softcap, cosh = std::cosh(ratio);
        key.score = p_.softcap * std::tanh(ratio);
        key.slope /= cosh * cosh;  // 1 - tanh^2, which would cancel
      }
      keys.push_back(key);
    }
    return keys;
  }

  static std::span<double> row_of(std::vector<double>& tensor, int64_t row, int64_t head,
                                  int64_t heads, int64_t dim) {
    return std::span(tensor).subspan((row * heads + head) * dim, dim);
  }

  const problem::BackwardProblem& b_;
  const Problem& p_;
  TileShape shape_;
  problem::Geometry geometry_;
  std::vector<int64_t> first_key_;  // of each request
  Gradients result_;
};

}  // namespace

Gradients backward(const BackwardParams& params, TileShape shape) {
  const problem::DefaultFloatEnvironment environment;
  const problem::BackwardProblem b = problem::make_problem(params);
  problem::check_block_mask(b.forward, shape);
  return Differentiate(b, shape).run();
}

}  // namespace blasst::reference
