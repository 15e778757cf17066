#include "cpu/processors.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <climits>
#include <fstream>
#include <string>

#include "blasst/blasst.hpp"

namespace blasst::cpu {
namespace {

namespace fs = std::filesystem;

// A file system with what the kernel says of control groups.
class Quota : public testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::path(testing::TempDir()) /
            (std::string("quota_") + testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(root_);
  }
  void TearDown() override { fs::remove_all(root_); }

  void write(const std::string& path, const std::string& text) {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text;
  }

  int processors() { return quota_processors(root_); }

  fs::path root_;
};

constexpr const char* kMounts2 =
    "22 1 0:21 / /proc rw,nosuid - proc proc rw\n"
    "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";

TEST_F(Quota, NoneWithoutControlGroups) { EXPECT_EQ(processors(), INT_MAX); }

TEST_F(Quota, Version2RoundsUp) {
  write("proc/self/mountinfo", kMounts2);
  write("proc/self/cgroup", "0::/service/job\n");
  write("sys/fs/cgroup/service/job/cpu.max", "max 100000\n");
  EXPECT_EQ(processors(), INT_MAX);
  write("sys/fs/cgroup/service/job/cpu.max", "250000 100000\n");
  EXPECT_EQ(processors(), 3);
  write("sys/fs/cgroup/service/job/cpu.max", "20000 100000\n");
  EXPECT_EQ(processors(), 1);
}

TEST_F(Quota, TheTightestGroupOnTheWayUpCounts) {
  write("proc/self/mountinfo", kMounts2);
  write("proc/self/cgroup", "0::/service/job\n");
  write("sys/fs/cgroup/service/job/cpu.max", "800000 100000\n");
  write("sys/fs/cgroup/service/cpu.max", "200000 100000\n");
  write("sys/fs/cgroup/other/cpu.max", "100000 100000\n");
  EXPECT_EQ(processors(), 2);
}

TEST_F(Quota, AContainerSeesItsOwnGroupAtTheMount) {
  write("proc/self/mountinfo", kMounts2);
  write("proc/self/cgroup", "0::/\n");
  write("sys/fs/cgroup/cpu.max", "400000 100000\n");
  EXPECT_EQ(processors(), 4);
}

TEST_F(Quota, Version1) {
  write("proc/self/mountinfo",
        "31 23 0:28 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n"
        "32 31 0:29 /docker/1 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "33 31 0:30 /docker/1 /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n");
  write("proc/self/cgroup", "3:cpuset:/elsewhere\n2:cpu,cpuacct:/docker/1\n0::/\n");
  write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n");
  write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(processors(), INT_MAX);
  write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "150000\n");
  EXPECT_EQ(processors(), 2);
}

TEST(Threads, ByDefaultNoMoreThanTheProcessorsOfTheProcess) {
  cpu_set_t before, one;
  ASSERT_EQ(sched_getaffinity(0, sizeof before, &before), 0);
  EXPECT_GE(default_threads(), 1);
  EXPECT_LE(default_threads(), CPU_COUNT(&before));
  CPU_ZERO(&one);
  for (int cpu = 0; CPU_COUNT(&one) == 0; ++cpu) {
    if (CPU_ISSET(cpu, &before)) CPU_SET(cpu, &one);
  }
  ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
  EXPECT_EQ(blasst::default_threads(), 1);
  EXPECT_EQ(threads_of(0), 1);
  EXPECT_EQ(threads_of(3), 3);
  ASSERT_EQ(sched_setaffinity(0, sizeof before, &before), 0);
}

}  // namespace
}  // namespace blasst::cpu
