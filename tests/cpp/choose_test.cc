// The choice among backends: the first that can work in the memory and takes the call, or every
// one's reason.
#include "api/choose.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace blasst::api {
namespace {

// Takes calls of float32, or all but those.
class Made : public Backend {
 public:
  Made(blasst_backend id, std::string name, bool takes_float32)
      : id_(id), name_(std::move(name)), takes_float32_(takes_float32) {}

  blasst_backend id() const override { return id_; }
  BackendInfo info() const override { return {id_, name_, "made up", true, ""}; }
  std::string obstacle(Memory memory) const override {
    return (id_ != BLASST_BACKEND_CPU ? memory.gpu : memory.host) ? "" : "not its memory";
  }
  Plan plan(const AttentionParams& params, problem::Phase) const override {
    if (params.problem.heads < 0) throw Error(BLASST_INVALID_ARGUMENT, "heads is negative");
    if ((params.problem.q.dtype == BLASST_FLOAT32) != takes_float32_)
      throw Error(BLASST_UNSUPPORTED, name_ + ": not its type");
    return {.backend = id_, .query_tiles = takes_float32_ ? 1 : 2};
  }
  Plan plan(const BackwardParams&) const override { return {}; }
  void run(const AttentionParams&, problem::Phase) const override {}
  void run(const BackwardParams&) const override {}
  void merge(const MergeParams&) const override {}

 private:
  blasst_backend id_;
  std::string name_;
  bool takes_float32_;
};

const Made kFirst(BLASST_BACKEND_CUDA, "new", false), kSecond(BLASST_BACKEND_CUDA, "old", true),
    kLast(BLASST_BACKEND_CPU, "cpu", true);
const std::vector<const Backend*> kAll = {&kFirst, &kSecond, &kLast};
constexpr Memory kGpu{.host = false, .gpu = true}, kManaged{.host = true, .gpu = true};

// Which of them, by its plan's query tiles and name; or the error.
std::string chosen(blasst_backend wanted, Memory memory, DType dtype,
                   const std::vector<const Backend*>& among = kAll) {
  std::string name;
  const AttentionParams params{.problem = {.q = {.dtype = dtype}}};
  try {
    choose(among, wanted, memory, [&](const Backend& backend) {
      backend.plan(params, problem::Phase::kPrefill);
      name = backend.info().name;
    });
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), BLASST_UNSUPPORTED);
    return error.what();
  }
  return name;
}

TEST(Choose, TheFirstThatCanAndTakesTheCall) {
  EXPECT_EQ(chosen(BLASST_BACKEND_AUTO, kGpu, BLASST_FLOAT16), "new");
  EXPECT_EQ(chosen(BLASST_BACKEND_AUTO, kGpu, BLASST_FLOAT32), "old");
  EXPECT_EQ(chosen(BLASST_BACKEND_AUTO, {}, BLASST_FLOAT32), "cpu");
  EXPECT_EQ(chosen(BLASST_BACKEND_AUTO, kManaged, BLASST_FLOAT16), "new");
}

TEST(Choose, AnArchitectureOfTheOneThatIsNamed) {
  EXPECT_EQ(chosen(BLASST_BACKEND_CUDA, {}, BLASST_FLOAT32), "old");
  EXPECT_EQ(chosen(BLASST_BACKEND_CPU, kGpu, BLASST_FLOAT32), "cpu") << "where it is named";
}

TEST(Choose, CudaMeansTheFirstOfItsBackendsThatRunsHere) {
  class Elsewhere : public Made {
   public:
    using Made::Made;
    std::string obstacle(Memory) const override { return "another device"; }
  };
  const Elsewhere elsewhere(BLASST_BACKEND_CUDA_SM90, "sm90", true);
  const Made sm90(BLASST_BACKEND_CUDA_SM90, "sm90", true),
      sm80(BLASST_BACKEND_CUDA_SM80, "sm80", true);
  EXPECT_EQ(chosen(BLASST_BACKEND_CUDA, kGpu, BLASST_FLOAT32, {&sm90, &sm80}), "sm90");
  EXPECT_EQ(chosen(BLASST_BACKEND_CUDA, kGpu, BLASST_FLOAT32, {&elsewhere, &sm80}), "sm80");
  EXPECT_EQ(chosen(BLASST_BACKEND_CUDA, kGpu, BLASST_FLOAT32, {&elsewhere, &kLast}), "sm90")
      << "plans without a device";
  EXPECT_EQ(chosen(BLASST_BACKEND_CUDA_SM80, kGpu, BLASST_FLOAT32, {&sm90, &sm80}), "sm80");
}

TEST(Choose, TheEnvironmentNamesABackendOfGpus) {
  EXPECT_EQ(cuda_backend_named(nullptr), BLASST_BACKEND_CUDA);
  EXPECT_EQ(cuda_backend_named(""), BLASST_BACKEND_CUDA);
  EXPECT_EQ(cuda_backend_named("cuda-sm90"), BLASST_BACKEND_CUDA_SM90);
  EXPECT_EQ(cuda_backend_named("cuda-sm80"), BLASST_BACKEND_CUDA_SM80);
  EXPECT_THROW(cuda_backend_named("sm80"), Error);
}

TEST(Choose, SaysWhyNoneTakesIt) {
  EXPECT_EQ(chosen(BLASST_BACKEND_AUTO, {}, BLASST_FLOAT16),
            "no backend takes this call: new: not its memory; old: not its memory; "
            "cpu: not its type");
  EXPECT_EQ(chosen(BLASST_BACKEND_CPU, {}, BLASST_FLOAT16), "cpu: not its type");
  EXPECT_EQ(chosen(BLASST_BACKEND_CUDA, kGpu, BLASST_FLOAT16, {&kLast}),
            "backend cuda (2) is not in this build; it has: cpu (1)");
}

TEST(Choose, ABadCallIsNobodys) {
  const AttentionParams bad{.problem = {.heads = -1}};
  int asked = 0;
  EXPECT_THROW(choose(kAll, BLASST_BACKEND_AUTO, kManaged,
                      [&](const Backend& backend) {
                        ++asked;
                        backend.plan(bad, problem::Phase::kPrefill);
                      }),
               Error);
  EXPECT_EQ(asked, 1);
}

TEST(Choose, TheCpuIsTheLastOfThisBuild) {
  ASSERT_FALSE(backends().empty());
  EXPECT_EQ(backends().back()->id(), BLASST_BACKEND_CPU);
  EXPECT_TRUE(memory_of(nullptr).host);
  const int on_stack = 0;
  EXPECT_TRUE(memory_of(&on_stack).host);
  EXPECT_FALSE(memory_of(&on_stack).gpu);
}

}  // namespace
}  // namespace blasst::api
