// Scores in int8 by the definition (blasst_scores): the integers from float32, in a fixed order of
// operations that every backend follows, or the keys' own; what is made of them in double
// precision.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "problem/problem.h"

namespace blasst::reference {

// x rotated in place: blocks of the largest power of two that divides its size, each by the
// Hadamard matrix without its factor 1 / sqrt(block). Butterflies of neighbours first.
void rotate(std::span<float> x);
int64_t rotated_block(int64_t dim);

// x / largest * 127, rounded to the nearest integer, ties to even; 0 if that is NaN.
int8_t quantized(float x, float largest);

class Int8Scores {
 public:
  Int8Scores(const problem::Problem& problem, TileShape shape);

  struct Score {
    int64_t product;  // of the integers
    double unit;      // scale * q.(k - mean) is product * unit; NaN if one of them is not finite
    double shift;     // scale * q.mean
    double value() const { return static_cast<double>(product) * unit + shift; }
  };
  Score at(int64_t request, int64_t position, int64_t head, int64_t key) const;

  // What was taken off a request's keys, [head_dim]; zeros if they are taken as they are.
  std::span<const float> mean(int64_t request, int64_t kv_head) const;

 private:
  void quantize_queries();
  void quantize_keys(int64_t request, int64_t kv_head);
  void take_keys(int64_t request, int64_t kv_head);

  struct Rows {
    std::vector<int8_t> elements;  // [rows, head_dim]
    std::vector<double> units;     // [rows] of an element
  };
  struct Keys : Rows {  // units: [tiles], of the keys that are finite
    std::vector<float> mean;
    std::vector<bool> broken;  // [rows]: not finite, and so are its scores
  };
  const Keys& keys(int64_t request, int64_t kv_head) const {
    return keys_[request * p_.kv_heads + kv_head];
  }
  int64_t query_index(int64_t request, int64_t position, int64_t head) const {
    return (p_.requests[request].first_row + position) * p_.heads + head;
  }

  const problem::Problem& p_;
  int64_t tile_keys_;
  bool takes_bytes_;            // of the keys: then nothing is rotated
  Rows queries_;                // rows of all heads
  std::vector<double> shifts_;  // of each
  std::vector<Keys> keys_;      // of each request and KV head
};

}  // namespace blasst::reference
