#include "testing/reference/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <span>

#include "problem/checks.h"
#include "problem/element.h"
#include "problem/float_environment.h"
#include "problem/problem.h"
#include "testing/reference/int8_scores.h"
#include "testing/reference/scales.h"

namespace blasst::reference {
namespace {

using problem::Problem;
using problem::QueryTile;
using problem::Range;

// A sum of exponentials, relative to the largest of them.
struct ExpSum {
  double top = -kInf;
  double sum = 0;

  void add(double count, double score) {
    if (score == -kInf) return;
    if (score > top) {
      sum *= std::exp(top - score);
      top = score;
    }
    sum += count * std::exp(score - top);
  }
  void add(const ExpSum& other) { add(other.sum, other.top); }
  double log() const { return top + std::log(sum); }
  // What share it has of the total with a sum whose logarithm is given.
  double share(double other) const { return sum == 0 ? 0 : 1 / (1 + std::exp(other - log())); }
};

// Online softmax of one row.
struct Row {
  double seed = -kInf;    // maximum of tiles before this split, which tiles are tested against too
  double m = -kInf;       // running maximum
  double l = 0;           // kept exp(score - m)
  std::vector<double> o;  // kept exp(score - m) * v
  ExpSum bound = {};      // upper bound on the skipped exp(score)
  ExpSum dropped = {};    // skipped exp(score), exactly

  void rescale(double maximum) {
    if (!(maximum > m)) return;
    const double factor = std::exp(m - maximum);
    l *= factor;
    for (double& x : o) x *= factor;
    m = maximum;
  }
};

// One query tile: scores, visit, decisions.
class Attend {
 public:
  // `int8`: null if scores are exact.
  Attend(const Problem& p, TileShape shape, const QueryTile& tile, const Int8Scores* int8,
         Result& result, const std::vector<bool>* forced)
      : p_(p), shape_(shape), tile_(tile), int8_(int8), result_(result), forced_(forced) {
    for (int64_t r = 0; r < tile.rows(); ++r) ranges_.push_back(p.row_keys(tile, r));
    rows_ = fresh_rows();
  }

  void run() {
    const Range tiles = problem::tile_range(ranges_, shape_.keys);
    int64_t split_tiles = shape_.split_tiles;
    if (shape_.most_splits > 0)
      split_tiles = std::max(split_tiles, problem::ceil_div(tiles.size(), shape_.most_splits));
    for (int64_t i = 0; i < tiles.size(); ++i) {
      const int64_t left = tiles.size() - i;
      const bool joins = 2 * left <= split_tiles && left <= BLASST_SEED_TILES;
      if (split_tiles > 0 && i > 0 && i % split_tiles == 0 && !joins) start_split(tiles, i);
      const int64_t j = problem::nth_tile(p_.order, tiles, i);
      if (visited(j)) visit(j);
    }
    finish_split();
    write();
  }

 private:
  std::vector<Row> fresh_rows() const {
    return std::vector<Row>(tile_.rows(), Row{.o = std::vector<double>(p_.value_dim)});
  }

  Range tile_keys(int64_t j) const { return {j * shape_.keys, (j + 1) * shape_.keys}; }

  bool visited(int64_t j) const {
    return problem::any_visible(ranges_, tile_keys(j)) && p_.block_visible(tile_, j);
  }

  double score(int64_t row, int64_t key) const {
    const double scaled =
        int8_ ? int8_->at(tile_.request, tile_.position_of(row), tile_.head_of(row), key).value()
              : exact_score(row, key);
    return p_.softcap > 0 ? p_.softcap * std::tanh(scaled / p_.softcap) : scaled;
  }

  double exact_score(int64_t row, int64_t key) const {
    const std::byte* q = p_.query(tile_.request, tile_.position_of(row), tile_.head_of(row));
    const std::byte* k = p_.key(tile_.request, key, tile_.head / p_.group());
    const DType k_type = p_.kv.k.dtype;
    double dot = 0;
    for (int64_t d = 0; d < p_.head_dim; ++d)
      dot += problem::load_element(p_.dtype, q + d * problem::element_bytes(p_.dtype)) *
             problem::load_element(k_type, k + d * problem::element_bytes(k_type));
    return dot * score_scale_of(p_, tile_.request, tile_.head / p_.group());
  }

  // Scores of a row's visible keys in a tile.
  std::vector<double> scores(int64_t row, Range keys) const {
    std::vector<double> s;
    for (int64_t key = keys.begin; key < keys.end; ++key) s.push_back(score(row, key));
    return s;
  }

  // Largest score, NaN left aside.
  static double maximum(std::span<const double> s) {
    double most = -kInf;
    for (const double x : s) most = x > most ? x : most;
    return most;
  }

  void visit(int64_t j) {
    std::vector<std::vector<double>> s(tile_.rows());
    TileDecision decision{
        tile_.request, tile_.head, tile_.first_position / shape_.query_rows, j, -kInf, -kInf,
        -kInf,         false};
    bool nan = false;
    for (int64_t r = 0; r < tile_.rows(); ++r) {
      s[r] = scores(r, intersect(ranges_[r], tile_keys(j)));
      nan |= std::ranges::any_of(s[r], [](double x) { return std::isnan(x); });
      const double t = maximum(s[r]);
      if (t == -kInf) continue;  // nothing valid: neither vetoes nor allows
      const double running = std::max(rows_[r].m, rows_[r].seed);
      const double gap = t - running;
      const double tested = p_.test.kind == BLASST_TEST_ABSOLUTE ? t : gap;
      const double below = p_.skip_below(tile_, tile_.head_of(r), shape_);
      decision.gap = std::max(decision.gap, gap);
      decision.maximum = std::max(decision.maximum, t);
      // A row's first keys are never skipped, and two equal infinities (inf - inf) are no reason to
      // skip.
      const double margin = running == -kInf || !(tested < below || tested >= below) ? kInf
                            : tested == below                                        ? 0
                                              : tested - below;
      decision.margin = std::max(decision.margin, margin);
    }
    if (nan) decision.gap = decision.maximum = decision.margin = std::nan("");
    decision.kept = !(decision.margin < 0);
    if (forced_) decision.kept = (*forced_)[result_.tiles.size()];
    result_.tiles.push_back(decision);
    for (int64_t r = 0; r < tile_.rows(); ++r) {
      const Range keys = intersect(ranges_[r], tile_keys(j));
      decision.kept ? keep(rows_[r], s[r], keys) : skip(rows_[r], s[r]);
    }
  }

  void keep(Row& row, std::span<const double> s, Range keys) const {
    const DType v_type = p_.kv.v.dtype;
    row.rescale(maximum(s));
    for (size_t i = 0; i < s.size(); ++i) {
      if (s[i] == -kInf) continue;
      const double p = std::exp(s[i] - row.m);
      row.l += p;
      const std::byte* v =
          p_.value(tile_.request, keys.begin + static_cast<int64_t>(i), tile_.head / p_.group());
      for (int64_t d = 0; d < p_.value_dim; ++d)
        row.o[d] += p * problem::load_element(v_type, v + d * problem::element_bytes(v_type));
    }
  }

  static void skip(Row& row, std::span<const double> s) {
    const double t = maximum(s);
    if (t == -kInf) return;
    row.bound.add(static_cast<double>(s.size()), t);
    for (const double x : s) row.dropped.add(1, x);
  }

  // A new split starts empty, with the maxima of the first tiles of the whole visit, of those that
  // lie before it.
  void start_split(Range tiles, int64_t begin) {
    finish_split();
    rows_ = fresh_rows();
    int seeds = 0;
    for (int64_t i = 0; i < begin && seeds < BLASST_SEED_TILES; ++i) {
      const int64_t j = problem::nth_tile(p_.order, tiles, i);
      if (!visited(j)) continue;
      ++seeds;
      for (int64_t r = 0; r < tile_.rows(); ++r)
        rows_[r].seed =
            std::max(rows_[r].seed, maximum(scores(r, intersect(ranges_[r], tile_keys(j)))));
    }
  }

  void finish_split() {
    if (total_.empty()) {
      total_ = rows_;
      return;
    }
    for (int64_t r = 0; r < tile_.rows(); ++r) {
      Row &into = total_[r], &from = rows_[r];
      into.rescale(from.m);
      from.rescale(into.m);
      into.l += from.l, into.bound.add(from.bound), into.dropped.add(from.dropped);
      for (int64_t d = 0; d < p_.value_dim; ++d) into.o[d] += from.o[d];
    }
  }

  void write() {
    for (int64_t r = 0; r < tile_.rows(); ++r) {
      Row& row = total_[r];
      const int64_t head = tile_.head_of(r);
      const int64_t position = p_.requests[tile_.request].first_row + tile_.position_of(r);
      const int64_t head_row = head * p_.rows + position;
      const double sink = p_.sinks ? p_.sinks[head] : -kInf;
      const double v_scale = scale_of(p_.v_scales, tile_.request, head / p_.group());
      row.rescale(sink);
      row.l += sink == -kInf ? 0 : std::exp(sink - row.m);
      if (row.m == -kInf && row.l == 0) {  // neither a valid key nor a sink
        result_.lse[head_row] = -kInf;
        continue;
      }
      for (int64_t d = 0; d < p_.value_dim; ++d)
        result_.out[(position * p_.heads + head) * p_.value_dim + d] = row.o[d] / row.l * v_scale;
      const double lse = row.m + std::log(row.l);
      result_.lse[head_row] = lse;
      result_.dropped_mass_bound[head_row] = row.bound.share(lse);
      result_.dropped_mass[head_row] = row.dropped.share(lse);
    }
  }

  const Problem& p_;
  TileShape shape_;
  QueryTile tile_;
  const Int8Scores* int8_;
  Result& result_;
  const std::vector<bool>* forced_;
  std::vector<Range> ranges_;
  std::vector<Row> rows_;   // of the split at hand
  std::vector<Row> total_;  // of the splits before it
};

Result attend(const Problem& p, TileShape shape, const std::vector<bool>* forced) {
  if (shape.query_rows < 1 || shape.keys < 1 || shape.split_tiles < 0 || shape.most_splits < 0)
    throw Error(BLASST_INVALID_ARGUMENT,
                "the reference's tile shape needs query_rows and keys of at least 1");
  problem::check_block_mask(p, shape);
  const auto count = static_cast<size_t>(p.rows * p.heads);
  Result result{.out = std::vector<double>(count * p.value_dim),
                .lse = std::vector<double>(count, -kInf),
                .dropped_mass_bound = std::vector<double>(count),
                .dropped_mass = std::vector<double>(count),
                .tiles = {}};
  p.for_padding([&](int64_t request, int64_t row) {
    for (int64_t h = 0; h < p.heads; ++h)
      result.lse[h * p.rows + row] = p.padding_lse(request, row, h);
  });
  std::optional<Int8Scores> int8;
  if (p.scores == BLASST_SCORES_INT8) int8.emplace(p, shape);
  for (const QueryTile& tile : p.query_tiles(shape.query_rows))
    Attend(p, shape, tile, int8 ? &*int8 : nullptr, result, forced).run();
  return result;
}

}  // namespace

Result prefill(const AttentionParams& params, TileShape shape, const std::vector<bool>* kept) {
  const problem::DefaultFloatEnvironment environment;
  return attend(problem::make_problem(params, problem::Phase::kPrefill), shape, kept);
}

Result decode(const AttentionParams& params, TileShape shape, const std::vector<bool>* kept) {
  const problem::DefaultFloatEnvironment environment;
  return attend(problem::make_problem(params, problem::Phase::kDecode), shape, kept);
}

}  // namespace blasst::reference
