#include "cpu/int8/keys.h"

#include <algorithm>
#include <utility>

namespace blasst::cpu {

using problem::ceil_div;

namespace {

int64_t element_floats(const Problem& p) {
  return p.scores_take_bytes() ? 0 : kKeys * p.head_dim / 4;  // of a tile
}

}  // namespace

Int8Keys::Int8Keys(const Problem& p, float* storage)
    : kv_heads_(p.kv_heads), head_dim_(p.head_dim), first_tile_{0} {
  for (const problem::Request& r : p.requests)
    first_tile_.push_back(first_tile_.back() + ceil_div(r.keys, kKeys));
  const int64_t count = kv_heads_ * tiles();
  const auto take = [&](int64_t floats) { return std::exchange(storage, storage + floats); };
  elements_ = reinterpret_cast<int8_t*>(take(count * element_floats(p)));
  broken_ = reinterpret_cast<uint64_t*>(take(2 * count));
  sums_ = reinterpret_cast<int32_t*>(take(count * kKeys));
  means_ = take(p.batch * kv_heads_ * head_dim_);
  units_ = take(count);
}

int64_t Int8Keys::request_of(int64_t tile) const {
  return std::ranges::upper_bound(first_tile_, tile) - first_tile_.begin() - 1;
}

size_t int8_key_floats(const Problem& p) {
  const bool ragged = p.kv.layout == BLASST_LAYOUT_RAGGED;
  const int64_t tiles = ragged ? std::min(p.kv.tokens, p.kv.tokens / kKeys + p.batch)
                               : p.batch * ceil_div(problem::most_keys(p.given), kKeys);
  return p.kv_heads * (tiles * (element_floats(p) + 2 + kKeys + 1) + p.batch * p.head_dim);
}

}  // namespace blasst::cpu
