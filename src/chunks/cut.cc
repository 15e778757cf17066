// Cutting keys into chunks. A boundary depends on a few keys around it and on the chunk before it,
// so what is decided stays decided when keys are added.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>

#include "chunks/chunks.h"
#include "chunks/rows.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"
#include "problem/checks.h"
#include "problem/element.h"
#include "problem/float_environment.h"

namespace blasst::chunks {
namespace {

using cpu::ChunkKernels;
using problem::check_range;
using problem::fail;

constexpr int64_t kBlock = 256;  // positions that a thread scores together
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

void check_predictor(const BoundaryPredictor& p, const HeadRows& keys) {
  if (p.inputs != keys.heads * keys.head_dim)
    fail("the boundary predictor is for keys of {} elements; these have {} KV heads of {}, {}",
         p.inputs, keys.heads, keys.head_dim, keys.heads * keys.head_dim);
  check_range("window of the boundary predictor", p.window, 1, 64);
  for (const auto& [name, value, most] : {std::tuple{"features", p.features, int64_t{256}},
                                          std::tuple{"hidden", p.hidden, int64_t{1024}}}) {
    if (value < 32 || value > most || value % 32 != 0)
      fail("{} of the boundary predictor is {}; it must be a multiple of 32 up to {}", name, value,
           most);
  }
  for (const auto& [name, array] :
       {std::pair{"projection", p.projection}, std::pair{"left", p.left},
        std::pair{"right", p.right}, std::pair{"weight1", p.weight1}, std::pair{"bias1", p.bias1},
        std::pair{"weight2", p.weight2}}) {
    if (!array) fail("{} of the boundary predictor is null", name);
  }
}

void check(const ChunkRule& rule, const HeadRows& keys) {
  check_rows("keys", keys);
  if (rule.chunker < BLASST_CHUNKS_FIXED || rule.chunker > BLASST_CHUNKS_TRAINED)
    fail("chunker is {}; it must be fixed (0), shift (1) or trained (2)",
         static_cast<int>(rule.chunker));
  check_range("most keys of a chunk", rule.most, 1, problem::kMaxCount);
  check_range("least keys of a chunk", rule.least, 1, rule.most);
  if (std::isnan(rule.threshold)) fail("threshold of the chunker is nan; it must be a number");
  if (rule.chunker != BLASST_CHUNKS_TRAINED) return;
  if (!rule.predictor) fail("predictor is null; the trained chunker needs one");
  check_predictor(*rule.predictor, keys);
}

// All KV heads of keys [begin, end), one after the other.
std::vector<float> widened(const HeadRows& keys, int64_t begin, int64_t end,
                           const ChunkKernels& kernels) {
  const int64_t size = keys.heads * keys.head_dim;
  std::vector<float> rows((end - begin) * size);
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t h = 0; h < keys.heads; ++h)
      kernels.widen(row_of(keys, t, h), keys.head_dim,
                    rows.data() + (t - begin) * size + h * keys.head_dim);
  }
  return rows;
}

// Cosine of each key and the one before, mean of the KV heads; 0 where one of them is 0.
void score_shift(const HeadRows& keys, int64_t begin, int64_t end, const ChunkKernels& kernels,
                 float* scores) {
  const int64_t size = keys.heads * keys.head_dim;
  const std::vector<float> rows = widened(keys, begin - 1, end, kernels);
  const auto dot = [&](const float* a, const float* b) {
    float result;
    kernels.dots(a, b, 0, 1, keys.head_dim, &result);
    return result;
  };
  for (int64_t t = begin; t < end; ++t) {
    float sum = 0;
    for (int64_t h = 0; h < keys.heads; ++h) {
      const float* before = rows.data() + (t - begin) * size + h * keys.head_dim;
      const float* here = before + size;
      const float norms = std::sqrt(dot(before, before)) * std::sqrt(dot(here, here));
      if (norms != 0) sum += dot(before, here) / norms;
    }
    scores[t - begin] = sum / static_cast<float>(keys.heads);
  }
}

void score_trained(const BoundaryPredictor& p, const HeadRows& keys, int64_t begin, int64_t end,
                   const ChunkKernels& kernels, float* scores) {
  const int64_t features = p.features, inputs = 4 * features + 1;
  const int64_t first = begin - p.window, count = end - begin;
  const std::vector<float> rows = widened(keys, first, end + p.window - 1, kernels);
  const int64_t tokens = end + p.window - 1 - first;
  std::vector<float> y(tokens * features), x(count * inputs), hidden(count * p.hidden);
  kernels.affine(rows.data(), tokens, p.inputs, p.projection, nullptr, features, y.data());
  for (int64_t t = 0; t < count; ++t) {
    float* l = x.data() + t * inputs;
    float* r = l + features;
    for (int64_t i = 0; i < p.window; ++i) {
      const float* before = y.data() + (t + i) * features;
      const float* after = before + p.window * features;
      for (int64_t d = 0; d < features; ++d) {
        l[d] += p.left[i] * before[d];
        r[d] += p.right[i] * after[d];
      }
    }
    float dot = 0, left_size = 0, right_size = 0;
    for (int64_t d = 0; d < features; ++d) {
      r[features + d] = l[d] - r[d];
      r[2 * features + d] = l[d] * r[d];
      dot += l[d] * r[d], left_size += l[d] * l[d], right_size += r[d] * r[d];
    }
    const float norms = std::sqrt(left_size) * std::sqrt(right_size);
    r[3 * features] = norms != 0 ? dot / norms : 0;
  }
  kernels.affine(x.data(), count, inputs, p.weight1, p.bias1, p.hidden, hidden.data());
  for (float& h : hidden) h = std::max(h, 0.0f);
  kernels.dots(p.weight2, hidden.data(), p.hidden, count, p.hidden, scores);
  for (int64_t t = 0; t < count; ++t) scores[t] += p.bias2;
}

// Positions that can be decided on, among so many keys.
problem::Range decidable(const ChunkRule& rule, int64_t keys) {
  if (rule.chunker != BLASST_CHUNKS_TRAINED) return {1, keys};
  return {1, keys - rule.predictor->window + 1};
}

// Of these, the ones that have a score.
problem::Range scored(const ChunkRule& rule, int64_t keys) {
  if (rule.chunker == BLASST_CHUNKS_FIXED) return {};
  problem::Range range = decidable(rule, keys);
  if (rule.chunker == BLASST_CHUNKS_TRAINED) range.begin = rule.predictor->window;
  return range;
}

std::vector<float> checked_scores(const ChunkRule& rule, const HeadRows& keys, int64_t begin,
                                  int64_t end, int threads) {
  std::vector<float> scores(std::max<int64_t>(0, end - begin), kNan);
  const problem::Range wanted = intersect(scored(rule, keys.rows), {begin, end});
  if (wanted.empty()) return scores;
  const ChunkKernels& kernels = cpu::kernels(keys.dtype).chunks;
  cpu::parallel_for(problem::ceil_div(wanted.size(), kBlock), threads, [&](int64_t i, int) {
    const int64_t first = wanted.begin + i * kBlock;
    const int64_t last = std::min(wanted.end, first + kBlock);
    float* to = scores.data() + (first - begin);
    if (rule.chunker == BLASST_CHUNKS_SHIFT) {
      score_shift(keys, first, last, kernels, to);
    } else {
      score_trained(*rule.predictor, keys, first, last, kernels, to);
    }
  });
  return scores;
}

}  // namespace

std::vector<float> scores(const ChunkRule& rule, const HeadRows& keys, int64_t begin, int64_t end,
                          int threads) {
  const problem::DefaultFloatEnvironment environment;
  threads = checked_threads(threads);
  check(rule, keys);
  check_range("begin of the positions", begin, 0, keys.rows);
  check_range("end of the positions", end, begin, keys.rows);
  return checked_scores(rule, keys, begin, end, threads);
}

Chunks next(ChunkView chunks, const ChunkRule& rule, const HeadRows& keys, int threads) {
  const problem::DefaultFloatEnvironment environment;
  threads = checked_threads(threads);
  check(rule, keys);
  const int64_t size = keys.heads * keys.head_dim;
  if (keys.rows < chunks.keys)
    fail("{} keys are given, fewer than the {} that the chunks cover", keys.rows, chunks.keys);
  check_chunks(chunks, keys.heads, keys.head_dim);
  Chunks next{.keys = keys.rows, .starts = {}, .sums = {}};
  if (keys.rows == 0) return next;

  const bool is_new = chunks.starts.empty();
  next.starts.push_back(is_new ? 0 : chunks.starts.back());
  const int64_t begin = std::max<int64_t>(1, is_new ? 1 : decidable(rule, chunks.keys).end);
  const int64_t end = decidable(rule, keys.rows).end;
  const std::vector<float> scores = checked_scores(rule, keys, begin, end, threads);
  for (int64_t t = begin; t < end; ++t) {
    const float score = scores[t - begin];
    const int64_t length = t - next.starts.back();
    const bool wanted =
        rule.chunker == BLASST_CHUNKS_SHIFT ? score < rule.threshold : score > rule.threshold;
    if ((wanted && length >= rule.least) || length >= rule.most)
      next.starts.push_back(static_cast<int32_t>(t));
  }
  next.sums.resize(std::ssize(next.starts) * size);
  const ChunkKernels& kernels = cpu::kernels(keys.dtype).chunks;
  cpu::parallel_for(std::ssize(next.starts), threads, [&](int64_t chunk, int) {
    float* sum = next.sums.data() + chunk * size;
    int64_t t = next.starts[chunk];
    const int64_t last = chunk_end(next, chunk);
    if (chunk == 0 && t < chunks.keys && last >= chunks.keys) {  // its known keys are summed
      std::ranges::copy(chunks.sums.last(size), sum);
      t = chunks.keys;
    }
    float row[256];
    for (; t < last; ++t) {
      for (int64_t h = 0; h < keys.heads; ++h) {
        kernels.widen(row_of(keys, t, h), keys.head_dim, row);
        kernels.add(row, keys.head_dim, sum + h * keys.head_dim);
      }
    }
  });
  return next;
}

}  // namespace blasst::chunks
