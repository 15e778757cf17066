// The tile test as the kernels take it. No GPU needed.
#include "cuda/core/tile_test.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "cuda/core/tiles.h"
#include "problem/tiles.h"

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

TEST(SkipBelow, OfARelativeTestFollowsTheRunningMaximum) {
  EXPECT_EQ(skip_below(BLASST_TEST_RELATIVE, -3, 10), 7);
  EXPECT_EQ(skip_below(BLASST_TEST_ABSOLUTE, -3, 10), -3);
}

TEST(SkipBelow, OnlyATileWithoutScoresIsSkippedFirst) {
  for (const int test : {BLASST_TEST_RELATIVE, BLASST_TEST_ABSOLUTE}) {
    for (const float threshold : {-kInf, -3.0f, 0.0f, kInf}) {
      const float below = skip_below(test, threshold, -kInf);
      EXPECT_TRUE(-kInf < below) << test << ' ' << threshold;
      EXPECT_FALSE(std::numeric_limits<float>::lowest() < below) << test << ' ' << threshold;
    }
    // And a threshold that is none skips nothing that has a score.
    EXPECT_FALSE(std::numeric_limits<float>::lowest() < skip_below(test, -kInf, 10));
  }
}

TEST(GapBin, IsTheReferences) {
  for (const double gap : {-1000.0, -32.1, -32.0, -31.99, -5.3, -0.07, -0.0, 0.0, 3.0})
    EXPECT_EQ(gap_bin(static_cast<float>(gap)), problem::gap_bin(static_cast<float>(gap))) << gap;
  EXPECT_EQ(gap_bin(kInf), BLASST_GAP_BINS - 1);
  EXPECT_EQ(gap_bin(kNan), BLASST_GAP_BINS - 1);
}

}  // namespace
}  // namespace blasst::cuda
