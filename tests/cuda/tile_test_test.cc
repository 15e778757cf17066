// The tile test's thresholds as the kernels take them. No GPU needed.
#include "cuda/core/tile_test.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace blasst::cuda {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(LogThreshold, IsTheLogarithmOfARelativeOne) {
  EXPECT_FLOAT_EQ(log_threshold(BLASST_TEST_RELATIVE, 0.25f, 100), std::log(0.25f));
  EXPECT_EQ(log_threshold(BLASST_TEST_RELATIVE, 1, 100), 0);
  EXPECT_EQ(log_threshold(BLASST_TEST_RELATIVE, 7, 100), 0);  // as 1
  EXPECT_EQ(log_threshold(BLASST_TEST_RELATIVE, 0, 100), -kInf);
  EXPECT_FLOAT_EQ(log_threshold(BLASST_TEST_SCALE_FACTOR, 25, 100), std::log(0.25f));
  EXPECT_EQ(log_threshold(BLASST_TEST_SCALE_FACTOR, 200, 100), 0);
}

TEST(LogThreshold, IsAnAbsoluteOneAsItIs) {
  for (const float value : {-70.0f, 0.0f, 3.5f, kInf, -kInf})
    EXPECT_EQ(log_threshold(BLASST_TEST_ABSOLUTE, value, 100), value);
}

TEST(LogThreshold, OfNoThresholdSkipsNothing) {
  for (const int test : {BLASST_TEST_RELATIVE, BLASST_TEST_SCALE_FACTOR}) {
    for (const float value : {kNan, -kNan, -0.5f, -kInf})
      EXPECT_EQ(log_threshold(test, value, 100), -kInf) << test << ' ' << value;
  }
  EXPECT_EQ(log_threshold(BLASST_TEST_ABSOLUTE, kNan, 100), -kInf);
  EXPECT_EQ(log_threshold(BLASST_TEST_NONE, 0.5f, 100), -kInf);
}

}  // namespace
}  // namespace blasst::cuda
