#include "testing/backward.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <string_view>

#include "problem/text.h"
#include "testing/compare.h"
#include "testing/element.h"

namespace blasst::check {
namespace {

// A tensor [outer, tokens, heads, dim] whose rows have 8 unused elements after them; heads lie
// outside tokens where the forward's do not.
View allocate(std::vector<std::byte>& buffer, DType dtype, bool head_major, int64_t outer,
              int64_t tokens, int64_t heads, int64_t dim) {
  const int64_t row = dim + 8;
  const int64_t elements = outer * tokens * heads * row;
  buffer.assign(std::max<int64_t>(elements, 1) * element_bytes(dtype), kUnused);
  View view{.data = buffer.data(),
            .dtype = dtype,
            .elements = elements,
            .stride_request = tokens * heads * row,
            .stride_token = heads * row,
            .stride_head = row};
  if (head_major) view.stride_token = row, view.stride_head = tokens * row;
  return view;
}

std::vector<float> load_row(DType dtype, const std::byte* row, int64_t dim) {
  std::vector<float> values;
  for (int64_t d = 0; d < dim; ++d)
    values.push_back(static_cast<float>(load_element(dtype, row + d * element_bytes(dtype))));
  return values;
}

void append(std::vector<float>& to, const std::vector<float>& row) {
  to.insert(to.end(), row.begin(), row.end());
}

float dot(const std::vector<float>& a, const std::vector<float>& b) {
  float sum = 0;
  for (size_t d = 0; d < a.size(); ++d) sum += a[d] * b[d];
  return sum;
}

// Backward as one writes it down first: float32 softmax and sums, outputs, weights and gradients
// stored in the problem's type.
class Plain {
 public:
  Plain(const BackwardProblem& problem, const Plan& plan)
      : b_(problem.params.problem),
        given_(problem.params.gradients),
        access_(problem.forward.params),
        plan_(plan) {
    first_key_ = {0};
    int64_t first_query_tile = 0;
    for (const Access::Request& r : access_.requests()) {
      first_query_tile_.push_back(first_query_tile);
      const bool ragged = b_.query_layout == BLASST_LAYOUT_RAGGED;
      const int64_t room = ragged ? r.rows : b_.query_length;
      first_query_tile += (room + plan.shape.query_rows - 1) / plan.shape.query_rows;
      first_key_.push_back(first_key_.back() + r.keys);
    }
    dq.resize(access_.rows() * b_.heads * b_.head_dim);
    dk.resize(first_key_.back() * b_.kv_heads * b_.head_dim);
    dv.resize(first_key_.back() * b_.kv_heads * b_.value_dim);
    dsinks.resize(b_.heads);
    dq_terms = dq, dk_terms = dk, dv_terms = dv, dsinks_terms = dsinks;
    for (int64_t request = 0; request < b_.batch; ++request)
      for (int64_t i = 0; i < access_.requests()[request].rows; ++i)
        for (int64_t h = 0; h < b_.heads; ++h) row(request, i, h);
    if (b_.sinks && given_.dlse) add_rows_before_every_key();
    for (auto* gradient : {&dq, &dk, &dv})
      for (float& x : *gradient) x = rounded(b_.q.dtype, x);
  }

  std::vector<float> dq, dk, dv, dsinks;
  float largest_score = 0;
  // The sums of the terms' magnitudes: a gradient may be zero by cancellation.
  std::vector<float> dq_terms, dk_terms, dv_terms, dsinks_terms;

 private:
  bool kept(int64_t request, int64_t position, int64_t head, int64_t key) const {
    const int64_t query_tile = first_query_tile_[request] + position / plan_.shape.query_rows;
    const int64_t key_tile = key / plan_.shape.keys;
    const Mask& mask = b_.mask;
    if (mask.blocks && !mask.blocks[head * mask.blocks_stride_head +
                                    query_tile * mask.blocks_stride_query_tile + key_tile])
      return false;
    if (!given_.tile_bits) return true;
    const int64_t row = head * plan_.query_tiles + query_tile;
    return given_.tile_bits[row * plan_.tile_words + key_tile / 32] >> (key_tile % 32) & 1;
  }

  // Padding, but in use: the sink is all that they have.
  void add_rows_before_every_key() {
    for (int64_t request = 0; request < b_.batch; ++request) {
      const bool dense = b_.query_layout == BLASST_LAYOUT_DENSE;
      const int64_t end = access_.requests()[request].first_row;
      for (int64_t row = request * b_.query_length; dense && row < end; ++row) {
        for (int64_t h = 0; h < b_.heads; ++h) {
          dsinks[h] += given_.dlse[h * access_.rows() + row];
          dsinks_terms[h] += std::abs(given_.dlse[h * access_.rows() + row]);
        }
      }
    }
  }

  // to[row] += weight * from; terms[row] grows by the magnitude.
  static void add(std::vector<float>& to, std::vector<float>& terms, int64_t row, float weight,
                  float magnitude, const std::vector<float>& from) {
    const size_t first = static_cast<size_t>(row) * from.size();
    for (size_t d = 0; d < from.size(); ++d) {
      to[first + d] += weight * from[d];
      terms[first + d] += magnitude * std::abs(from[d]);
    }
  }

  void row(int64_t request, int64_t position, int64_t head) {
    const int64_t kv_head = head / (b_.heads / b_.kv_heads);
    const float scale = b_.scale > 0 ? b_.scale : 1 / std::sqrt(static_cast<float>(b_.head_dim));
    const auto q = load_row(b_.q.dtype, access_.query(request, position, head), b_.head_dim);
    const auto dout =
        load_row(b_.q.dtype, access_.query_row(given_.dout, request, position, head), b_.value_dim);
    std::vector<int64_t> tokens;
    std::vector<float> weights, slopes, dweights;
    float most = b_.sinks ? b_.sinks[head] : -std::numeric_limits<float>::infinity();
    for (int64_t j = 0; j < access_.requests()[request].keys; ++j) {
      if (!access_.sees(request, position, head, j) || !kept(request, position, head, j)) continue;
      const auto k = load_row(b_.q.dtype, access_.key(request, j, kv_head), b_.head_dim);
      float score = scale * dot(q, k), slope = scale;
      if (b_.softcap > 0) {
        const float ratio = score / b_.softcap, cosh = std::cosh(ratio);
        score = b_.softcap * std::tanh(ratio);
        slope = slope / cosh / cosh;
      }
      largest_score = std::max(largest_score, std::abs(score));
      tokens.push_back(j), weights.push_back(score), slopes.push_back(slope);
      most = std::max(most, score);
    }
    if (tokens.empty() && !b_.sinks) return;
    float total = b_.sinks ? std::exp(b_.sinks[head] - most) : 0;
    for (float& w : weights) total += w = std::exp(w - most);
    // A gradient is also off by what rounding the output does to delta.
    std::vector<float> out(b_.value_dim);
    float delta = 0, delta_terms = 0;
    for (size_t i = 0; i < tokens.size(); ++i) {
      weights[i] /= total;
      const auto v = load_row(b_.q.dtype, access_.value(request, tokens[i], kv_head), b_.value_dim);
      dweights.push_back(dot(dout, v));
      delta_terms += weights[i] * std::abs(dweights[i]);
      for (size_t d = 0; d < v.size(); ++d) out[d] += weights[i] * v[d];
      const float stored = rounded(b_.q.dtype, weights[i]);
      add(dv, dv_terms, (first_key_[request] + tokens[i]) * b_.kv_heads + kv_head, stored, stored,
          dout);
    }
    for (size_t d = 0; d < out.size(); ++d) {
      delta += rounded(b_.q.dtype, out[d]) * dout[d];
      delta_terms += std::abs(out[d] * dout[d]);
    }
    const int64_t row = access_.requests()[request].first_row + position;
    if (given_.dlse) {
      const float dlse = given_.dlse[head * access_.rows() + row];
      delta -= dlse, delta_terms += std::abs(dlse);
    }
    const int64_t q_row = row * b_.heads + head;
    for (size_t i = 0; i < tokens.size(); ++i) {
      const float dproduct = rounded(b_.q.dtype, weights[i] * (dweights[i] - delta)) * slopes[i];
      const float terms = weights[i] * (std::abs(dweights[i]) + delta_terms) * slopes[i];
      add(dq, dq_terms, q_row, dproduct, terms,
          load_row(b_.q.dtype, access_.key(request, tokens[i], kv_head), b_.head_dim));
      add(dk, dk_terms, (first_key_[request] + tokens[i]) * b_.kv_heads + kv_head, dproduct, terms,
          q);
    }
    if (!b_.sinks) return;
    const float sink = std::exp(b_.sinks[head] - most) / total;
    dsinks[head] -= sink * delta;
    dsinks_terms[head] += sink * delta_terms;
  }

  const blasst_problem& b_;
  const Gradients& given_;
  Access access_;
  Plan plan_;
  std::vector<int64_t> first_query_tile_;  // of each request
  std::vector<int64_t> first_key_;         // of each request, then the total
};

GradientError measure(const std::vector<double>& wanted, const std::vector<float>& kernel,
                      const std::vector<float>& plain, const std::vector<float>& terms) {
  GradientError e;
  for (size_t i = 0; i < wanted.size(); ++i) {
    // NaN must show: std::max would drop it.
    const double error = std::abs(kernel[i] - wanted[i]),
                 plain_error = std::abs(plain[i] - wanted[i]);
    e.size = std::max<double>(e.size, terms[i]);
    e.largest = error <= e.largest ? e.largest : error;
    e.plain_largest = std::max(e.plain_largest, plain_error);
    e.rms += error * error, e.plain_rms += plain_error * plain_error;
  }
  const auto count = static_cast<double>(std::max<size_t>(wanted.size(), 1));
  e.rms = std::sqrt(e.rms / count), e.plain_rms = std::sqrt(e.plain_rms / count);
  return e;
}

}  // namespace

Case differentiable(Case c) {
  c.scores = BLASST_SCORES_EXACT;
  c.k_dtype = c.v_dtype = {};
  if (c.decode) {
    c.decode = false;
    for (Lengths& r : c.requests)
      r.queries = c.requests[0].queries, r.keys = std::min<int64_t>(r.keys, 1500);
  }
  return c;
}

BackwardProblem::BackwardProblem(Problem& problem) : forward(problem), access_(problem.params) {
  const blasst_problem& p = problem.params.problem;
  const DType dtype = problem.description.dtype;
  const bool head_major = !problem.description.head_major;
  const bool ragged = p.query_layout == BLASST_LAYOUT_RAGGED;
  const int64_t outer = ragged ? 1 : p.batch, tokens = ragged ? p.rows : p.query_length;
  const KeysValues& kv = p.kv;
  const int64_t key_outer = kv.cu_seqlens ? 1 : kv.page_table ? kv.pages : p.batch;
  const int64_t keys = kv.cu_seqlens   ? kv.cu_seqlens[p.batch]
                       : kv.page_table ? kv.page_size
                                       : kv.key_length;
  const auto rows = [&](std::vector<std::byte>& buffer, int64_t dim) {
    return allocate(buffer, dtype, head_major, outer, tokens, p.heads, dim);
  };
  const auto key_rows = [&](std::vector<std::byte>& buffer, int64_t dim) {
    return allocate(buffer, dtype, head_major, key_outer, keys, p.kv_heads, dim);
  };
  params = {.problem = p,
            .gradients = {.dout = rows(dout_, p.value_dim),
                          .lse = problem.lse.data(),
                          .tile_bits = problem.tile_bits.data(),
                          .dq = rows(dq_, p.head_dim),
                          .dk = key_rows(dk_, p.head_dim),
                          .dv = key_rows(dv_, p.value_dim)},
            .execution = {.backend = problem.params.execution.backend,
                          .threads = problem.params.execution.threads}};
  for (size_t j = 0; j < problem.lse.size(); ++j)
    dlse.push_back(static_cast<float>(2 * uniform(hash(problem.description.seed, 105, j)) - 1));
  dsinks.resize(p.heads);
  if (p.sinks) params.gradients.dsinks = dsinks.data();
  const Numbers numbers{.seed = hash(problem.description.seed, 104)};
  std::vector<float> row(p.value_dim);
  int64_t i = 0;
  for_query_rows(params.gradients.dout, [&](std::byte* address) {
    numbers.value(0, i++, 0, row);
    for (int64_t d = 0; d < p.value_dim; ++d)
      store_element(p.q.dtype, address + d * element_bytes(p.q.dtype), row[d]);
  });
}

template <typename Visit>
void BackwardProblem::for_query_rows(const View& view, const Visit& visit) const {
  for (int64_t row = 0; row < access_.rows(); ++row)
    for (int64_t h = 0; h < params.problem.heads; ++h) visit(access_.row_at(view, row, h));
}

template <typename Visit>
void BackwardProblem::for_key_rows(const View& view, bool unused, const Visit& visit) const {
  const KeysValues& kv = params.problem.kv;
  if (unused && kv.page_table) {
    for (int64_t page = 0; page < kv.pages; ++page)
      for (int64_t j = 0; j < kv.page_size; ++j)
        for (int64_t h = 0; h < params.problem.kv_heads; ++h)
          visit(access_.row_of(view, page, j, h));
    return;
  }
  for (int64_t b = 0; b < params.problem.batch; ++b) {
    const bool all = unused && !kv.cu_seqlens;
    const int64_t keys = all ? kv.key_length : access_.requests()[b].keys;
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t h = 0; h < params.problem.kv_heads; ++h)
        visit(all ? access_.row_of(view, b, j, h) : access_.key_row(view, b, j, h));
  }
}

void BackwardProblem::mark() {
  for (auto* buffer : {&dq_, &dk_, &dv_}) std::ranges::fill(*buffer, kUnused);
  std::ranges::fill(dsinks, kMark);
}

void BackwardProblem::run() {
  mark();
  blasst::backward(params);
}

bool BackwardProblem::wrote_anything() const {
  return std::ranges::any_of(dsinks, [](float x) { return x != kMark; }) ||
         std::ranges::any_of(std::array{&dq_, &dk_, &dv_}, [](const auto* buffer) {
           return std::ranges::any_of(*buffer, [](std::byte x) { return x != kUnused; });
         });
}

bool BackwardProblem::wrote_elsewhere() const {
  std::vector<std::byte> dq = dq_, dk = dk_, dv = dv_;
  const int64_t bytes = element_bytes(params.problem.q.dtype);
  const auto forget = [&](std::vector<std::byte>& copy, const std::vector<std::byte>& buffer,
                          int64_t dim) {
    return [&copy, &buffer, size = dim * bytes](std::byte* row) {
      std::fill_n(copy.data() + (row - buffer.data()), size, kUnused);
    };
  };
  for_query_rows(params.gradients.dq, forget(dq, dq_, params.problem.head_dim));
  for_key_rows(params.gradients.dk, true, forget(dk, dk_, params.problem.head_dim));
  for_key_rows(params.gradients.dv, true, forget(dv, dv_, params.problem.value_dim));
  return std::ranges::any_of(std::array{&dq, &dk, &dv}, [](const auto* buffer) {
    return std::ranges::any_of(*buffer, [](std::byte x) { return x != kUnused; });
  });
}

std::vector<float> BackwardProblem::dq() const {
  std::vector<float> values;
  for_query_rows(params.gradients.dq, [&](const std::byte* address) {
    append(values, load_row(params.problem.q.dtype, address, params.problem.head_dim));
  });
  return values;
}

std::vector<float> BackwardProblem::dk() const {
  std::vector<float> values;
  for_key_rows(params.gradients.dk, false, [&](const std::byte* address) {
    append(values, load_row(params.problem.q.dtype, address, params.problem.head_dim));
  });
  return values;
}

std::vector<float> BackwardProblem::dv() const {
  std::vector<float> values;
  for_key_rows(params.gradients.dv, false, [&](const std::byte* address) {
    append(values, load_row(params.problem.q.dtype, address, params.problem.value_dim));
  });
  return values;
}

std::vector<std::byte> BackwardProblem::bits() const {
  std::vector<std::byte> bits;
  const auto append_row = [&](int64_t dim) {
    return [&bits, size = dim * element_bytes(params.problem.q.dtype)](const std::byte* row) {
      bits.insert(bits.end(), row, row + size);
    };
  };
  for_query_rows(params.gradients.dq, append_row(params.problem.head_dim));
  for_key_rows(params.gradients.dk, true, append_row(params.problem.head_dim));
  for_key_rows(params.gradients.dv, true, append_row(params.problem.value_dim));
  const auto sinks = std::as_bytes(std::span(dsinks));
  bits.insert(bits.end(), sinks.begin(), sinks.end());
  return bits;
}

BackwardComparison compare(const BackwardProblem& problem) {
  const Plan plan = backward_plan(problem.params);
  const reference::Gradients wanted = reference::backward(problem.params, plan.shape);
  const Plain plain(problem, plan);
  BackwardComparison result;
  result.dq = measure(wanted.dq, problem.dq(), plain.dq, plain.dq_terms);
  result.dk = measure(wanted.dk, problem.dk(), plain.dk, plain.dk_terms);
  result.dv = measure(wanted.dv, problem.dv(), plain.dv, plain.dv_terms);
  if (problem.params.gradients.dsinks)
    result.dsinks = measure(wanted.dsinks, problem.dsinks, plain.dsinks, plain.dsinks_terms);
  const double roundoff = unit_roundoff(problem.params.problem.q.dtype);
  const auto check = [&](std::string_view name, const GradientError& e) {
    if (!result.mismatch.empty()) return;
    // Weights carry the rounding of float32 scores and of the stored LSE, which is as large as
    // they.
    const double scores =
        kFloatRoundoff * score_roundings(problem.params.problem.softcap) * plain.largest_score;
    if (!(e.largest <= 2 * e.plain_largest + (8 * roundoff + scores) * e.size) ||
        !(e.rms <= 2 * e.plain_rms + (roundoff + scores) * e.size))
      result.mismatch = formatted(
          "{}: error {} (root mean square {}), a plain implementation's {} ({}), largest element "
          "{}",
          name, e.largest, e.rms, e.plain_largest, e.plain_rms, e.size);
  };
  check("dq", result.dq), check("dk", result.dk), check("dv", result.dv);
  check("dsinks", result.dsinks);
  if (problem.wrote_elsewhere()) result.mismatch = "wrote outside the rows of the gradients";
  return result;
}

}  // namespace blasst::check
