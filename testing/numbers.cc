#include "testing/numbers.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace blasst::check {
namespace {

enum Tensor : uint64_t { kQuery = 1, kKey, kValue, kDirection, kOffset, kPhase };

constexpr int kDirections = 8;
constexpr int64_t kDriftKeys = 48;  // no multiple of a tile, so that tiles mix stretches
constexpr double kDriftScore = 4;   // standard deviation of a stretch's offset
constexpr float kPlantedNoise = 0.5f;

uint64_t mix(uint64_t x) {  // splitmix64's output function
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  // Nearly standard normal: the sum of four uniform numbers.
  float normal() {
    const uint64_t x = mix(state_ += 0x9e3779b97f4a7c15);
    const auto sum = (x & 0xffff) + (x >> 16 & 0xffff) + (x >> 32 & 0xffff) + (x >> 48);
    return (static_cast<float>(sum) - 2 * 65535) * (1.7320508f / 65536);
  }

 private:
  uint64_t state_;
};

void fill_normal(uint64_t seed, std::span<float> row, float deviation = 1) {
  Random random(seed);
  for (float& x : row) x = deviation * random.normal();
}

// Adds `length` times unit vector number `direction`: rows of an 8 x 8 Hadamard matrix, repeated.
void add_direction(int direction, double length, std::span<float> row) {
  const auto step = static_cast<float>(length / std::sqrt(static_cast<double>(row.size())));
  for (size_t i = 0; i < row.size(); ++i)
    row[i] += std::popcount(static_cast<unsigned>(direction) & i & 7) % 2 ? -step : step;
}

// The length that gives two vectors along one direction the score `score`, at scale 1 /
// sqrt(head_dim).
double length_for(double score, size_t head_dim) {
  return std::sqrt(score * std::sqrt(static_cast<double>(head_dim)));
}

}  // namespace

uint64_t hash(uint64_t seed, uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
  uint64_t x = seed;
  for (const uint64_t part : {a, b, c, d}) x = mix(x + 0x9e3779b97f4a7c15 + part);
  return x;
}

double uniform(uint64_t bits) { return static_cast<double>(bits >> 11) * 0x1p-53; }

void Numbers::query(int64_t request, int64_t position, int64_t head, std::span<float> row) const {
  fill_normal(hash(seed, kQuery, request, position, head), row,
              inputs == Inputs::kPlanted ? kPlantedNoise : 1);
  if (inputs == Inputs::kDrift) add_direction(0, length_for(kDriftScore, row.size()), row);
  if (inputs == Inputs::kPlanted) {
    const uint64_t direction = hash(seed, kDirection, request, position / block_rows, head / group);
    add_direction(direction % kDirections, length_for(kPlantedScore, row.size()), row);
  }
}

void Numbers::key(int64_t request, int64_t token, int64_t kv_head, std::span<float> row) const {
  fill_normal(hash(seed, kKey, request, token, kv_head), row,
              inputs == Inputs::kPlanted ? kPlantedNoise : 1);
  if (inputs == Inputs::kDrift) {
    const float offset = Random(hash(seed, kOffset, request, token / kDriftKeys, kv_head)).normal();
    add_direction(0, offset * length_for(kDriftScore, row.size()), row);
  }
  if (inputs == Inputs::kPlanted) {
    // Each direction matches evenly spread blocks; its phase sets which.
    const double phase = uniform(hash(seed, kPhase, request, kv_head));
    const int64_t index = token / block_keys;
    const auto block = static_cast<double>(index);
    for (int i = 0; i < kDirections; ++i) {
      const double at = phase + static_cast<double>(i) / kDirections + block * density;
      if (block == 0 || std::floor(at) != std::floor(at - density))
        add_direction(i, length_for(kPlantedScore, row.size()), row);
    }
  }
}

void Numbers::value(int64_t request, int64_t token, int64_t kv_head, std::span<float> row) const {
  fill_normal(hash(seed, kValue, request, token, kv_head), row);
}

double planted_density(double sparsity, int64_t tiles, int64_t query_tiles) {
  if (tiles <= query_tiles) return 1;
  const auto others = static_cast<double>(tiles - query_tiles);
  return std::clamp(1 - sparsity * static_cast<double>(tiles) / others, 0.0, 1.0);
}

}  // namespace blasst::check
