// The numbers of Q, K and V. Every row is a function of the seed and of its place, so the same
// numbers can be laid out in memory in any way and filled in by any number of threads.
//
// Gaussian Q and K give about 1 % sparsity at any useful threshold: tests and benchmarks on them
// exercise little. Two of the kinds below have scores that differ from tile to tile.
#pragma once

#include <cstdint>
#include <span>

namespace blasst::check {

enum class Inputs {
  kGaussian,  // standard normal
  kDrift,     // a random offset on the scores of each stretch of keys: gaps of every size
  kPlanted,   // query blocks match some key blocks and score about zero on the others: known
              // sparsity
};

struct Numbers {
  Inputs inputs = Inputs::kGaussian;
  uint64_t seed = 0;
  int64_t group = 1;        // query heads that share a KV head
  int64_t block_rows = 64;  // planted: query rows that share a direction
  int64_t block_keys = 64;  // planted: keys that share their directions
  double density = 0.25;  // planted: share of key blocks that a query block matches; block 0 always

  // Fills `row`, whose size is the head dimension.
  void query(int64_t request, int64_t position, int64_t head, std::span<float> row) const;
  void key(int64_t request, int64_t token, int64_t kv_head, std::span<float> row) const;
  void value(int64_t request, int64_t token, int64_t kv_head, std::span<float> row) const;
};

// Planted: the natural log by which a matching key beats another, with the default scale.
inline constexpr double kPlantedScore = 20;

// The density at which a share `sparsity` of `tiles` visitable tiles is skipped. The first of each
// of the `query_tiles` visits never is.
double planted_density(double sparsity, int64_t tiles, int64_t query_tiles);

// 64 random bits that depend on all arguments.
uint64_t hash(uint64_t seed, uint64_t a, uint64_t b = 0, uint64_t c = 0, uint64_t d = 0);

// The same, as a number in [0, 1).
double uniform(uint64_t bits);

}  // namespace blasst::check
