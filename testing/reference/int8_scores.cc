#include "testing/reference/int8_scores.h"

#include <algorithm>
#include <cmath>

#include "problem/element.h"
#include "testing/reference/scales.h"

namespace blasst::reference {
namespace {

// The larger magnitude; NaN if one is.
float larger(float a, float b) { return std::isnan(a) || a >= std::abs(b) ? a : std::abs(b); }

std::vector<float> row_of(DType dtype, const std::byte* address, int64_t dim) {
  std::vector<float> row(dim);
  for (int64_t d = 0; d < dim; ++d)
    row[d] = static_cast<float>(
        problem::load_element(dtype, address + d * problem::element_bytes(dtype)));
  return row;
}

// Of elements that were rotated by blocks of this size, without the matrix's factor.
double unit_of(float largest, int64_t block) {
  return largest / (127 * std::sqrt(static_cast<double>(block)));
}

}  // namespace

int64_t rotated_block(int64_t dim) { return dim & -dim; }

void rotate(std::span<float> x) {
  for (size_t bit = 1; x.size() % (2 * bit) == 0; bit *= 2) {
    for (size_t i = 0; i < x.size(); ++i) {
      if (i & bit) continue;
      const float a = x[i], b = x[i + bit];
      x[i] = a + b, x[i + bit] = a - b;
    }
  }
}

int8_t quantized(float x, float largest) {
  const float scaled = x * (largest > 0 ? 127 / largest : 0);
  if (std::isnan(scaled)) return 0;
  return static_cast<int8_t>(std::nearbyint(std::clamp(scaled, -128.0f, 127.0f)));
}

Int8Scores::Int8Scores(const problem::Problem& problem, TileShape shape)
    : p_(problem),
      tile_keys_(shape.keys),
      takes_bytes_(problem::scores_take_bytes(problem.scores, problem.kv.k.dtype)),
      keys_(problem.batch * problem.kv_heads) {
  for (int64_t b = 0; b < p_.batch; ++b)
    for (int64_t h = 0; h < p_.kv_heads; ++h) takes_bytes_ ? take_keys(b, h) : quantize_keys(b, h);
  quantize_queries();
}

void Int8Scores::take_keys(int64_t request, int64_t kv_head) {
  Keys& into = keys_[request * p_.kv_heads + kv_head];
  const int64_t count = p_.requests[request].keys;
  into.mean.resize(p_.head_dim);
  into.broken.resize(count);
  into.units.resize(problem::ceil_div(count, tile_keys_), 1.0);
  for (int64_t key = 0; key < count; ++key) {
    const auto* bytes = reinterpret_cast<const int8_t*>(p_.key(request, key, kv_head));
    into.elements.insert(into.elements.end(), bytes, bytes + p_.head_dim);
  }
}

void Int8Scores::quantize_keys(int64_t request, int64_t kv_head) {
  Keys& into = keys_[request * p_.kv_heads + kv_head];
  const int64_t count = p_.requests[request].keys, dim = p_.head_dim;
  std::vector<std::vector<float>> rows;
  std::vector<double> sums(dim);
  for (int64_t key = 0; key < count; ++key) {
    rows.push_back(row_of(p_.kv.k.dtype, p_.key(request, key, kv_head), dim));
    for (int64_t d = 0; d < dim; ++d)
      if (std::isfinite(rows[key][d])) sums[d] += rows[key][d];
  }
  for (const double sum : sums)
    into.mean.push_back(count == 0 ? 0 : static_cast<float>(sum / static_cast<double>(count)));
  for (int64_t first = 0; first < count; first += tile_keys_) {
    const std::span tile =
        std::span(rows).subspan(first, std::min<int64_t>(tile_keys_, count - first));
    float largest = 0;
    for (std::vector<float>& row : tile) {
      for (int64_t d = 0; d < dim; ++d) row[d] -= into.mean[d];
      rotate(row);
      float of_key = 0;
      for (const float x : row) of_key = larger(of_key, x);
      into.broken.push_back(!std::isfinite(of_key));
      if (std::isfinite(of_key)) largest = larger(largest, of_key);
    }
    into.units.push_back(unit_of(largest, rotated_block(dim)));
    for (const std::vector<float>& row : tile)
      for (const float x : row) into.elements.push_back(quantized(x, largest));
  }
}

void Int8Scores::quantize_queries() {
  const int64_t rows = p_.rows * p_.heads, dim = p_.head_dim;
  queries_.elements.resize(rows * dim);
  queries_.units.resize(rows);
  shifts_.resize(rows);
  for (int64_t b = 0; b < p_.batch; ++b) {
    for (int64_t i = 0; i < p_.requests[b].rows; ++i) {
      for (int64_t h = 0; h < p_.heads; ++h) {
        const int64_t at = query_index(b, i, h);
        std::vector<float> row = row_of(p_.dtype, p_.query(b, i, h), dim);
        const std::span<const float> mean_key = mean(b, h / p_.group());
        double shift = 0;
        for (int64_t d = 0; d < dim; ++d) shift += static_cast<double>(row[d]) * mean_key[d];
        shifts_[at] = shift * score_scale_of(p_, b, h / p_.group());
        if (!takes_bytes_) rotate(row);
        float largest = 0;
        for (const float x : row) largest = larger(largest, x);
        queries_.units[at] = unit_of(largest, takes_bytes_ ? 1 : rotated_block(dim));
        for (int64_t d = 0; d < dim; ++d)
          queries_.elements[at * dim + d] = quantized(row[d], largest);
      }
    }
  }
}

Int8Scores::Score Int8Scores::at(int64_t request, int64_t position, int64_t head,
                                 int64_t key) const {
  const int64_t row = query_index(request, position, head), dim = p_.head_dim;
  const Keys& of_head = keys(request, head / p_.group());
  const int8_t *q = &queries_.elements[row * dim], *k = &of_head.elements[key * dim];
  int32_t product = 0;  // of at most 576 elements
  for (int64_t d = 0; d < dim; ++d) product += q[d] * k[d];
  const double unit = queries_.units[row] * of_head.units[key / tile_keys_];
  if (of_head.broken[key]) return {product, NAN, shifts_[row]};
  return {product, unit * score_scale_of(p_, request, head / p_.group()), shifts_[row]};
}

std::span<const float> Int8Scores::mean(int64_t request, int64_t kv_head) const {
  return keys(request, kv_head).mean;
}

}  // namespace blasst::reference
