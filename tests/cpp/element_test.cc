#include "testing/element.h"

#include <gtest/gtest.h>

namespace blasst::check {
namespace {

float stored(DType dtype, uint16_t bits) {
  return static_cast<float>(load_element(dtype, reinterpret_cast<const std::byte*>(&bits)));
}

TEST(Element, EveryHalfAndBfloat16SurvivesARoundTrip) {
  for (int bits = 0; bits < 0x10000; ++bits) {
    const auto pattern = static_cast<uint16_t>(bits);
    const float half = stored(BLASST_FLOAT16, pattern);
    const float brain = stored(BLASST_BFLOAT16, pattern);
    EXPECT_TRUE(std::isnan(half) || half_bits(half) == pattern) << bits;
    EXPECT_TRUE(std::isnan(brain) || bfloat16_bits(brain) == pattern) << bits;
  }
}

TEST(Element, RoundsToNearestEven) {
  // 1 and its neighbour above, in units of the last place.
  EXPECT_EQ(half_bits(1 + 0x1p-11f), half_bits(1));
  EXPECT_EQ(half_bits(1 + 0x1p-11f + 0x1p-20f), half_bits(1) + 1);
  EXPECT_EQ(half_bits(1 + 3 * 0x1p-11f), half_bits(1) + 2);
  EXPECT_EQ(bfloat16_bits(1 + 0x1p-8f), bfloat16_bits(1));
  EXPECT_EQ(bfloat16_bits(1 + 0x1p-8f + 0x1p-20f), bfloat16_bits(1) + 1);
  EXPECT_EQ(bfloat16_bits(1 + 3 * 0x1p-8f), bfloat16_bits(1) + 2);
}

TEST(Element, HalfLimits) {
  EXPECT_EQ(half_bits(65504), 0x7bff);
  EXPECT_EQ(half_bits(65519), 0x7bff);
  EXPECT_EQ(half_bits(65520), 0x7c00) << "infinity";
  EXPECT_EQ(half_bits(-1e9f), 0xfc00);
  EXPECT_EQ(half_bits(0x1p-24f), 1) << "smallest";
  EXPECT_EQ(half_bits(0x1p-26f), 0);
  EXPECT_EQ(half_bits(0x1p-14f - 0x1p-26f), 0x0400) << "rounds up to the smallest normal";
}

}  // namespace
}  // namespace blasst::check
