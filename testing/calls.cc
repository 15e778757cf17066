#include "testing/calls.h"

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <limits>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "blasst/chunks.hpp"
#include "problem/text.h"
#include "testing/backward.h"
#include "testing/compare.h"
#include "testing/element.h"
#include "testing/numbers.h"
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace blasst::check {
namespace {

// Rounds upwards and, where the processor has a switch for it, flushes subnormal numbers.
class OddEnvironment {
 public:
  OddEnvironment() {
    std::fegetenv(&before_);
    std::fesetround(FE_UPWARD);
#if defined(__x86_64__)
    _mm_setcsr(_mm_getcsr() | 0x8040);
#endif
  }
  ~OddEnvironment() { std::fesetenv(&before_); }
  OddEnvironment(const OddEnvironment&) = delete;

  // Whether it is still set.
  static bool holds() {
#if defined(__x86_64__)
    if ((_mm_getcsr() & 0x8040) != 0x8040) return false;
#endif
    return std::fegetround() == FE_UPWARD;
  }

 private:
  std::fenv_t before_;
};

// The output and everything that is reported.
std::vector<std::byte> bits_of(const Problem& p) {
  std::vector<std::byte> all = p.out_bits();
  const auto append = [&](const auto& buffer) {
    const auto bytes = std::as_bytes(std::span(buffer));
    all.insert(all.end(), bytes.begin(), bytes.end());
  };
  append(p.lse), append(p.dropped_mass_bound), append(p.tiles_visitable), append(p.tiles_skipped);
  append(p.tile_bits), append(p.gap_histogram), append(p.tile_maxima);
  return all;
}

// A call over all keys of every request but the last ones, or over these. Its mask is bands, for
// what it sees of the whole does not end at its own last key.
class KeyPart {
 public:
  KeyPart(const Problem& problem, bool is_first, int64_t last_keys) : params(problem.params) {
    const Access access(problem.params);
    blasst_problem& p = params.problem;
    const DType dtype = p.q.dtype, k_dtype = p.kv.k.dtype, v_dtype = p.kv.v.dtype;
    cu_keys_ = {0};
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t cut = access.requests()[b].keys - last_keys;
      const int64_t begin = is_first ? 0 : cut, end = is_first ? cut : cut + last_keys;
      for (int64_t j = begin; j < end; ++j) {
        for (int64_t h = 0; h < p.kv_heads; ++h) {
          const std::byte* k = access.key(b, j, h);
          const std::byte* v = access.value(b, j, h);
          k_.insert(k_.end(), k, k + p.head_dim * element_bytes(k_dtype));
          v_.insert(v_.end(), v, v + p.value_dim * element_bytes(v_dtype));
        }
      }
      cu_keys_.push_back(cu_keys_.back() + static_cast<int32_t>(end - begin));
    }
    const auto view = [&](std::vector<std::byte>& rows, DType type, int64_t heads, int64_t dim) {
      const int64_t bytes = element_bytes(type), elements = std::ssize(rows) / bytes;
      rows.resize(rows.size() + bytes);  // never an empty buffer, so never a null pointer
      return View{.data = rows.data(),
                  .dtype = type,
                  .elements = elements,
                  .stride_request = p.query_length * heads * dim,  // not used of keys
                  .stride_token = heads * dim,
                  .stride_head = dim};
    };
    p.kv = {.layout = BLASST_LAYOUT_RAGGED,
            .k = view(k_, k_dtype, p.kv_heads, p.head_dim),
            .v = view(v_, v_dtype, p.kv_heads, p.value_dim),
            .tokens = cu_keys_.back(),
            .cu_seqlens = cu_keys_.data()};
    out_.resize(access.rows() * p.heads * p.value_dim * element_bytes(dtype));
    p.out = view(out_, dtype, p.heads, p.value_dim);
    lse.resize(access.rows() * p.heads);
    params.decision = {};
    params.report = {.lse = lse.data()};

    // The part's queries stand at its end, `last_keys` before their place if it is the first.
    const int64_t shift = is_first ? last_keys : 0;
    constexpr int64_t kFar = 1 << 30;
    const Mask& mask = problem.params.problem.mask;
    for (int64_t h = 0; h < p.heads; ++h) {
      int64_t least = mask.causal ? 0 : -kFar, most = kFar;
      if (mask.window_right >= 0) least = std::max(least, -mask.window_right);
      if (mask.window_left >= 0) most = mask.window_left;
      if (mask.bands) {
        least = std::max(least, mask.bands[2 * h]);
        most = std::min(most, mask.bands[2 * h + 1]);
      }
      if (most < least) least = most = kFar;  // nothing
      bands_.insert(bands_.end(), {least - shift, most - shift});
    }
    p.mask = {.bands = bands_.data()};
  }
  KeyPart(const KeyPart&) = delete;

  AttentionParams params;
  std::vector<float> lse;

 private:
  std::vector<int32_t> cu_keys_;
  std::vector<int64_t> bands_;
  std::vector<std::byte> k_, v_, out_;
};

double norm(DType dtype, const std::byte* row, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const double x = load_element(dtype, row + d * element_bytes(dtype));
    sum += x * x;
  }
  return std::sqrt(sum);
}

struct Sizes {
  double query = 0, key = 0, value = 0;  // largest norm of a row, of its scale
};

Sizes sizes_of(const Problem& problem) {
  const blasst_problem& p = problem.params.problem;
  const DType dtype = p.q.dtype;
  const Access access(problem.params);
  Sizes most;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t i = 0; i < access.requests()[b].rows; ++i)
      for (int64_t h = 0; h < p.heads; ++h)
        most.query = std::max(most.query, norm(dtype, access.query(b, i, h), p.head_dim));
    for (int64_t j = 0; j < access.requests()[b].keys; ++j) {
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        most.key = std::max(
            most.key, access.key_scale(b, h) * norm(p.kv.k.dtype, access.key(b, j, h), p.head_dim));
        most.value =
            std::max(most.value, access.value_scale(b, h) *
                                     norm(p.kv.v.dtype, access.value(b, j, h), p.value_dim));
      }
    }
  }
  return most;
}

// Keys of which about 30 in a row are alike.
struct RandomKeys {
  int64_t heads, dim, count;
  DType dtype;
  std::vector<std::byte> data;

  explicit RandomKeys(Choices& choose)
      : heads(choose.between(1, 3)),
        dim(8 * choose.between(2, 20)),
        count(choose.between(1, 400)),
        dtype(choose.pick({BLASST_FLOAT32, BLASST_FLOAT16, BLASST_BFLOAT16})),
        data(count * heads * dim * element_bytes(dtype)) {
    const auto seed = static_cast<uint64_t>(choose.between(0, 1'000'000));
    const int64_t row = heads * dim;
    for (int64_t i = 0; i < count * row; ++i)
      store_element(dtype, data.data() + i * element_bytes(dtype),
                    static_cast<float>(2 * uniform(hash(seed, i / row / 30, i % row)) - 1 +
                                       uniform(hash(seed, 1000 + i))));
  }

  HeadRows rows(int64_t first) const {
    return {.dtype = dtype,
            .data = data.data(),
            .elements = count * heads * dim,
            .rows = first,
            .heads = heads,
            .head_dim = dim,
            .stride_row = heads * dim,
            .stride_head = dim};
  }

  double at(int64_t key, int64_t i) const {  // element i of all heads
    return load_element(dtype, data.data() + (key * heads * dim + i) * element_bytes(dtype));
  }

  // Mean over the heads of the cosine of a key and the one before.
  double likeness(int64_t key) const {
    double sum = 0;
    for (int64_t h = 0; h < heads; ++h) {
      double both = 0, before = 0, here = 0;
      for (int64_t i = h * dim; i < (h + 1) * dim; ++i) {
        both += at(key, i) * at(key - 1, i);
        before += at(key - 1, i) * at(key - 1, i), here += at(key, i) * at(key, i);
      }
      sum += both / std::sqrt(before * here);
    }
    return sum / static_cast<double>(heads);
  }
};

std::string check_cut(const RandomKeys& keys, const ChunkRule& rule, const Chunks& chunks,
                      Choices& choose) {
  Chunks pieces;
  while (pieces.keys < keys.count)
    extend_chunks(pieces, rule,
                  keys.rows(std::min(keys.count, pieces.keys + choose.between(1, 90))), 2);
  if (pieces.starts != chunks.starts) return "other boundaries piece by piece than at once";
  if (pieces.sums != chunks.sums) return "other sums piece by piece than at once";

  const std::vector<float> scores = boundary_scores(rule, keys.rows(keys.count), 0, keys.count, 2);
  const bool shift = rule.chunker == BLASST_CHUNKS_SHIFT;
  std::vector<int32_t> starts = {0};
  for (int64_t t = 1; t < keys.count; ++t) {
    const int64_t length = t - starts.back();
    if ((shift && scores[t] < rule.threshold && length >= rule.least) || length >= rule.most)
      starts.push_back(static_cast<int32_t>(t));
    const double allowed = kFloatRoundoff * static_cast<double>(2 * keys.dim + 16);
    if (shift && !(std::abs(scores[t] - keys.likeness(t)) <= allowed))
      return formatted("the score of position {} is {}, not {}", t, scores[t], keys.likeness(t));
  }
  return starts == chunks.starts ? "" : "boundaries are not where the rule has them";
}

std::string check_sums(const RandomKeys& keys, const Chunks& chunks) {
  const int64_t row = keys.heads * keys.dim;
  for (size_t c = 0; c < chunks.starts.size(); ++c) {
    const int64_t first = chunks.starts[c],
                  end = c + 1 < chunks.starts.size() ? chunks.starts[c + 1] : keys.count;
    for (int64_t i = 0; i < row; ++i) {
      double sum = 0, size = 0;
      for (int64_t t = first; t < end; ++t) sum += keys.at(t, i), size += std::abs(keys.at(t, i));
      const double got = chunks.sums[c * row + i];
      if (!(std::abs(got - sum) <= kFloatRoundoff * static_cast<double>(end - first) * size))
        return formatted("sum {} of chunk {} is {}, not {}", i, c, got, sum);
    }
  }
  return "";
}

// The keys are their own queries.
std::string check_choice(const RandomKeys& keys, const Chunks& chunks, int64_t budget) {
  constexpr int64_t kTile = 64;
  const int64_t tiles = (keys.count + kTile - 1) / kTile;
  const auto choose_on = [&](int threads) {
    std::vector<uint8_t> chosen(keys.heads * tiles * tiles, 2);
    select_tiles(chunks, keys.heads, keys.rows(keys.count), false, {.keys = budget}, chosen.data(),
                 threads);
    return chosen;
  };
  const std::vector<uint8_t> chosen = choose_on(1);
  if (chosen != choose_on(3)) return "another choice on three threads than on one";
  for (int64_t row = 0; row < keys.heads * tiles; ++row) {
    const int64_t own = row % tiles;
    const auto choice = std::span(chosen).subspan(row * tiles, tiles);
    const int64_t visits = std::ranges::count(choice, 1);
    if (!choice[0] || !choice[own] || std::ranges::count(choice, 0) + visits != tiles ||
        std::ranges::count(choice.subspan(own + 1), 1) > 0)
      return formatted("head {} query tile {} has a choice that cannot be", row / tiles, own);
    // Tile 0 and its own, whatever the budget.
    if (visits > std::max<int64_t>(2, (budget + kTile - 1) / kTile))
      return formatted("head {} query tile {} reads {} tiles of {} keys", row / tiles, own, visits,
                       budget);
  }
  return "";
}

}  // namespace

bool has_gradients(const Problem& problem) {
  const Case& c = problem.description;
  return !c.decode && problem.params.decision.scores == BLASST_SCORES_EXACT && !c.k_dtype &&
         !c.v_dtype;
}

std::string check_gradients(Problem& problem) {
  BackwardProblem backward(problem);
  if (problem.description.seed % 2) backward.params.gradients.dlse = backward.dlse.data();
  backward.run();
  const std::string mismatch = compare(backward).mismatch;
  return mismatch.empty() ? mismatch : "gradients: " + mismatch;
}

std::string check_merge(const Problem& problem) {
  const Access access(problem.params);
  if (access.rows() == 0) return "";
  const blasst_problem& p = problem.params.problem;
  const DType dtype = p.q.dtype;
  const uint64_t seed = problem.description.seed;
  int64_t shortest = access.max_keys();
  for (const Access::Request& r : access.requests()) shortest = std::min(shortest, r.keys);
  const auto last = static_cast<int64_t>(hash(seed, 110) % static_cast<uint64_t>(shortest + 1));
  KeyPart first(problem, true, last), rest(problem, false, last);
  (seed % 2 ? first : rest).params.problem.sinks = nullptr;
  const bool decode = problem.description.decode;
  call(first.params, decode), call(rest.params, decode);
  std::vector<float> lse(first.lse.size());
  const bool ragged = p.query_layout == BLASST_LAYOUT_RAGGED;
  merge({.batch = ragged ? 1 : p.batch,
         .query_length = ragged ? access.rows() : p.query_length,
         .heads = p.heads,
         .value_dim = p.value_dim,
         .out_a = first.params.problem.out,
         .out_b = rest.params.problem.out,
         .lse_a = first.lse.data(),
         .lse_b = rest.lse.data(),
         .out = first.params.problem.out,
         .lse = lse.data(),
         .execution = problem.params.execution});

  AttentionParams whole = problem.params;
  whole.decision = {}, whole.problem.mask.blocks = nullptr;
  const reference::Result wanted = refer(whole, decode, plan(whole, decode).shape);
  // Float32 scores; probabilities, two parts and their sum rounded to the type.
  const Sizes sizes = sizes_of(problem);
  const double scale = p.scale > 0 ? p.scale : 1 / std::sqrt(static_cast<double>(p.head_dim));
  const double score = 8 * kFloatRoundoff * (8 + scale * sizes.query * sizes.key);
  const double allowed = (4 * unit_roundoff(dtype) + 2 * std::expm1(score)) * sizes.value;
  const auto mismatch = [&](std::string_view what, size_t at, double got, double want) {
    return formatted("two parts, the last of {} keys, merged: {} {} is {}, not {}", last, what, at,
                     got, want);
  };
  const auto* out = static_cast<const std::byte*>(first.params.problem.out.data);
  for (size_t i = 0; i < wanted.out.size(); ++i) {
    const double got = load_element(dtype, out + i * element_bytes(dtype));
    if (!(std::abs(got - wanted.out[i]) <= allowed))
      return mismatch("element", i, got, wanted.out[i]);
  }
  for (size_t i = 0; i < wanted.lse.size(); ++i) {
    if (wanted.lse[i] == -kInf ? lse[i] != -kInf : !(std::abs(lse[i] - wanted.lse[i]) <= score))
      return mismatch("lse", i, lse[i], wanted.lse[i]);
  }
  return "";
}

std::string check_environment(Problem& problem) {
  problem.run();
  const std::vector<std::byte> bits = bits_of(problem);
  const int32_t threads = problem.params.execution.threads;
  bool same = true, holds = true;
  for (const int32_t count : {1, 3}) {
    const OddEnvironment environment;
    problem.params.execution.threads = count;
    problem.run();
    same &= bits_of(problem) == bits;
    holds &= OddEnvironment::holds();
  }
  problem.params.execution.threads = threads;
  if (!same) return "other bits where the caller rounds upwards and flushes";
  return holds ? "" : "a call changed the caller's floating-point environment";
}

std::string check_nan_threshold(Problem& problem) {
  if (problem.thresholds.empty()) return "";
  const auto at = hash(problem.description.seed, 111) % problem.thresholds.size();
  const float before = std::exchange(problem.thresholds[at], std::nanf(""));
  std::string mismatch = "NaN among the thresholds was not refused";
  problem.mark_outputs();
  try {
    call(problem.params, problem.description.decode);
  } catch (const Error& error) {
    const std::string message = error.what();
    if (message.find("nan") == std::string::npos) {
      mismatch += ", but: " + message;
    } else {
      mismatch = problem.wrote_anything() ? "NaN among the thresholds: refused, but written" : "";
    }
  }
  problem.thresholds[at] = before;
  return mismatch;
}

std::string check_chunks(Choices& choose) {
  const RandomKeys keys(choose);
  ChunkRule rule{.chunker = choose.pick({BLASST_CHUNKS_FIXED, BLASST_CHUNKS_SHIFT}),
                 .least = choose.between(1, 40),
                 .threshold = static_cast<float>(choose.between(-2, 10)) / 10};
  rule.most = rule.least + choose.between(0, 100);
  Chunks chunks;
  extend_chunks(chunks, rule, keys.rows(keys.count), 1);
  std::string mismatch = check_cut(keys, rule, chunks, choose);
  if (mismatch.empty()) mismatch = check_sums(keys, chunks);
  if (mismatch.empty()) mismatch = check_choice(keys, chunks, choose.between(1, keys.count));
  return mismatch.empty() ? mismatch : "chunks: " + mismatch;
}

std::string check_calls(Problem& problem, Choices& choose) {
  std::string mismatch;
  const auto check = [&](const auto& run) {
    if (mismatch.empty()) mismatch = run();
  };
  if (has_gradients(problem)) check([&] { return check_gradients(problem); });
  check([&] { return check_merge(problem); });
  check([&] { return check_environment(problem); });
  check([&] { return check_nan_threshold(problem); });
  check([&] { return check_chunks(choose); });
  return mismatch;
}

}  // namespace blasst::check
