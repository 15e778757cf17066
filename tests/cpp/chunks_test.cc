// Chunks on every instruction set: the row operations against double precision, the same cut and
// choice everywhere; bad input.
#include "blasst/chunks.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "testing/numbers.h"

namespace blasst::check {
namespace {

constexpr int64_t kKeys = 700, kHeads = 2, kDim = 40;

std::vector<float> random_floats(int64_t count, uint64_t seed) {
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; ++i)
    values[i] = static_cast<float>(2 * uniform(hash(seed, i)) - 1);
  return values;
}

// Keys that change their common direction every 37 tokens.
std::vector<float> keys() {
  const int64_t size = kHeads * kDim;
  std::vector<float> values = random_floats(kKeys * size, 1);
  const std::vector<float> direction = random_floats((kKeys / 37 + 1) * size, 2);
  for (int64_t t = 0; t < kKeys; ++t) {
    for (int64_t i = 0; i < size; ++i)
      values[t * size + i] = 0.3f * values[t * size + i] + direction[t / 37 * size + i];
  }
  return values;
}

HeadRows rows_of(const std::vector<float>& values, int64_t rows, int64_t heads) {
  return {.data = values.data(),
          .elements = std::ssize(values),
          .rows = rows,
          .heads = heads,
          .head_dim = kDim,
          .stride_row = heads * kDim,
          .stride_head = kDim};
}

class ChunksOnEveryIsa : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { set_cpu_isa(GetParam()); }
  void TearDown() override { set_cpu_isa(cpu_isas().front()); }
};

TEST_P(ChunksOnEveryIsa, RowOperations) {
  const cpu::ChunkKernels& kernels = cpu::kernels(BLASST_FLOAT32).chunks;
  for (const int64_t dim : {16, 24, 40, 64, 200}) {
    const std::vector<float> q = random_floats(dim, 1), rows = random_floats(7 * (dim + 8), 2);
    std::vector<float> out(7);
    kernels.dots(q.data(), rows.data(), dim + 8, 7, dim, out.data());
    for (int64_t r = 0; r < 7; ++r) {
      double exact = 0;
      for (int64_t d = 0; d < dim; ++d) exact += double{q[d]} * rows[r * (dim + 8) + d];
      EXPECT_NEAR(out[r], exact, 1e-5);
    }
  }
  const int64_t inputs = 129, outputs = 64;
  for (const int64_t count : {1, 4, 6}) {
    const std::vector<float> x = random_floats(count * inputs, 3),
                             weight = random_floats(inputs * outputs, 4),
                             bias = random_floats(outputs, 5);
    std::vector<float> y(count * outputs);
    for (const float* b : {bias.data(), static_cast<const float*>(nullptr)}) {
      kernels.affine(x.data(), count, inputs, weight.data(), b, outputs, y.data());
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t o = 0; o < outputs; ++o) {
          double exact = b ? b[o] : 0;
          for (int64_t i = 0; i < inputs; ++i)
            exact += double{x[r * inputs + i]} * weight[i * outputs + o];
          ASSERT_NEAR(y[r * outputs + o], exact, 1e-4);
        }
      }
    }
  }
}

TEST_P(ChunksOnEveryIsa, TheSameCutAndChoiceOnAnyNumberOfThreads) {
  const std::vector<float> k = keys(), q = random_floats(kKeys * 4 * kDim, 6);
  const ChunkRule rule{.chunker = BLASST_CHUNKS_SHIFT, .least = 4, .most = 64, .threshold = 0.5f};
  std::vector<int32_t> starts;
  std::vector<uint8_t> chosen;
  for (const int threads : {1, 2, 5}) {
    Chunks chunks;
    extend_chunks(chunks, rule, rows_of(k, 300, kHeads), threads);
    extend_chunks(chunks, rule, rows_of(k, kKeys, kHeads), threads);
    std::vector<uint8_t> blocks(4 * 11 * 11);
    select_tiles(chunks, kHeads, rows_of(q, kKeys, 4), false, {.share = 0.3}, blocks.data(),
                 threads);
    if (starts.empty()) starts = chunks.starts, chosen = blocks;
    EXPECT_EQ(chunks.starts, starts);
    EXPECT_EQ(blocks, chosen);
  }
  // Where the direction changes, and where a chunk is full.
  for (int32_t t = 37; t < kKeys; t += 37) EXPECT_TRUE(std::ranges::count(starts, t)) << t;
  EXPECT_EQ(starts.size(), (kKeys + 36) / 37u);
}

INSTANTIATE_TEST_SUITE_P(Cpu, ChunksOnEveryIsa, testing::ValuesIn(cpu_isas()),
                         [](const auto& info) { return info.param; });

TEST(Chunks, BadInput) {
  const std::vector<float> k = keys();
  const auto message = [&](const std::function<void(Chunks&, ChunkRule&, HeadRows&)>& spoil) {
    Chunks chunks;
    ChunkRule rule;
    HeadRows rows = rows_of(k, kKeys, kHeads);
    spoil(chunks, rule, rows);
    try {
      extend_chunks(chunks, rule, rows, 1);
    } catch (const Error& error) {
      EXPECT_EQ(error.status(), BLASST_INVALID_ARGUMENT);
      return std::string(error.what());
    }
    return std::string("no error");
  };
  using Text = std::string;
  const auto expect = [&](const Text& part, const Text& whole) {
    EXPECT_NE(whole.find(part), Text::npos) << whole;
  };
  expect("least keys of a chunk is 65; it must be 1 to 64",
         message([](auto&, auto& rule, auto&) { rule.least = 65; }));
  expect("most keys of a chunk is 0", message([](auto&, auto& rule, auto&) { rule.most = 0; }));
  expect("threshold of the chunker is nan", message([](auto&, auto& rule, auto&) {
           rule.threshold = std::numeric_limits<float>::quiet_NaN();
         }));
  expect("predictor is null",
         message([](auto&, auto& rule, auto&) { rule.chunker = BLASST_CHUNKS_TRAINED; }));
  expect("keys is null, with 700 rows",
         message([](auto&, auto&, auto& rows) { rows.data = nullptr; }));
  expect("keys reaches element 56000",
         message([](auto&, auto&, auto& rows) { rows.elements -= 1; }));
  expect("stride_row is -1", message([](auto&, auto&, auto& rows) { rows.stride_row = -1; }));
  expect("stride_head is 9223372036854775807", message([](auto&, auto&, auto& rows) {
           rows.stride_head = std::numeric_limits<int64_t>::max();
         }));
  expect("chunker is 3", message([](auto&, auto& rule, auto&) { rule.chunker = Chunker{3}; }));
  expect("keys of the chunks is -1", message([](auto& chunks, auto&, auto&) { chunks.keys = -1; }));
  expect("head_dim of keys is 12", message([](auto&, auto&, auto& rows) { rows.head_dim = 12; }));
  expect("fewer than the 800 that the chunks cover", message([](auto& chunks, auto&, auto&) {
           chunks.keys = 800, chunks.starts = {0}, chunks.sums.resize(kHeads * kDim);
         }));
  const BoundaryPredictor empty{.inputs = 80, .window = 4, .features = 32, .hidden = 64};
  expect("projection of the boundary predictor is null", message([&](auto&, auto& rule, auto&) {
           rule.chunker = BLASST_CHUNKS_TRAINED, rule.predictor = &empty;
         }));
  const BoundaryPredictor predictor{.inputs = 80, .window = 4, .features = 33, .hidden = 64};
  expect("features of the boundary predictor is 33; it must be a multiple of 32",
         message([&](auto&, auto& rule, auto&) {
           rule.chunker = BLASST_CHUNKS_TRAINED, rule.predictor = &predictor;
         }));

  Chunks chunks;
  for (const int threads : {-1, 5000}) {
    const auto bad_threads = "threads is " + std::to_string(threads) + "; it must be 0 to 4096";
    const HeadRows rows = rows_of(k, kKeys, kHeads);
    uint8_t block = 0;
    for (const std::function<void()>& call : std::initializer_list<std::function<void()>>{
             [&] { extend_chunks(chunks, {}, rows, threads); },
             [&] { next_chunks(chunks, {}, rows, threads); },
             [&] { boundary_scores({}, rows, 0, 1, threads); },
             [&] { select_tiles(chunks, kHeads, rows, false, {.share = 1}, &block, threads); }}) {
      try {
        call();
        ADD_FAILURE() << "no error";
      } catch (const Error& error) {
        expect(bad_threads, error.what());
      }
    }
  }
  extend_chunks(chunks, {}, rows_of(k, kKeys, kHeads), 1);
  EXPECT_THROW(
      select_tiles(chunks, kHeads, rows_of(k, kKeys, kHeads), false, {.share = 1}, nullptr, 1),
      Error);
}

TEST(Chunks, ZeroThreadsAreTheDefault) {
  const std::vector<float> k = keys();
  const HeadRows rows = rows_of(k, kKeys, kHeads);
  const ChunkRule rule{.chunker = BLASST_CHUNKS_SHIFT, .threshold = 0.5f};
  Chunks zero, one;
  extend_chunks(zero, rule, rows, 0);
  extend_chunks(one, rule, rows, 1);
  EXPECT_EQ(zero.starts, one.starts);
  EXPECT_EQ(zero.sums, one.sums);
}

}  // namespace
}  // namespace blasst::check
