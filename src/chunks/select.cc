// Choosing the key tiles of each query tile from the chunks' representations.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "chunks/chunks.h"
#include "chunks/rows.h"
#include "cpu/isa.h"
#include "cpu/plan.h"
#include "cpu/thread_pool.h"
#include "problem/float_environment.h"

namespace blasst::chunks {
namespace {

using problem::ceil_div;
using problem::check_range;
using problem::fail;
using problem::Range;

// One query tile's choice.
class Choice {
 public:
  // `last`: position of the tile's last row; `own`: key tiles of its rows.
  Choice(const ChunkView& chunks, int64_t last, Range own, int64_t budget_tiles, uint8_t* visit)
      : chunks_(chunks), key_tiles_(own.end), left_(budget_tiles), visit_(visit) {
    take({0, 1});
    take(own);
    const auto after = std::ranges::upper_bound(chunks.starts, last);
    local_ = after - chunks.starts.begin() - 1;
    try_chunk(local_);
  }

  int64_t candidates() const { return local_; }  // the chunks before the local one

  void take_best(const std::vector<float>& scores) {
    std::vector<int64_t> order(candidates());
    std::iota(order.begin(), order.end(), 0);
    std::ranges::stable_sort(order, [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
    for (const int64_t chunk : order) {
      if (left_ <= 0) return;
      try_chunk(chunk);
    }
  }

 private:
  void try_chunk(int64_t chunk) {
    const Range tiles{chunks_.starts[chunk] / cpu::kKeys,
                      std::min(key_tiles_, ceil_div(chunk_end(chunks_, chunk), cpu::kKeys))};
    int64_t more = 0;
    for (int64_t j = tiles.begin; j < tiles.end; ++j) more += visit_[j] == 0;
    if (more <= left_) take(tiles);
  }

  void take(Range tiles) {
    for (int64_t j = tiles.begin; j < tiles.end; ++j) {
      left_ -= visit_[j] == 0;
      visit_[j] = 1;
    }
  }

  const ChunkView& chunks_;
  const int64_t key_tiles_;
  int64_t left_;  // tiles that may still be chosen
  int64_t local_ = 0;
  uint8_t* visit_;
};

int64_t budget_tiles(ChunkBudget budget, int64_t visible) {
  const auto keys =
      budget.keys > 0
          ? budget.keys
          : static_cast<int64_t>(std::ceil(budget.share * static_cast<double>(visible)));
  return ceil_div(keys, cpu::kKeys);
}

}  // namespace

void check_chunks(const ChunkView& chunks, int64_t kv_heads, int64_t head_dim) {
  const auto starts = chunks.starts;
  check_range("keys of the chunks", chunks.keys, 0, problem::kMaxCount);
  if (starts.empty() != (chunks.keys == 0))
    fail("{} chunks are given for {} keys; they must cover the sequence", starts.size(),
         chunks.keys);
  for (size_t i = 0; i < starts.size(); ++i) {
    if (i == 0 ? starts[i] != 0 : starts[i] <= starts[i - 1])
      fail("chunk {} begins at {}; chunks must cover the sequence: from 0, and rising", i,
           starts[i]);
  }
  if (!starts.empty() && starts.back() >= chunks.keys)
    fail("the last chunk begins at {}, but there are {} keys; chunks must cover the sequence",
         starts.back(), chunks.keys);
  const auto size = static_cast<int64_t>(starts.size()) * kv_heads * head_dim;
  if (std::ssize(chunks.sums) != size)
    fail("the chunks' sums have {} elements; {} chunks of {} KV heads of {} need {}",
         chunks.sums.size(), starts.size(), kv_heads, head_dim, size);
}

void select(ChunkView chunks, int64_t kv_heads, const HeadRows& queries, bool decode,
            ChunkBudget budget, uint8_t* blocks, int threads) {
  const problem::DefaultFloatEnvironment environment;
  threads = checked_threads(threads);
  check_rows("queries", queries);
  check_range("kv_heads", kv_heads, 1, queries.heads);
  if (queries.heads % kv_heads != 0)
    fail("{} heads of queries and {} KV heads; the first must be a multiple", queries.heads,
         kv_heads);
  check_chunks(chunks, kv_heads, queries.head_dim);
  check_range("rows of queries", queries.rows, 1, std::max<int64_t>(chunks.keys, 1));
  if (chunks.keys == 0) fail("there are no keys to choose from");
  if (!blocks) fail("blocks is null; the choice is written there");
  if (budget.keys != 0 && budget.share != 0)
    fail("the budget is {} keys and a share of {}; one of them must be 0", budget.keys,
         budget.share);
  if (budget.keys == 0 && !(budget.share > 0 && budget.share <= 1))
    fail("the budget is a share of {}; it must be above 0 and at most 1", budget.share);
  if (budget.keys != 0) check_range("budget of keys", budget.keys, 1, chunks.keys);

  const cpu::ChunkKernels& kernels = cpu::kernels(queries.dtype).chunks;
  const int64_t dim = queries.head_dim, group = queries.heads / kv_heads;
  const int64_t tile_rows = decode ? queries.rows : cpu::kQueryRows;
  const int64_t query_tiles = ceil_div(queries.rows, tile_rows);
  const int64_t key_tiles = ceil_div(chunks.keys, cpu::kKeys);
  const int64_t heads = decode ? kv_heads : queries.heads;
  const auto count = std::ssize(chunks.starts);
  std::vector<float> shrink(count);  // 1 / sqrt(length)
  for (int64_t c = 0; c < count; ++c)
    shrink[c] = 1 / std::sqrt(static_cast<float>(chunk_end(chunks, c) - chunks.starts[c]));

  cpu::parallel_for(heads * query_tiles, threads, [&](int64_t i, int) {
    // Late query tiles have most to do.
    const int64_t head = i % heads, tile = query_tiles - 1 - i / heads;
    const int64_t kv_head = decode ? head : head / group;
    const int64_t first = tile * tile_rows, end = std::min(queries.rows, first + tile_rows);
    const int64_t offset = chunks.keys - queries.rows;  // position of row 0
    uint8_t* visit = blocks + (head * query_tiles + tile) * key_tiles;
    std::fill_n(visit, key_tiles, uint8_t{0});
    const Range own{(offset + first) / cpu::kKeys, (offset + end - 1) / cpu::kKeys + 1};
    Choice choice(chunks, offset + end - 1, own, budget_tiles(budget, offset + end), visit);
    const int64_t candidates = choice.candidates();
    if (candidates == 0) return;

    const float* keys = chunks.sums.data() + kv_head * dim;
    std::vector<float> scores(candidates), of_row(candidates);
    float row[256], sum[256] = {};
    if (decode) {
      std::ranges::fill(scores, -std::numeric_limits<float>::infinity());
      for (int64_t r = 0; r < queries.rows; ++r) {
        for (int64_t h = head * group; h < (head + 1) * group; ++h) {
          kernels.widen(row_of(queries, r, h), dim, row);
          kernels.dots(row, keys, kv_heads * dim, candidates, dim, of_row.data());
          for (int64_t c = 0; c < candidates; ++c) scores[c] = std::max(scores[c], of_row[c]);
        }
      }
      for (int64_t c = 0; c < candidates; ++c) scores[c] *= shrink[c];
    } else {
      for (int64_t r = first; r < end; ++r) {
        kernels.widen(row_of(queries, r, head), dim, row);
        kernels.add(row, dim, sum);
      }
      kernels.dots(sum, keys, kv_heads * dim, candidates, dim, scores.data());
      for (int64_t c = 0; c < candidates; ++c) scores[c] *= shrink[c];
    }
    choice.take_best(scores);
  });
}

}  // namespace blasst::chunks
