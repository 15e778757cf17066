#include "testing/compare.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <span>

#include "problem/problem.h"
#include "problem/text.h"
#include "testing/element.h"
#include "testing/reference/int8_scores.h"

namespace blasst::check {
namespace {

// How far rounding may take a correct kernel: twice what it does to a plain implementation, and
// never less than the rounding of single operations.
struct Allowance {
  double score = 0;  // natural log
  double out = 0;    // relative to the largest element of the row
  double lse = 0;
};

class Comparer {
 public:
  Comparer(const Problem& problem, const Plan& plan, double sum_roundoff)
      : problem_(problem),
        p_(problem.params),
        decode_(problem.description.decode),
        access_(p_),
        plan_(plan),
        shape_(plan.shape),
        roundoff_(sum_roundoff) {
    if (p_.decision.scores == BLASST_SCORES_INT8) {
      checked_.emplace(
          problem::make_problem(p_, decode_ ? problem::Phase::kDecode : problem::Phase::kPrefill));
      int8_.emplace(*checked_, shape_);
    }
    int64_t first = 0;
    for (const auto& r : access_.requests()) {
      first_query_tile_.push_back(first);
      const bool ragged = p_.problem.query_layout == BLASST_LAYOUT_RAGGED;
      const int64_t room = ragged ? r.rows : p_.problem.query_length;
      first += decode_ ? 1 : problem::ceil_div(room, shape_.query_rows);
    }
  }

  Comparison run() {
    force_decisions();
    run_plain();
    check_decisions();
    check_statistics();
    check_gaps();
    check_maxima();
    check_rows();
    if (problem_.wrote_elsewhere()) mismatch("wrote outside the rows of out");
    return result_;
  }

 private:
  using Tile = reference::TileDecision;

  template <typename... Args>
  void mismatch(fmt::format_string<Args...> format, const Args&... args) {
    if (result_.mismatch.empty()) result_.mismatch = formatted(format, args...);
  }

  int64_t group() const { return p_.problem.heads / p_.problem.kv_heads; }
  int64_t heads_of_tile() const { return p_.problem.heads / plan_.tile_heads; }

  bool bit(int64_t bit_head, int64_t query_tile, int64_t key_tile) const {
    const int64_t row = bit_head * plan_.query_tiles + query_tile;
    return problem_.tile_bits[row * plan_.tile_words + key_tile / 32] >> (key_tile % 32) & 1;
  }

  bool kernel_kept(const Tile& t) const {
    return bit(t.head / heads_of_tile(), first_query_tile_[t.request] + t.query_tile, t.key_tile);
  }

  // The reference, along the kernel's decisions.
  void force_decisions() {
    reference_ = refer(p_, decode_, shape_);
    std::vector<bool> kept;
    for (const Tile& t : reference_.tiles) {
      kept.push_back(kernel_kept(t));
      result_.rounded += t.kept != kept.back();
      result_.skipped += !kept.back();
    }
    result_.decisions = std::ssize(kept);
    if (result_.rounded > 0) reference_ = refer(p_, decode_, shape_, &kept);
  }

  // Attention as one writes it down first: float32 scores and softmax, probabilities and output
  // stored in the problem's type.
  void run_plain() {
    std::map<std::pair<int64_t, int64_t>, std::vector<const Tile*>>
        visits;  // by head and global row
    for (const Tile& t : reference_.tiles) {
      const auto& r = access_.requests()[t.request];
      const int64_t first = decode_ ? 0 : t.query_tile * shape_.query_rows;
      const int64_t end = decode_ ? r.rows : std::min(r.rows, first + shape_.query_rows);
      for (int64_t h = t.head; h < t.head + heads_of_tile(); ++h)
        for (int64_t i = first; i < end; ++i) visits[{h, r.first_row + i}].push_back(&t);
    }
    double plain_lse_error = 0;
    for (const auto& [place, tiles] : visits)
      plain_row(place.first, place.second, tiles, plain_lse_error);
    const double rounding = roundoff_ * (8 + score_roundings(p_.problem.softcap) * magnitude_);
    allowed_.score = 2 * score_error_ + rounding;
    allowed_.out = 2 * result_.plain_error + unit_roundoff(p_.problem.q.dtype) + rounding;
    allowed_.lse = 2 * plain_lse_error + rounding;
  }

  void plain_row(int64_t head, int64_t row, std::span<const Tile* const> tiles, double& lse_error) {
    const int64_t request = tiles[0]->request;
    const int64_t position = row - access_.requests()[request].first_row;
    std::vector<std::pair<int64_t, float>> scores;  // of the keys of kept tiles
    float m = p_.problem.sinks ? p_.problem.sinks[head] : -std::numeric_limits<float>::infinity();
    for (const Tile* t : tiles) {
      for (int64_t j = t->key_tile * shape_.keys; j < (t->key_tile + 1) * shape_.keys; ++j) {
        if (!access_.sees(request, position, head, j)) continue;
        const float s = plain_score(request, position, head, j);
        if (!kernel_kept(*t)) continue;
        scores.emplace_back(j, s);
        m = std::max(m, s);
      }
    }
    if (scores.empty()) return;
    const DType v_dtype = p_.problem.kv.v.dtype;
    float l = p_.problem.sinks ? std::exp(p_.problem.sinks[head] - m) : 0;
    std::vector<float> o(p_.problem.value_dim);
    for (const auto& [j, s] : scores) {
      const float probability = std::exp(s - m);
      l += probability;
      const float stored = rounded(p_.problem.q.dtype, probability);
      const std::byte* v = access_.value(request, j, head / group());
      for (int64_t d = 0; d < p_.problem.value_dim; ++d)
        o[d] += stored * static_cast<float>(load_element(v_dtype, v + d * element_bytes(v_dtype)));
    }
    const float v_scale = access_.value_scale(request, head / group());
    for (float& x : o) x = rounded(p_.problem.q.dtype, x / l * v_scale);
    const double error = row_error(head, row, o);
    if (std::isfinite(error)) result_.plain_error = std::max(result_.plain_error, error);
    const double lse = std::abs(m + std::log(l) - reference_.lse[head * access_.rows() + row]);
    if (std::isfinite(lse)) lse_error = std::max(lse_error, lse);
  }

  float plain_score(int64_t request, int64_t position, int64_t head, int64_t key) {
    const DType dtype = p_.problem.q.dtype, k_dtype = p_.problem.kv.k.dtype;
    const float scale =
        access_.key_scale(request, head / group()) *
        (p_.problem.scale > 0 ? p_.problem.scale
                              : 1 / std::sqrt(static_cast<float>(p_.problem.head_dim)));
    const std::byte* q = access_.query(request, position, head);
    const std::byte* k = access_.key(request, key, head / group());
    float dot = 0;
    double exact = 0, size = 0;
    for (int64_t d = 0; d < p_.problem.head_dim; ++d) {
      const double other = int8_ ? int8_->mean(request, head / group())[d]
                                 : load_element(k_dtype, k + d * element_bytes(k_dtype));
      const double product = load_element(dtype, q + d * element_bytes(dtype)) * other;
      dot += static_cast<float>(product);
      exact += product;
      size += std::abs(product);
    }
    float plain = scale * dot;
    exact *= scale, size *= scale;
    if (int8_) {
      const auto score = int8_->at(request, position, head, key);
      const double rest = static_cast<double>(score.product) * score.unit;
      plain += static_cast<float>(score.product) * static_cast<float>(score.unit);
      exact += rest;
      size += 2 * std::abs(rest);  // whose unit is rounded several times
    }
    if (std::isfinite(size)) {
      score_error_ = std::max(score_error_, std::abs(plain - exact));
      magnitude_ = std::max(magnitude_, size);
    }
    return p_.problem.softcap > 0 ? p_.problem.softcap * std::tanh(plain / p_.problem.softcap)
                                  : plain;
  }

  std::span<const double> reference_row(int64_t head, int64_t row) const {
    return std::span(reference_.out)
        .subspan((row * p_.problem.heads + head) * p_.problem.value_dim, p_.problem.value_dim);
  }

  // Largest error relative to the reference's largest element. A row that is not finite in the
  // reference must not be finite here, in the same elements; otherwise infinity.
  double row_error(int64_t head, int64_t row, std::span<const float> out) const {
    const std::span<const double> wanted = reference_row(head, row);
    double error = 0, size = 0;
    for (size_t d = 0; d < wanted.size(); ++d) {
      if (std::isfinite(wanted[d]) != std::isfinite(out[d])) return kInf;
      if (!std::isfinite(wanted[d])) continue;
      error = std::max(error, std::abs(out[d] - wanted[d]));
      size = std::max(size, std::abs(wanted[d]));
    }
    return error == 0 ? 0 : error / size;
  }

  void check_decisions() {
    int64_t bits = 0;
    for (const uint32_t word : problem_.tile_bits) bits += std::popcount(word);
    if (bits != result_.decisions - result_.skipped)
      mismatch("{} tile bits are set, {} of visited tiles", bits,
               result_.decisions - result_.skipped);
    for (const Tile& t : reference_.tiles) {
      // The reference has walked the kernel's way, so the margin says whether this very step is
      // right.
      const bool kept = kernel_kept(t);
      if (kept != !(t.margin < 0) && !(std::abs(t.margin) <= 2 * allowed_.score))
        mismatch(
            "request {} head {} query tile {} key tile {} was {}, but its margin is {} (rounding: "
            "{})",
            t.request, t.head, t.query_tile, t.key_tile, kept ? "kept" : "skipped", t.margin,
            2 * allowed_.score);
    }
    if (result_.rounded > 1 + result_.decisions / 500)
      mismatch("{} of {} decisions differ from the reference's, too many for rounding",
               result_.rounded, result_.decisions);
  }

  // Whether the tile counts for the head: in decode the heads of a KV head share their tiles.
  bool counts_for(const Tile& t, int64_t head) const {
    return t.head / heads_of_tile() == head / heads_of_tile();
  }

  void check_statistics() {
    for (int64_t b = 0; b < p_.problem.batch; ++b) {
      for (int64_t h = 0; h < p_.problem.heads; ++h) {
        int64_t visitable = 0, skipped = 0;
        for (const Tile& t : reference_.tiles) {
          if (t.request != b || !counts_for(t, h)) continue;
          ++visitable;
          skipped += !kernel_kept(t);
        }
        const int64_t cell = b * p_.problem.heads + h;
        if (problem_.tiles_visitable[cell] != visitable || problem_.tiles_skipped[cell] != skipped)
          mismatch("request {} head {} reports {} of {} tiles skipped; it was {} of {}", b, h,
                   problem_.tiles_skipped[cell], problem_.tiles_visitable[cell], skipped,
                   visitable);
      }
    }
  }

  // At every edge of the histogram, the tiles below it: as many as the reference has, give or take
  // those within rounding of the edge.
  void check_gaps() {
    constexpr int inner = BLASST_GAP_BINS - 2;
    for (int64_t h = 0; h < p_.problem.heads; ++h) {
      std::vector<double> gaps;
      for (const Tile& t : reference_.tiles)
        if (counts_for(t, h)) gaps.push_back(std::isnan(t.gap) ? kInf : t.gap);
      std::ranges::sort(gaps);
      const auto below = [&](double edge) {
        return std::ranges::lower_bound(gaps, edge) - gaps.begin();
      };
      int64_t counted = 0;
      for (int bin = 0; bin < BLASST_GAP_BINS; ++bin) {
        counted += static_cast<int64_t>(problem_.gap_histogram[h * BLASST_GAP_BINS + bin]);
        const bool last = bin == BLASST_GAP_BINS - 1;
        const double edge = last ? kInf : bin * BLASST_GAP_RANGE / inner - BLASST_GAP_RANGE;
        const double slack = 2 * allowed_.score;
        const int64_t least = last ? std::ssize(gaps) : below(edge - slack);
        const int64_t most = last ? std::ssize(gaps) : below(edge + slack);
        if (counted < least || counted > most)
          mismatch("head {}: the histogram counts {} gaps below {}; the reference has {} to {}", h,
                   counted, edge, least, most);
      }
    }
  }

  // Visited tiles have the reference's maximum, all others -inf.
  void check_maxima() {
    if (!p_.report.tile_maxima) return;
    const int64_t stride = p_.report.tile_maxima_stride;
    int64_t visited = 0;
    for (const Tile& t : reference_.tiles) {
      const int64_t head = t.head / heads_of_tile();
      const int64_t row = head * plan_.query_tiles + first_query_tile_[t.request] + t.query_tile;
      const float maximum = problem_.tile_maxima[row * stride + t.key_tile];
      visited += maximum != -kInf;
      const bool same = std::isfinite(t.maximum)
                            ? std::abs(maximum - t.maximum) <= allowed_.score
                            : std::isnan(t.maximum) == std::isnan(maximum) &&
                                  !(std::isinf(t.maximum) && t.maximum != maximum);
      if (!same)
        mismatch("request {} head {} query tile {} key tile {}: its maximum is {}, not {}",
                 t.request, t.head, t.query_tile, t.key_tile, t.maximum, maximum);
    }
    const auto reported =
        std::ranges::count_if(problem_.tile_maxima, [](float x) { return x != -kInf; });
    if (reported != visited)
      mismatch("{} tile maxima are reported, {} of visited tiles", reported, visited);
  }

  void check_rows() {
    const std::vector<float> out = problem_.out();
    for (int64_t h = 0; h < p_.problem.heads; ++h) {
      for (int64_t row = 0; row < access_.rows(); ++row) {
        const std::span kernel = std::span(out).subspan(
            (row * p_.problem.heads + h) * p_.problem.value_dim, p_.problem.value_dim);
        const double error = row_error(h, row, kernel);
        result_.error = std::max(result_.error, error);
        if (!(error <= allowed_.out))
          mismatch("head {} row {}: relative error {}, allowed {}", h, row, error, allowed_.out);
        check_lse(h, row);
        check_bound(h, row);
      }
    }
  }

  void check_lse(int64_t head, int64_t row) {
    const float lse = problem_.lse[head * access_.rows() + row];
    const double wanted = reference_.lse[head * access_.rows() + row];
    const bool right = std::isfinite(wanted) ? std::abs(lse - wanted) <= allowed_.lse
                       : std::isnan(wanted)  ? std::isnan(lse)
                                             : lse == wanted;
    if (!right)
      mismatch("head {} row {}: lse is {}, the reference's {} (allowed: {})", head, row, lse,
               wanted, allowed_.lse);
  }

  void check_bound(int64_t head, int64_t row) {
    const double bound = problem_.dropped_mass_bound[head * access_.rows() + row];
    const double wanted = reference_.dropped_mass_bound[head * access_.rows() + row];
    const double dropped = reference_.dropped_mass[head * access_.rows() + row];
    if (std::isnan(wanted)) return;
    const double slack = 2 * std::expm1(2 * allowed_.score);
    if (!(bound >= dropped * (1 - slack) - 1e-37) ||
        !(std::abs(bound - wanted) <= slack * wanted + 1e-37))
      mismatch(
          "head {} row {}: dropped mass bound is {}; the reference's is {}, the dropped mass {}",
          head, row, bound, wanted, dropped);
  }

  const Problem& problem_;
  const AttentionParams& p_;
  bool decode_;
  Access access_;
  Plan plan_;
  TileShape shape_;
  double roundoff_;
  std::optional<problem::Problem> checked_;  // with scores in int8
  std::optional<reference::Int8Scores> int8_;
  std::vector<int64_t> first_query_tile_;  // of each request
  reference::Result reference_;
  double score_error_ = 0;  // of plain float32 scores
  double magnitude_ = 0;    // largest scale * sum |q k|
  Allowance allowed_;
  Comparison result_;
};

}  // namespace

Comparison compare(const Problem& problem) {
  return compare(problem, plan(problem.params, problem.description.decode));
}

Comparison compare(const Problem& problem, const Plan& plan, double sum_roundoff) {
  return Comparer(problem, plan, sum_roundoff).run();
}

}  // namespace blasst::check
