// Backward on a GPU, through the library: against the reference, the CPU and itself.
#include "testing/backward.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "on_gpu.h"
#include "testing/compare.h"
#include "testing/device.h"
#include "testing/element.h"

namespace blasst::check {
namespace {

class BackwardOnGpu : public OnGpu {
 protected:
  void SetUp() override {
    OnGpu::SetUp();
    if (!IsSkipped() && !gpu_kernels().backward) GTEST_SKIP() << "no backward";
  }
};

// A forward that has run on the GPU, and its backward.
struct Pair {
  explicit Pair(const Case& c) : forward(std::make_unique<Problem>(c)) {
    DeviceProblem(*forward).run();
    backward = std::make_unique<BackwardProblem>(*forward);
    backward->params.execution = {.backend = BLASST_BACKEND_CUDA};
  }
  // Leaves the gradients in `backward`.
  std::vector<std::byte> run(int repeats = 1) const {
    DeviceBackward device(*backward);
    device.mark();
    for (int i = 0; i < repeats; ++i) device.launch();
    device.download();
    return backward->bits();
  }
  int64_t skipped() const {
    int64_t count = 0;
    for (const int64_t tiles : forward->tiles_skipped) count += tiles;
    return count;
  }

  std::unique_ptr<Problem> forward;
  std::unique_ptr<BackwardProblem> backward;
};

// Cut into parts that can run side by side.
class BackwardRandom : public BackwardOnGpu, public testing::WithParamInterface<uint64_t> {};

TEST_P(BackwardRandom, Problems) {
  int64_t skips = 0;
  for (uint64_t seed = 20 * GetParam(); seed < 20 * GetParam() + 20 && !HasFailure(); ++seed) {
    const Pair pair(differentiable_on_gpu(random_case(seed, 3'000'000)));
    if (seed % 3 == 0) pair.backward->params.gradients.dlse = pair.backward->dlse.data();
    pair.run();
    EXPECT_EQ(compare(*pair.backward).mismatch, "")
        << "seed " << seed << ": " << describe(pair.forward->description);
    skips += pair.skipped();
  }
  EXPECT_GT(skips, 0);
}
INSTANTIATE_TEST_SUITE_P(, BackwardRandom, testing::Range<uint64_t>(0, 10));

Case sparse_case(DType dtype, HeadSizes sizes) {
  return {.seed = 7,
          .dtype = dtype,
          .requests = {{300, 500}, {300, 230}},
          .heads = 4,
          .kv_heads = 2,
          .head_dim = sizes.qk,
          .value_dim = sizes.value,
          .inputs = Inputs::kDrift,
          .causal = true,
          .test = BLASST_TEST_RELATIVE,
          .threshold = 0.05f};
}

class BackwardDims : public BackwardOnGpu, public testing::WithParamInterface<HeadSizes> {
 protected:
  static std::vector<Case> cases() {
    std::vector<Case> cases;
    for (const DType dtype : {BLASST_BFLOAT16, BLASST_FLOAT16}) {
      Case c = sparse_case(dtype, GetParam());
      cases.push_back(c);
      c.inputs = Inputs::kPlanted;
      c.sinks = true;
      c.softcap = 20;
      cases.push_back(c);
      // The first key tile of a long request is cut into parts.
      c = sparse_case(dtype, GetParam());
      c.requests = {{70, 4300}, {70, 170}, {70, 4225}};
      cases.push_back(c);
    }
    return cases;
  }
};

TEST_P(BackwardDims, AgreesWithTheReference) {
  for (const Case& c : cases()) {
    const Pair pair(c);
    pair.run();
    EXPECT_EQ(compare(*pair.backward).mismatch, "") << describe(c);
    EXPECT_GT(pair.skipped(), 0) << describe(c);
  }
}

// Decision by decision: the CPU's tiles have 64 keys, half a tile of the GPU's or all of one.
TEST_P(BackwardDims, AgreesWithTheCpuAlongTheSameDecisions) {
  for (const Case& c : cases()) {
    const Pair pair(c);
    pair.run();
    BackwardProblem on_cpu(*pair.forward);
    on_cpu.params.execution = {.backend = BLASST_BACKEND_CPU};
    const Plan gpu = backward_plan(pair.backward->params), cpu = backward_plan(on_cpu.params);
    ASSERT_EQ(gpu.shape.query_rows, cpu.shape.query_rows);
    const int64_t parts = gpu.shape.keys / cpu.shape.keys, rows = gpu.tile_heads * gpu.query_tiles;
    std::vector<uint32_t> bits(rows * cpu.tile_words);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < cpu.key_tiles; ++j) {
        const int64_t of = j / parts;
        const uint32_t kept =
            pair.forward->tile_bits[row * gpu.tile_words + of / 32] >> (of % 32) & 1;
        bits[row * cpu.tile_words + j / 32] |= kept << (j % 32);
      }
    }
    on_cpu.params.gradients.tile_bits = bits.data();
    on_cpu.run();
    for (const auto gradient : {&BackwardProblem::dq, &BackwardProblem::dk, &BackwardProblem::dv}) {
      const std::vector<float> wanted = (on_cpu.*gradient)(), got = ((*pair.backward).*gradient)();
      double error = 0, size = 0;
      for (size_t i = 0; i < wanted.size(); ++i) {
        error += (got[i] - wanted[i]) * (got[i] - wanted[i]);
        size += wanted[i] * wanted[i];
      }
      EXPECT_LT(std::sqrt(error / size), 4 * unit_roundoff(c.dtype)) << describe(c);
    }
  }
}

TEST_P(BackwardDims, ThresholdZeroNoTestAndNoBitsGiveTheSameBits) {
  for (Case c : cases()) {
    c.test = BLASST_TEST_NONE;
    const Pair dense(c);
    const std::vector<std::byte> wanted = dense.run();
    dense.backward->params.gradients.tile_bits = nullptr;
    EXPECT_EQ(dense.run(), wanted) << describe(c);
    c.test = BLASST_TEST_RELATIVE, c.threshold = 0;
    EXPECT_EQ(Pair(c).run(), wanted) << describe(c);
  }
}

TEST_P(BackwardDims, SameBitsInEveryRunAndLayout) {
  for (Case c : cases()) {
    const Pair first(c);
    const std::vector<std::byte> once = first.run();
    EXPECT_EQ(first.run(5), once);
    c.ragged_queries = true;
    for (const Layout layout : {Layout::kDense, Layout::kRagged}) {
      c.layout = layout;
      c.head_major = layout == Layout::kRagged;
      const Pair other(c);
      other.run();
      EXPECT_EQ(other.backward->dq(), first.backward->dq()) << describe(c);
      EXPECT_EQ(other.backward->dk(), first.backward->dk()) << describe(c);
      EXPECT_EQ(other.backward->dv(), first.backward->dv()) << describe(c);
    }
  }
}

// What is in a skipped tile is not read, and its keys' gradients are zero.
TEST_P(BackwardDims, SkippedTilesContributeExactlyZero) {
  for (const DType dtype : {BLASST_BFLOAT16, BLASST_FLOAT16}) {
    Case c = sparse_case(dtype, GetParam());
    c.requests = {{64, 1024}};
    c.kv_heads = 4;
    c.inputs = Inputs::kPlanted;
    c.density = 0.3;
    c.block_rows = 64, c.block_keys = 128;
    const Pair pair(c);
    const std::vector<std::byte> before = pair.run();
    const int64_t keys = backward_plan(pair.backward->params).shape.keys;
    const Access access(pair.forward->params);
    int64_t skipped = 0;
    // One query tile and as many KV heads as heads: a skipped tile's keys are nobody else's.
    for (int64_t h = 0; h < 4; ++h) {
      for (int64_t key = 0; key < 1024; ++key) {
        if (pair.forward->tile_bits[h] >> (key / keys) & 1) continue;
        ++skipped;
        const BackwardParams& b = pair.backward->params;
        for (int64_t d = 0; d < c.head_dim; ++d) {
          const int64_t at = d * element_bytes(dtype);
          ASSERT_EQ(load_element(dtype, access.key_row(b.gradients.dk, 0, key, h) + at), 0);
          store_element(dtype, access.key(0, key, h) + at, kNan);
        }
        for (int64_t d = 0; d < c.value_dim; ++d) {
          const int64_t at = d * element_bytes(dtype);
          ASSERT_EQ(load_element(dtype, access.key_row(b.gradients.dv, 0, key, h) + at), 0);
          store_element(dtype, access.value(0, key, h) + at, kInf);
        }
      }
    }
    EXPECT_GT(skipped, 0);
    EXPECT_EQ(pair.run(), before) << "a skipped tile was read";
  }
}

INSTANTIATE_TEST_SUITE_P(, BackwardDims,
                         testing::Values(HeadSizes{64, 64}, HeadSizes{128, 128},
                                         HeadSizes{192, 128}, HeadSizes{256, 256}),
                         [](const auto& param) {
                           return std::to_string(param.param.qk) + "_" +
                                  std::to_string(param.param.value);
                         });

TEST_F(BackwardOnGpu, RowsWithoutAKeyAndUnusedKeysGetZero) {
  for (const bool padded : {false, true}) {
    Case c = sparse_case(BLASST_BFLOAT16, {128, 128});
    c.requests = {{80, 40}, {80, 0}, {80, 90}};  // causal: 40 rows and one request see nothing
    c.padding = 8;
    c.sinks = true;
    c.padded = padded;
    const Pair pair(c);
    pair.backward->params.gradients.dlse = pair.backward->dlse.data();
    pair.run();
    EXPECT_EQ(compare(*pair.backward).mismatch, "") << describe(c);
  }
}

TEST_F(BackwardOnGpu, ManyRequestsOfAnyLength) {
  Case c = sparse_case(BLASST_BFLOAT16, {64, 64});
  c.ragged_queries = true;
  c.layout = Layout::kRagged;
  c.requests = {{0, 0}, {300, 400}, {0, 5}};
  for (int64_t i = 0; i < 600; ++i) c.requests.push_back({i % 7 == 0 ? 0 : i % 11, i % 13});
  c.requests.push_back({190, 190});
  c.requests.push_back({90, 4200});  // its first key tile is cut into parts
  const Pair pair(c);
  const std::vector<std::byte> wanted = pair.run();
  EXPECT_EQ(compare(*pair.backward).mismatch, "");
  // Whether or not the call knows the longest.
  blasst_problem& p = pair.backward->params.problem;
  p.query_length = 0, p.kv.key_length = 0;
  pair.backward->params.gradients.tile_bits = nullptr;
  const std::vector<std::byte> dense = pair.run();
  p.query_length = 300, p.kv.key_length = 4200;
  EXPECT_EQ(pair.run(), dense);
}

TEST_F(BackwardOnGpu, NothingToDo) {
  for (const Lengths lengths : {Lengths{0, 0}, Lengths{0, 100}, Lengths{70, 0}}) {
    for (const bool ragged : {false, true}) {
      Case c = sparse_case(BLASST_BFLOAT16, {128, 128});
      c.requests = {lengths, lengths};
      c.sinks = true;
      c.ragged_queries = ragged;
      c.layout = ragged ? Layout::kRagged : Layout::kDense;
      const Pair pair(c);
      pair.run();
      EXPECT_EQ(compare(*pair.backward).mismatch, "") << describe(c);
    }
  }
}

TEST_F(BackwardOnGpu, ReplaysFromAGraph) {
  const Pair pair(sparse_case(BLASST_BFLOAT16, {128, 128}));
  const std::vector<std::byte> wanted = pair.run();
  DeviceBackward device(*pair.backward);
  device.mark();
  synchronize();
  Graph graph([&](cudaStream_t stream) {
    device.params.execution.stream = stream;
    device.launch();
  });
  graph.replay();
  device.download();
  EXPECT_EQ(pair.backward->bits(), wanted);
}

}  // namespace
}  // namespace blasst::check
