// Whether a machine is fit, and checks that both phases share with nothing else. No GPU needed.
#include <gtest/gtest.h>

#include <string>

#include "cuda/backend.h"
#include "cuda/pages.h"
#include "cuda/usable.h"
#include "plan_cases.h"
#include "problem/text.h"

namespace blasst::cuda {
namespace {

constexpr int kCodes[] = {80, 90};

Machine hopper() {
  Machine m;
  m.runtime = m.driver = 13000;
  m.devices = 1;
  m.major = 9;
  return m;
}

TEST(Usable, SaysWhatIsMissing) {
  EXPECT_EQ(obstacle(hopper(), kSm90, kCodes), "");
  EXPECT_EQ(obstacle(hopper(), kSm80, kCodes), "");
  Machine m = hopper();
  m.driver = 13020;
  EXPECT_EQ(obstacle(m, kSm90, kCodes), "");
  m.driver = 12040;
  EXPECT_EQ(obstacle(m, kSm90, kCodes),
            "the driver does CUDA 12.4; this build needs a driver of CUDA 13");
  m.driver = 0;
  EXPECT_EQ(obstacle(m, kSm90, kCodes), "no NVIDIA driver");
  m = hopper();
  m.devices = 0;
  EXPECT_EQ(obstacle(m, kSm90, kCodes), "no GPU");
  m.error = "unknown error";
  EXPECT_EQ(obstacle(m, kSm90, kCodes), "unknown error");
  for (const auto& [major, minor] : {std::pair{8, 0}, {9, 1}, {10, 0}, {12, 1}}) {
    m = hopper();
    m.device = 2, m.major = major, m.minor = minor;
    EXPECT_EQ(obstacle(m, kSm90, kCodes),
              formatted("device 2 has compute capability {}.{}; the kernels are for "
                        "9.0",
                        major, minor));
  }
}

TEST(Usable, PortableKernelsNeedEightPointZero) {
  Machine m = hopper();
  for (const auto& [major, minor] : {std::pair{8, 0}, {8, 9}, {9, 0}, {10, 3}, {12, 0}}) {
    m.major = major, m.minor = minor;
    EXPECT_EQ(obstacle(m, kSm80, kCodes), "");
  }
  m.major = 7, m.minor = 5;
  EXPECT_EQ(obstacle(m, kSm80, kCodes),
            "device 0 has compute capability 7.5; the kernels are for 8.0 and later");
}

// PTX of a toolkit is compiled by drivers that are not older.
TEST(Usable, AnOlderDriverNeedsMachineCode) {
  Machine m = hopper();
  m.runtime = 13010;
  EXPECT_EQ(obstacle(m, kSm80, kCodes), "");
  m.major = 8, m.minor = 9;
  EXPECT_EQ(obstacle(m, kSm80, kCodes), "");
  m.major = 12, m.minor = 0;
  EXPECT_EQ(
      obstacle(m, kSm80, kCodes),
      "the driver does CUDA 13.0; for compute capability 12.0 this build has PTX alone, which "
      "needs a driver of CUDA 13.1");
  constexpr int kAll[] = {80, 86, 90, 100, 120};
  EXPECT_EQ(obstacle(m, kSm80, kAll), "");
  m.driver = 13010;
  EXPECT_EQ(obstacle(m, kSm80, kCodes), "");
  constexpr int kNewer[] = {86, 90};  // of its generation, but not for it
  m = hopper();
  m.runtime = 13010, m.major = 8;
  EXPECT_NE(obstacle(m, kSm80, kNewer), "");
}

template <typename Call>
std::string refusal(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "accepted";
}

TEST(PageCheck, IsOfPages) {
  blasst_problem problem = paged_call(dense_call(1)).problem;
  KeysValues& kv = problem.kv;
  int32_t found[4];
  const auto plan = [&] { return plan_page_check(problem, found, nullptr); };
  EXPECT_EQ(plan().room, 960);
  kv.key_length = 100;
  EXPECT_EQ(plan().room, 100);
  EXPECT_NE(refusal([&] { plan_page_check(problem, nullptr, nullptr); }).find("found is null"),
            std::string::npos);
  kv.lengths = nullptr;
  EXPECT_NE(refusal(plan).find("kv.lengths is null"), std::string::npos);
  kv.page_table = nullptr;
  EXPECT_NE(refusal(plan).find("kv.page_table is null"), std::string::npos);
}

TEST(Merge, SaysWhatItDoesNotDo) {
  MergeParams p{.batch = 3,
                .query_length = 100,
                .heads = kHeads,
                .value_dim = kDim,
                .execution = {.backend = BLASST_BACKEND_CUDA}};
  p.out_a = p.out_b = p.out = dense_call(100).problem.out;
  p.lse_a = p.lse_b = array<float>(0x60000000);
  MergeParams bad = p;
  bad.out_a.dtype = bad.out_b.dtype = bad.out.dtype = BLASST_FLOAT32;
  EXPECT_NE(refusal([&] { merge(bad); }).find("float32"), std::string::npos);
  bad = p;
  bad.execution.threads = 2;
  EXPECT_NE(refusal([&] { merge(bad); }).find("threads is 2"), std::string::npos);
  bad = p;
  bad.out_b.stride_token += 4;
  bad.out_b.elements *= 2;
  bad.out_b.data = device(0x90000000);
  EXPECT_NE(refusal([&] { merge(bad); }).find("out_b.stride_token"), std::string::npos);
}

}  // namespace
}  // namespace blasst::cuda
