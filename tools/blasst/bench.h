// What the phases of the bench command share.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "blasst/blasst.hpp"
#include "testing/problem.h"

namespace blasst::command {

enum class Phase { kPrefill, kDecode, kBackward };
// Types of keys and values, if they are not the queries'.
struct Cache {
  std::optional<DType> k, v;
  bool operator==(const Cache&) const = default;
};
inline const std::map<std::string, Cache> kCaches = {
    {"dtype", {}},
    {"bf16", {BLASST_BFLOAT16, BLASST_BFLOAT16}},
    {"int8", {BLASST_INT8, BLASST_INT8}},
    {"int8-keys", {BLASST_INT8, {}}},
    {"fp8", {BLASST_FLOAT8_E4M3, BLASST_FLOAT8_E4M3}}};
inline const std::map<std::string, Phase> kPhases = {
    {"prefill", Phase::kPrefill}, {"decode", Phase::kDecode}, {"backward", Phase::kBackward}};

struct BenchOptions {
  Phase phase = Phase::kPrefill;
  Backend backend = BLASST_BACKEND_CPU;
  DType dtype = BLASST_FLOAT32;
  Order order = BLASST_SINK_FIRST;
  Scores scores = BLASST_SCORES_EXACT;
  Cache cache = {};
  int64_t batch = 1;
  std::vector<int64_t> lengths = {8192};
  int64_t heads = 8;
  int64_t kv_heads = 8;
  int64_t head_dim = 128;
  std::vector<double> sparsities = {0.75};
  int threads = 0;
  int repeat = 7;
  bool json = false;
};

// Causal prefill of `length` tokens, or one decode step over as many.
check::Problem make_problem(const BenchOptions& options, int64_t length, double sparsity);

inline int64_t sum(const std::vector<int64_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

// Pairs of a query and a key it sees, of one head.
double visible_pairs(const BenchOptions& options, int64_t length);

nlohmann::ordered_json common_fields(const check::Problem& problem, const BenchOptions& options,
                                     int64_t length, double sparsity);

// One line of results. Sparsity is a share of tiles.
nlohmann::ordered_json measure_backward(const BenchOptions& options, int64_t length,
                                        double wanted_sparsity);

}  // namespace blasst::command
