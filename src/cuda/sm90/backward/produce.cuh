// The warp that loads: what stays, then block by block what it meets.
#pragma once

#include "cuda/sm90/backward/work.cuh"
#include "cuda/sm90/core/ring.cuh"

namespace blasst::cuda::backward {

// Calls visit(i) for every i of the range whose bit `word` has, i % 32 of word(i / 32), in
// ascending order. All lanes of a warp together; each loads words.
template <typename Word, typename Visit>
__device__ __forceinline__ void for_bits(Range range, const Word& word, const Visit& visit) {
  for (int base = range.begin / 32; base * 32 < range.end; base += 32) {
    const int first = 32 * (base + static_cast<int>(threadIdx.x) % 32);
    unsigned mine = first < range.end ? word(first / 32) : 0;
    if (first < range.begin) mine &= range.begin - first < 32 ? ~0u << (range.begin - first) : 0;
    if (range.end - first < 32) mine &= range.end > first ? ~(~0u << (range.end - first)) : 0;
    for (unsigned any = __ballot_sync(kAllLanes, mine != 0); any; any &= any - 1) {
      const int lane = __ffs(any) - 1;
      for (unsigned bits = __shfl_sync(kAllLanes, mine, lane); bits; bits &= bits - 1)
        visit(32 * (base + lane) + __ffs(bits) - 1);
    }
  }
}

// What the copy engine is told of the tensors.
struct Maps {
  const CUtensorMap *q, *dout, *k, *v;
};

template <typename L>
class Producer {
  using First = typename L::First;
  using Second = typename L::Second;
  using FirstFixed = typename L::FirstFixed;
  using SecondFixed = typename L::SecondFixed;
  using Shared = typename L::Shared;

 public:
  __device__ Producer(const Params& b, Shared& s, const Maps& maps)
      : b_(b), p_(b.forward), s_(s), maps_(maps), w_(s.work), one_(threadIdx.x % 32 == 0) {}

  __device__ void run() {
    if (one_) load_fixed();
    if constexpr (L::kSide == Side::kKeys)
      pass_queries();
    else
      pass_keys();
    if (!one_) return;
    ptx::mbarrier_wait(address(s_.barriers.first_empty[first_.stage]), first_.phase ^ 1);
    s_.step[first_.stage].wanted = 0;
    ptx::mbarrier_arrive(address(s_.barriers.first_full[first_.stage]));
  }

 private:
  // In boxes of so many tokens.
  template <typename Block, int kBoxTokens>
  __device__ void copy(void* to, const CUtensorMap* map, uint64_t& barrier, int token, int head,
                       int outer) const {
#pragma unroll
    for (int panel = 0; panel < Block::kCount; ++panel) {
#pragma unroll
      for (int i = 0; i < Block::kPanelBytes / kPanelRowBytes; i += kBoxTokens)
        ptx::copy_box(ptx::shared_address(to) + panel * Block::kPanelBytes + i * kPanelRowBytes,
                      map, address(barrier), panel * kPanel, token + i, head, outer,
                      ptx::L2Hint::kNormal);
    }
  }
  // Rows of q or dout, from one of the request's on.
  template <typename Block>
  __device__ void copy_rows(void* to, const CUtensorMap* map, uint64_t& barrier, int row,
                            int head) const {
    copy<Block, L::kBoxRows>(to, map, barrier,
                             prefill::row_in_tensor(p_, w_.request, w_.spans.rows.first + row),
                             head, p_.cu_seqlens_q ? 0 : w_.request);
  }
  template <typename Block>
  __device__ void copy_keys(void* to, const CUtensorMap* map, uint64_t& barrier, int key) const {
    copy<Block, kBlock>(to, map, barrier, w_.spans.keys.first + key, w_.kv_head,
                        p_.keys.cu_seqlens ? 0 : w_.request);
  }

  __device__ void load_fixed() const {
    uint64_t& full = s_.barriers.fixed_full;
    ptx::mbarrier_arrive_expect(address(full),
                                L::kFixedBlocks * (FirstFixed::kBytes + SecondFixed::kBytes));
    for (int i = 0; i < L::kFixedBlocks; ++i) {
      if constexpr (L::kSide == Side::kKeys) {
        const int key = w_.tile * L::kTileKeys + i * kBlock;
        copy_keys<FirstFixed>(s_.first_fixed[i], maps_.k, full, key);
        copy_keys<SecondFixed>(s_.second_fixed[i], maps_.v, full, key);
      } else {
        const int row = (w_.tile + i) * kQueryTileRows;
        copy_rows<FirstFixed>(s_.first_fixed[i], maps_.q, full, row, w_.head);
        copy_rows<SecondFixed>(s_.second_fixed[i], maps_.dout, full, row, w_.head);
      }
    }
  }

  // The warpgroups of which some row may not see some key of the block, or some of it does not
  // exist, as bits.
  __device__ unsigned masked(const Step& step) const {
    constexpr bool kKeys = L::kSide == Side::kKeys;
    constexpr int kRows = kKeys ? L::kPassing : kBlock, kKeyCount = kKeys ? kBlock : L::kPassing;
    unsigned bits = 0;
    for (int wg = 0; wg < kWarpgroups; ++wg) {
      const int fixed = first_fixed<L>(w_, wg);
      const int row = kKeys ? step.first : fixed, key = kKeys ? fixed : step.first;
      const bool all_seen = step.count >= L::kPassing &&
                            step.least <= row - (key + kKeyCount - 1) &&
                            row + kRows - 1 - key <= step.most;
      bits |= unsigned{!all_seen} << wg;
    }
    return bits;
  }

  // For every block: room for its first operand, then for its second.
  template <typename CopyFirst, typename CopySecond>
  __device__ void pass(const Step& step, int first_bytes, const CopyFirst& copy_first,
                       const CopySecond& copy_second) {
    if (!one_) return;
    auto& b = s_.barriers;
    ptx::mbarrier_wait(address(b.first_empty[first_.stage]), first_.phase ^ 1);
    s_.step[first_.stage] = step;
    s_.step[first_.stage].wanted |= masked(step) << kWarpgroups;
    ptx::mbarrier_arrive_expect(address(b.first_full[first_.stage]), first_bytes);
    copy_first(s_.first[first_.stage], b.first_full[first_.stage]);
    first_.next();
    ptx::mbarrier_wait(address(b.second_empty[second_.stage]), second_.phase ^ 1);
    ptx::mbarrier_arrive_expect(address(b.second_full[second_.stage]), Second::kBytes);
    copy_second(s_.second[second_.stage], b.second_full[second_.stage]);
    second_.next();
  }

  // The query tiles that kept the key tile, head by head.
  __device__ void pass_queries() {
    const int first = w_.tile * L::kTileKeys;
    const int end = min(first + L::kTileKeys, w_.spans.keys.count);
    const int place = first_query_tile(p_, w_.request);
    // From the LSE of the first row to delta of the last.
    constexpr int kRowBytes = sizeof(float) * (kQueryTileRows + L::kPassing);
    const int key_place = prefill::first_key_tile(p_.keys, w_.request, L::kTileKeys) + w_.tile;
    for (int head = w_.head; head < w_.head + w_.heads; ++head) {
      const Distances distances = distances_of(p_, head);
      const unsigned* keepers =
          b_.keepers + (int64_t{head} * b_.key_tiles + key_place) * b_.keeper_words;
      const auto word = [&](int i) { return b_.tile_bits ? keepers[i] : ~0u; };
      for_bits(tiles_that_see(w_, distances, first, end), word, [&](int tile) {
#pragma unroll
        for (int i = 0; i < kQueryTileRows; i += L::kPassing) {
          const int row = tile * kQueryTileRows + i;
          if (i > 0 && row >= w_.spans.rows.count) break;
          const Step step = {.first = row + w_.spans.offset,
                             .count = w_.spans.rows.count - row,
                             .wanted = (1u << kWarpgroups) - 1,
                             .least = distances.least,
                             .most = distances.most};
          pass(
              step, First::kBytes + kRowBytes,
              [&](void* to, uint64_t& full) {
                copy_rows<First>(to, maps_.q, full, row, head);
                ptx::copy_bytes(ptx::shared_address(&s_.rows[first_.stage]),
                                b_.rows[int64_t{head} * b_.query_tiles + place + tile].lse + i,
                                kRowBytes, address(full));
              },
              [&](void* to, uint64_t& full) {
                copy_rows<Second>(to, maps_.dout, full, row, head);
              });
        }
      });
    }
  }

  // The keys that a query tile of the warpgroups' kept.
  __device__ void pass_keys() {
    const Distances distances = distances_of(p_, w_.head);
    const unsigned* bits = b_.tile_bits + (int64_t{w_.head} * b_.query_tiles +
                                           first_query_tile(p_, w_.request) + w_.tile) *
                                              b_.tile_words;
    Range seen[kWarpgroups], tiles = {1 << 30, 0};
    for (int wg = 0; wg < kWarpgroups; ++wg) {
      seen[wg] = keys_of_tile(w_, distances, w_.tile + wg);
      if (seen[wg].begin >= seen[wg].end) continue;
      tiles.begin = min(tiles.begin, seen[wg].begin / L::kTileKeys);
      tiles.end = max(tiles.end, ceil_div(seen[wg].end, L::kTileKeys));
    }
    // Of a warpgroup without rows there are none.
    const auto word_of = [&](int wg, int i) {
      if (seen[wg].begin >= seen[wg].end) return 0u;
      return b_.tile_bits ? bits[wg * b_.tile_words + i] : ~0u;
    };
    const auto word = [&](int i) { return word_of(0, i) | word_of(1, i); };
    for_bits(tiles, word, [&](int tile) {
      unsigned keep = 0;
      for (int wg = 0; wg < kWarpgroups; ++wg)
        keep |= (word_of(wg, tile / 32) >> tile % 32 & 1) << wg;
      for (int key = tile * L::kTileKeys; key < (tile + 1) * L::kTileKeys; key += kBlock) {
        unsigned wanted = 0;
        for (int wg = 0; wg < kWarpgroups; ++wg)
          wanted |= keep & unsigned{seen[wg].begin < key + kBlock && key < seen[wg].end} << wg;
        if (!wanted) continue;
        const Step step = {.first = key,
                           .count = w_.spans.keys.count - key,
                           .wanted = wanted,
                           .least = distances.least,
                           .most = distances.most};
        pass(
            step, First::kBytes,
            [&](void* to, uint64_t& full) { copy_keys<First>(to, maps_.k, full, key); },
            [&](void* to, uint64_t& full) { copy_keys<Second>(to, maps_.v, full, key); });
      }
    });
  }

  const Params& b_;
  const prefill::Params& p_;
  Shared& s_;
  const Maps& maps_;
  const Work& w_;
  const bool one_;  // the thread that starts copies
  Ring<L::kFirstStages> first_;
  Ring<L::kSecondStages> second_;
};

}  // namespace blasst::cuda::backward
