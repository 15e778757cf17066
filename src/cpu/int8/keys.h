// The keys of a call in int8 (blasst_scores): written once, before prefill walks them. Keys that
// are int8 already stay where they lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/plan.h"
#include "problem/problem.h"

namespace blasst::cpu {

// One key tile of a KV head.
struct Int8Tile {
  int8_t* elements;  // [kKeys][head_dim]; not used if the keys' own bytes are taken
  int32_t* sums;     // [kKeys] of each key's elements; 0 beyond the request's keys
  float* unit;       // of an element
  uint64_t* broken;  // bit k: key k is not finite, and so are its scores; its elements are 0
};
static_assert(kKeys <= 64);

class Int8Keys {
 public:
  // `storage`: int8_key_floats, 64-byte aligned.
  Int8Keys(const Problem& p, float* storage);

  int64_t tiles() const { return first_tile_.back(); }  // of all requests, of one KV head
  int64_t request_of(int64_t tile) const;               // of these
  int64_t first_tile(int64_t request) const { return first_tile_[request]; }

  // What is taken off the request's keys, [head_dim]; zeros if it is nothing.
  float* mean(int64_t request, int64_t kv_head) const {
    return means_ + (request * kv_heads_ + kv_head) * head_dim_;
  }
  // Key tile j of the request.
  Int8Tile tile(int64_t request, int64_t kv_head, int64_t j) const {
    const int64_t at = kv_head * tiles() + first_tile(request) + j;
    return {elements_ + at * kKeys * head_dim_, sums_ + at * kKeys, units_ + at, broken_ + at};
  }

 private:
  int64_t kv_heads_, head_dim_;
  std::vector<int64_t> first_tile_;  // [batch + 1]
  float *means_, *units_;
  int32_t* sums_;
  int8_t* elements_;
  uint64_t* broken_;
};

// Floats of all that, by the problem's scalars.
size_t int8_key_floats(const Problem& p);

}  // namespace blasst::cpu
