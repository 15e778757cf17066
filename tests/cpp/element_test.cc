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

TEST(Element, EveryNumberOf8BitsSurvivesARoundTrip) {
  for (const DType dtype : {BLASST_INT8, BLASST_FLOAT8_E4M3}) {
    for (int bits = 0; bits < 256; ++bits) {
      const auto pattern = static_cast<std::byte>(bits);
      const double value = load_element(dtype, &pattern);
      std::byte again;
      store_element(dtype, &again, static_cast<float>(value));
      EXPECT_TRUE(std::isnan(value) || again == pattern) << dtype << " " << bits;
      // Both exact in every type of queries.
      for (const DType wide : {BLASST_FLOAT16, BLASST_BFLOAT16})
        EXPECT_TRUE(std::isnan(value) || rounded(wide, static_cast<float>(value)) == value);
    }
  }
}

TEST(Element, Float8Limits) {
  const auto value = [](uint8_t bits) { return problem::load_e4m3(bits); };
  EXPECT_EQ(value(0x01), 0x1p-9) << "smallest";
  EXPECT_EQ(value(0x08), 0x1p-6) << "smallest normal";
  EXPECT_EQ(value(0x38), 1);
  EXPECT_EQ(value(0xb9), -1.125);
  EXPECT_EQ(value(0x7e), 448) << "largest";
  EXPECT_TRUE(std::isnan(value(0x7f)) && std::isnan(value(0xff)));
  EXPECT_EQ(problem::e4m3_bits(1.0625f), 0x38) << "to even";
  EXPECT_EQ(problem::e4m3_bits(1.1875f), 0x3a);
  EXPECT_EQ(problem::e4m3_bits(-1e9f), 0xfe);
  EXPECT_EQ(problem::e4m3_bits(0x1p-6f - 0x1p-12f), 0x08) << "rounds up to the smallest normal";
  EXPECT_TRUE(std::isnan(value(problem::e4m3_bits(NAN))));
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
