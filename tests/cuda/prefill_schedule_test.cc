// What the prefill kernel works on and in which order. No GPU needed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "cuda/core/prefill/order.h"
#include "cuda/core/tensor.h"
#include "cuda/core/tiles.h"
#include "problem/tiles.h"

namespace blasst::cuda::prefill {
namespace {

TEST(PrefillSchedule, EveryBlockOnce) {
  for (const int batch : {1, 3}) {
    for (const int heads : {1, 6, 64}) {
      for (const int row_blocks : {1, 2, 17}) {
        for (const int width : {1, 2, 6, 1000}) {
          const int section = std::min(width, batch * heads);
          std::set<std::tuple<int, int, int>> seen;
          for (int i = 0; i < batch * heads * row_blocks; ++i) {
            const Item item = item_at(i, batch, heads, row_blocks, section);
            EXPECT_TRUE(item.request >= 0 && item.request < batch);
            EXPECT_TRUE(item.head >= 0 && item.head < heads);
            EXPECT_TRUE(item.block >= 0 && item.block < row_blocks);
            seen.emplace(item.request, item.head, item.block);
          }
          EXPECT_EQ(seen.size(), static_cast<size_t>(batch * heads * row_blocks));
        }
      }
    }
  }
}

// Requests of any number of rows, some of none: every block once, no item without rows.
TEST(PrefillSchedule, EveryBlockOfAListOnce) {
  constexpr int kRows = 128;
  for (const std::vector<int>& rows :
       {std::vector<int>{1000}, {0, 0, 300}, {128, 1, 0, 0, 4000, 129, 0}, {64, 64, 64}, {0, 1}}) {
    const auto batch = static_cast<int>(rows.size());
    std::vector<int> first = {0};
    int all = 0, most = 0;
    for (const int count : rows) {
      first.push_back(first.back() + (count + kRows - 1) / kRows);
      all += count, most = std::max(most, count);
    }
    EXPECT_LE(first.back(), most_blocks(all, batch, all, kRows));
    EXPECT_LE(first.back(), most_blocks(all, batch, most, kRows));
    for (const int heads : {1, 6}) {
      for (const int section : {1, 2, 4, 6}) {
        if (section > heads) continue;
        std::set<std::tuple<int, int, int>> seen;
        for (int i = 0; i < heads * first.back(); ++i) {
          const Item item = item_of_list(i, first.data(), batch, heads, section);
          ASSERT_TRUE(item.request >= 0 && item.request < batch);
          EXPECT_TRUE(item.head >= 0 && item.head < heads);
          EXPECT_TRUE(item.block >= 0 && item.block * kRows < rows[item.request]);
          seen.emplace(item.request, item.head, item.block);
        }
        EXPECT_EQ(seen.size(), static_cast<size_t>(heads * first.back()));
      }
    }
  }
}

TEST(PrefillSchedule, MostBlocks) {
  EXPECT_EQ(most_blocks(4096, 4, 1024, 128), 32);      // as dense
  EXPECT_EQ(most_blocks(65536, 64, 65536, 128), 576);  // lengths not known: one more a request
  EXPECT_EQ(most_blocks(0, 3, 0, 128), 0);
}

TEST(PrefillSchedule, LongestFirstAndOneKvHeadSideBySide) {
  const int heads = 64, row_blocks = 128, section = 16;  // 16 heads of one KV head
  for (int i = 1; i < heads * row_blocks; ++i) {
    const Item before = item_at(i - 1, 1, heads, row_blocks, section);
    const Item item = item_at(i, 1, heads, row_blocks, section);
    const bool same_section = before.head / section == item.head / section;
    if (same_section)
      EXPECT_LE(item.block, before.block);
    else
      EXPECT_EQ(i % (section * row_blocks), 0);
  }
}

TEST(PrefillSchedule, SectionsAreWholeKvHeadsThatFit) {
  constexpr int64_t l2 = int64_t{32} << 20;
  EXPECT_EQ(section_heads(65536, 256, 1, 64, 4, l2), 16);  // one KV head fills it
  EXPECT_EQ(section_heads(16384, 256, 1, 64, 4, l2), 64);  // all four fit
  EXPECT_EQ(section_heads(32768, 256, 1, 32, 8, l2), 8);   // two KV heads of four heads
  EXPECT_EQ(section_heads(1 << 20, 256, 2, 8, 8, l2), 1);  // not even one fits
  EXPECT_EQ(section_heads(0, 128, 3, 8, 2, l2), 24);       // never more than there are
}

TEST(PrefillSchedule, VisitsLikeTheReference) {
  for (const Order order : {BLASST_FORWARD, BLASST_REVERSE, BLASST_SINK_FIRST}) {
    for (int begin = 0; begin < 3; ++begin) {
      for (int end = begin + 1; end < begin + 6; ++end) {
        for (int i = 0; i < end - begin; ++i)
          EXPECT_EQ(tile_at(order, {begin, end}, i), problem::nth_tile(order, {begin, end}, i));
      }
    }
  }
}

TEST(PrefillSchedule, SeesLikeTheReference) {
  for (const auto& [least, most] : {std::pair{0, kUnlimited}, std::pair{-kUnlimited, kUnlimited},
                                    std::pair{0, 5}, std::pair{-3, 4}, std::pair{2, 9}}) {
    for (int position = -4; position < 20; ++position) {
      const problem::Range wanted = problem::visible_keys({least, most}, position, 12);
      const Range keys = keys_seen(position, position, {least, most}, 12);
      EXPECT_EQ(keys.begin >= keys.end, wanted.empty());
      if (wanted.empty()) continue;
      EXPECT_EQ(keys.begin, wanted.begin);
      EXPECT_EQ(keys.end, wanted.end);
    }
  }
}

}  // namespace
}  // namespace blasst::cuda::prefill
