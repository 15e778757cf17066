// A description of one attention problem, and the random choice of one.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "blasst/blasst.hpp"
#include "testing/numbers.h"

namespace blasst::check {

enum class Layout { kDense, kRagged, kPaged };

struct Lengths {
  int64_t queries;
  int64_t keys;
};

// Everything that determines a problem. The same seed gives the same numbers in every layout and
// type.
struct Case {
  uint64_t seed = 0;
  bool decode = false;
  DType dtype = BLASST_FLOAT32;
  std::vector<Lengths> requests = {{130, 200}};
  int64_t heads = 2;
  int64_t kv_heads = 1;
  int64_t head_dim = 64;
  int64_t value_dim = 64;
  bool values_in_keys = false;  // v is the first value_dim elements of k, in its memory
  // Of k and v, if they are of other types than dtype: int8 and float8_e4m3, with scales.
  std::optional<DType> k_dtype = {}, v_dtype = {};
  bool scales_per_request = false, scales_per_head = false;
  bool scales_are_powers = false;  // of two

  Inputs inputs = Inputs::kDrift;
  double density = 0.25;  // planted inputs: share of tiles that match
  // Planted inputs: rows and keys that match together; 0: those of the CPU's tiles.
  int64_t block_rows = 0, block_keys = 0;

  Layout layout = Layout::kDense;  // of keys and values
  bool ragged_queries = false;     // otherwise all requests have as many queries, or are padded
  // Dense queries of a padded batch: a request uses the first `queries` of as many rows as the
  // longest has, and, of dense keys, those behind some that it does not use.
  bool padded = false;
  int64_t page_size = 16;
  bool head_major = false;  // heads outside tokens in memory
  int64_t padding = 0;      // unused elements after every row, and before the first

  float scale = 0;
  float softcap = 0;
  bool sinks = false;
  bool causal = false;
  int64_t window_left = -1;
  int64_t window_right = -1;
  bool bands = false;
  bool blocks = false;
  Order order = BLASST_SINK_FIRST;

  TestKind test = BLASST_TEST_NONE;
  float threshold = 0;       // largest of the test's values
  bool per_request = false;  // each request, each head has a value of its own
  bool per_head = false;
  int threads = 2;
  int64_t places = 1;  // query tiles that have thresholds of their own
  Scores scores = BLASST_SCORES_EXACT;
};

std::string describe(const Case& c);

// A source of choices: a seed, or a fuzzer's bytes.
class Choices {
 public:
  virtual ~Choices() = default;
  virtual int64_t between(int64_t least, int64_t most) = 0;  // both included

  bool one_in(int64_t n) { return between(1, n) == 1; }
  template <typename T>
  T pick(std::initializer_list<T> options) {
    return options.begin()[between(0, static_cast<int64_t>(options.size()) - 1)];
  }
};

class SeededChoices : public Choices {
 public:
  explicit SeededChoices(uint64_t seed) : seed_(seed) {}
  int64_t between(int64_t least, int64_t most) override;

 private:
  uint64_t seed_;
  uint64_t drawn_ = 0;
};

// A valid problem of any kind, of about `budget` multiply-adds at most.
Case random_case(Choices& choose, int64_t budget);

inline Case random_case(uint64_t seed, int64_t budget = 12'000'000) {
  SeededChoices choices(seed);
  return random_case(choices, budget);
}

}  // namespace blasst::check
