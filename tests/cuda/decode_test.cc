// The decode kernels on a GPU: against the reference, and against themselves.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "on_gpu.h"
#include "testing/compare.h"
#include "testing/device.h"
#include "testing/element.h"

namespace blasst::check {
namespace {

struct Seen {
  int64_t decisions = 0, skipped = 0, rounded = 0;
};

void expect_agreement(const Case& c, Seen& seen) {
  Problem problem(c);
  const Comparison comparison = run_and_compare(problem);
  EXPECT_EQ(comparison.mismatch, "") << describe(c);
  seen.decisions += comparison.decisions;
  seen.skipped += comparison.skipped;
  seen.rounded += comparison.rounded;
}

// A random problem, bent to what the kernels do.
Case device_case(uint64_t seed, int64_t budget) {
  SeededChoices choose(seed);
  Case c = random_case(seed, budget);
  c.decode = true;
  c.scores = BLASST_SCORES_EXACT;
  c.padded = c.bands = c.blocks = false;
  c.places = 1;
  c.dtype = choose.pick({BLASST_FLOAT16, BLASST_BFLOAT16});
  const GpuKernels& kernels = gpu_kernels();
  const HeadSizes sizes =
      kernels.decode_sizes[choose.between(0, std::ssize(kernels.decode_sizes) - 1)];
  c.head_dim = sizes.qk, c.value_dim = sizes.value;
  c.values_in_keys = false;
  c.k_dtype = c.v_dtype = {};
  const int64_t rows = kernels.most_rows(c.head_dim);  // of a query tile
  c.heads = std::min(c.heads, rows * c.kv_heads);
  if (kernels.latents && choose.one_in(5)) {
    c.values_in_keys = true;
    c.head_dim = kLatentSizes.qk, c.value_dim = kLatentSizes.value;
    c.heads = choose.pick<int64_t>({8, 16, 24, 64, 96, 128}), c.kv_heads = 1;
    budget *= 8;
  }
  c.page_size = choose.pick<int64_t>({16, 32, 64, 128, 256});
  c.padding = 8 * choose.between(0, 2);
  const int64_t group = c.heads / c.kv_heads;
  const int64_t queries = choose.one_in(2) ? 1
                          : c.values_in_keys
                              ? choose.between(1, 4)
                              : choose.between(1, std::min<int64_t>(16, rows / group));
  const int64_t most = budget / (c.heads * 2 * c.head_dim * queries * std::ssize(c.requests));
  for (Lengths& r : c.requests) {
    r.queries = c.ragged_queries ? choose.between(0, queries) : queries;
    if (choose.one_in(2)) r.keys = choose.between(1, std::max<int64_t>(most, 1));
    r.keys = std::min(r.keys, most);
  }
  return c;
}

class DecodeKernels : public OnGpu {};

// Cut into parts that can run side by side.
class DecodeRandom : public DecodeKernels, public testing::WithParamInterface<uint64_t> {};

TEST_P(DecodeRandom, Problems) {
  Seen seen;
  for (uint64_t seed = 20 * GetParam(); seed < 20 * GetParam() + 20 && !HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    expect_agreement(device_case(seed, 8'000'000), seen);
  }
  EXPECT_LE(seen.rounded, 1 + seen.decisions / 2000);
}
INSTANTIATE_TEST_SUITE_P(, DecodeRandom, testing::Range<uint64_t>(0, 10));

class DecodeDim : public SizesOnGpu {
 protected:
  DecodeDim() : SizesOnGpu(true) {}
};

TEST_P(DecodeDim, EveryRatio) {
  Seen seen;
  const auto [qk, value] = GetParam();
  for (const DType dtype : {BLASST_FLOAT16, BLASST_BFLOAT16}) {
    for (const auto& [group, queries] : {std::pair<int64_t, int64_t>{1, 1},
                                         {4, 1},
                                         {8, 1},
                                         {16, 1},
                                         {6, 4},
                                         {4, 8},
                                         {64, 1},
                                         {4, 16},
                                         {1, 16}}) {
      if (group * queries > gpu_kernels().most_rows(qk)) continue;
      for (const int64_t keys : {200, 1300}) {
        if (group * queries > 32 && dtype == BLASST_FLOAT16 && keys > 200) continue;  // for time
        expect_agreement({.seed = 7,
                          .decode = true,
                          .dtype = dtype,
                          .requests = {{queries, keys}},
                          .heads = group,
                          .kv_heads = 1,
                          .head_dim = qk,
                          .value_dim = value,
                          .inputs = Inputs::kPlanted,
                          .density = 0.3,
                          .causal = true,
                          .test = BLASST_TEST_RELATIVE,
                          .threshold = 0.01f},
                         seen);
      }
    }
  }
  EXPECT_GT(seen.skipped, seen.decisions / 3);
}
INSTANTIATE_TEST_SUITE_P(, DecodeDim, testing::ValuesIn(kHeadSizes), name_of_sizes);

// Of latents: one part of the heads, several, with rows to spare; one split, several.
Case latent_case(int64_t heads, int64_t positions, int64_t keys) {
  return {.seed = 7,
          .decode = true,
          .dtype = BLASST_BFLOAT16,
          .requests = {{positions, keys}, {positions, 70}},
          .heads = heads,
          .kv_heads = 1,
          .head_dim = kLatentSizes.qk,
          .value_dim = kLatentSizes.value,
          .values_in_keys = true,
          .inputs = Inputs::kDrift,
          .layout = Layout::kPaged,
          .page_size = 64,
          .causal = true,
          .test = BLASST_TEST_RELATIVE,
          .threshold = 0.3f};
}

TEST_F(DecodeKernels, Latents) {
  if (!gpu_kernels().latents) GTEST_SKIP() << "no decode over latents";
  Seen seen;
  for (const DType dtype : {BLASST_FLOAT16, BLASST_BFLOAT16}) {
    for (const auto& [heads, positions, keys] : {std::tuple<int64_t, int64_t, int64_t>{8, 1, 3000},
                                                 {8, 1, 2200},
                                                 {16, 1, 1500},
                                                 {16, 4, 500},
                                                 {64, 1, 700},
                                                 {96, 1, 300},
                                                 {128, 1, 300},
                                                 {128, 2, 300},
                                                 {128, 4, 130}}) {
      Case c = latent_case(heads, positions, keys);
      c.dtype = dtype;
      expect_agreement(c, seen);
    }
  }
  EXPECT_GT(seen.skipped, seen.decisions / 10);
}

// Many short requests: work items are several splits, or groups of them. 66 of 4 KV heads: those of
// 8 splits are one item each on 264 blocks.
TEST_F(DecodeKernels, GroupsOfSplits) {
  Seen seen;
  for (const auto [group, requests] : {std::pair<int64_t, int64_t>{4, 66}, {4, 71}, {12, 71}}) {
    Case c{.seed = 11,
           .decode = true,
           .dtype = BLASST_BFLOAT16,
           .requests = {},
           .heads = 4 * group,
           .kv_heads = 4,
           .head_dim = 128,
           .value_dim = 128,
           .inputs = Inputs::kDrift,
           .layout = Layout::kPaged,
           .page_size = 32,
           .causal = true,
           .test = BLASST_TEST_RELATIVE,
           .threshold = 0.05f};
    for (int64_t b = 5; b < requests; ++b) c.requests.push_back({1, 17 * b + b * b % 700});
    for (const int64_t keys : {6000, 4096, 4097, 4300, 3700}) c.requests.push_back({1, keys});
    expect_agreement(c, seen);
  }
}

// Blocks with three items of a tile or two one after the other: what an item reads of its slot must
// not be the item's after the next.
TEST_F(DecodeKernels, ShortItemsOneAfterTheOther) {
  Seen seen;
  for (const int64_t dim : {64, 128}) {
    Case c{.seed = 23,
           .decode = true,
           .dtype = BLASST_BFLOAT16,
           .requests = {},
           .heads = 32,
           .kv_heads = 16,
           .head_dim = dim,
           .value_dim = dim,
           .inputs = Inputs::kDrift,
           .softcap = 20,
           .causal = true,
           .test = BLASST_TEST_RELATIVE,
           .threshold = 0.3f,
           .per_request = true,
           .per_head = true};
    for (int64_t b = 0; b < 200; ++b) c.requests.push_back({1, 1 + b % 7 * 29});
    c.requests.push_back({1, 65});
    for (int run = 0; run < 5; ++run) expect_agreement(c, seen);
  }
}

// More tiles than splits of the least size: the splits grow.
TEST_F(DecodeKernels, LongVisit) {
  Seen seen;
  expect_agreement({.seed = 5,
                    .decode = true,
                    .dtype = BLASST_BFLOAT16,
                    .requests = {{1, 7000}, {1, 4000}},
                    .heads = 64,
                    .kv_heads = 32,
                    .head_dim = 64,
                    .value_dim = 64,
                    .causal = true,
                    .test = BLASST_TEST_SCALE_FACTOR,
                    .threshold = 50},
                   seen);
}

Case mixed_case() {
  return {.seed = 3,
          .decode = true,
          .dtype = BLASST_BFLOAT16,
          .requests = {{2, 900}, {2, 0}, {2, 3000}, {2, 1}, {2, 64}},
          .heads = 8,
          .kv_heads = 2,
          .head_dim = 128,
          .value_dim = 128,
          .page_size = 64,
          .sinks = true,
          .causal = true,
          .test = BLASST_TEST_RELATIVE,
          .threshold = 0.03f,
          .per_request = true,
          .per_head = true};
}

// Of three parts of the heads.
Case mixed_latent_case() {
  Case c = mixed_case();
  c.heads = 96, c.kv_heads = 1;
  c.head_dim = kLatentSizes.qk, c.value_dim = kLatentSizes.value;
  c.values_in_keys = true;
  return c;
}

// Those of both kinds that the backend has.
std::vector<Case> mixed_cases() {
  std::vector<Case> cases = {mixed_case()};
  if (gpu_kernels().latents) cases.push_back(mixed_latent_case());
  return cases;
}

std::vector<std::byte> bits_of(const Case& c, bool report) {
  Problem problem(c);
  DeviceProblem(problem, report ? Reports::kAll : Reports::kCounts).run();
  return problem.out_bits();
}

TEST_F(DecodeKernels, DenseIsThresholdZeroIsReported) {
  std::vector<Case> cases = mixed_cases();
  for (const auto [qk, value] : gpu_kernels().decode_sizes) {
    cases.push_back(mixed_case());
    cases.back().head_dim = qk, cases.back().value_dim = value;
  }
  for (Case& c : cases) {
    c.per_request = c.per_head = false;
    c.threshold = 0;
    Case dense = c;
    dense.test = BLASST_TEST_NONE;
    EXPECT_EQ(bits_of(c, false), bits_of(dense, false));
    EXPECT_EQ(bits_of(c, true), bits_of(dense, false));
    EXPECT_EQ(bits_of(dense, true), bits_of(dense, false));
  }
}

TEST_F(DecodeKernels, SameBitsInEveryLayoutAndRun) {
  for (const Case& plain : mixed_cases()) {
    const std::vector<std::byte> bits = bits_of(plain, false);
    for (int run = 0; run < 20; ++run) EXPECT_EQ(bits_of(plain, run % 2), bits);
    for (const Layout layout : {Layout::kRagged, Layout::kPaged}) {
      for (const int64_t page_size : {16, 32, 64, 128, 256}) {
        Case c = plain;
        c.layout = layout, c.page_size = page_size, c.head_major = page_size % 64 == 0;
        EXPECT_EQ(bits_of(c, false), bits) << describe(c);
      }
    }
  }
}

// Alone a request's work items are splits, in a large batch several of them, or whole groups.
TEST_F(DecodeKernels, SameBitsAloneAndInAnyBatch) {
  for (Case c : mixed_cases()) {
    c.per_request = c.per_head = false;
    for (const auto [keys, requests] :
         {std::pair<int64_t, int64_t>{5000, 90}, {4096, 132}, {4200, 132}}) {
      c.requests = {{2, keys}};
      const std::vector<std::byte> alone = bits_of(c, false);
      for (int64_t b = 1; b < requests; ++b) c.requests.push_back({2, 4500 * b / requests});
      std::vector<std::byte> batch = bits_of(c, false);
      batch.resize(alone.size());
      EXPECT_EQ(batch, alone);
    }
  }
}

// Of different numbers of positions, none included. Where keys come first to last under a window,
// what is no row of a short request would see other keys than its rows do.
Case ragged_case(int64_t group) {
  return {.seed = 4,
          .decode = true,
          .dtype = BLASST_BFLOAT16,
          .requests = {{2, 900}, {0, 500}, {4, 3000}, {1, 3}, {3, 64}, {4, 0}, {1, 2500}, {0, 0}},
          .heads = 2 * group,
          .kv_heads = 2,
          .head_dim = 128,
          .value_dim = 128,
          .inputs = Inputs::kDrift,
          .layout = Layout::kPaged,
          .ragged_queries = true,
          .page_size = 64,
          .sinks = true,
          .causal = true,
          .test = BLASST_TEST_RELATIVE,
          .threshold = 0.2f,
          .per_request = true};
}

// Of every kind that the backend has.
std::vector<Case> ragged_cases() {
  std::vector<Case> cases;
  for (const int64_t group : {1, 4, 12}) cases.push_back(ragged_case(group));
  for (const auto [qk, value] : gpu_kernels().decode_sizes) {
    cases.push_back(ragged_case(4));
    cases.back().head_dim = qk, cases.back().value_dim = value;
  }
  if (!gpu_kernels().latents) return cases;
  Case& latents = cases.emplace_back(ragged_case(32));
  latents.heads = 32, latents.kv_heads = 1;
  latents.head_dim = kLatentSizes.qk, latents.value_dim = kLatentSizes.value;
  latents.values_in_keys = true;
  return cases;
}

TEST_F(DecodeKernels, RaggedQueries) {
  Seen seen;
  for (Case c : ragged_cases()) {
    for (const int64_t window : {-1, 700}) {
      for (const Order order : {BLASST_FORWARD, BLASST_SINK_FIRST}) {
        c.window_left = window, c.order = order;
        expect_agreement(c, seen);
      }
    }
  }
  EXPECT_GT(seen.skipped, seen.decisions / 20);
}

TEST_F(DecodeKernels, RaggedQueriesOfOneNumberHaveTheBitsOfDenseOnes) {
  for (Case c : ragged_cases()) {
    for (Lengths& r : c.requests) r.queries = 4;
    const std::vector<std::byte> ragged = bits_of(c, false);
    c.ragged_queries = false;
    EXPECT_EQ(bits_of(c, false), ragged) << describe(c);
  }
}

// Alone with as many positions at most.
TEST_F(DecodeKernels, RaggedQueriesHaveTheBitsThatTheyHaveAlone) {
  for (Case c : ragged_cases()) {
    c.per_request = false;
    for (const int64_t positions : {1, 2, 4}) {
      c.requests = {{positions, 5000}};
      Problem one(c);
      one.params.problem.query_length = 4;
      DeviceProblem(one, Reports::kCounts).run();
      const std::vector<std::byte> alone = one.out_bits();
      for (int64_t b = 1; b < 90; ++b) c.requests.push_back({b % 5, 7 * b});
      std::vector<std::byte> batch = bits_of(c, false);
      batch.resize(alone.size());
      EXPECT_EQ(batch, alone) << positions << ": " << describe(c);
    }
  }
}

// Another request's queries lie behind those of a short one.
TEST_F(DecodeKernels, AQueryThatIsNotANumberStaysInItsRequest) {
  for (Case c : ragged_cases()) {
    c.requests = {{1, 3000}, {4, 900}};
    Problem problem(c);
    const Access access(problem.params);
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t h = 0; h < c.heads; ++h)
        std::memset(access.query(1, i, h), 0xff, 2 * static_cast<size_t>(c.head_dim));
    EXPECT_EQ(run_and_compare(problem).mismatch, "") << describe(c);
  }
}

TEST_F(DecodeKernels, NoQueriesAtAll) {
  for (Case c : ragged_cases()) {
    c.requests = {{0, 3000}, {0, 0}};
    Problem problem(c);
    EXPECT_EQ(run_and_compare(problem).mismatch, "") << describe(c);
  }
}

// A captured graph keeps the number of rows and their most, and reads whose they are.
TEST_F(DecodeKernels, GraphSeesNewNumbersOfPositions) {
  for (const Case& c : ragged_cases()) {
    Problem problem(c);
    DeviceProblem device(problem);
    Graph graph([&](cudaStream_t stream) {
      device.params.execution.stream = stream;
      device.launch();
    });
    for (const std::vector<int32_t>& cu : {std::vector<int32_t>{0, 2, 2, 6, 7, 10, 14, 15, 15},
                                           {0, 0, 4, 5, 6, 7, 11, 15, 15},
                                           {0, 4, 4, 4, 8, 8, 12, 15, 15}}) {
      problem.cu_queries = cu;
      problem.params.problem.cu_seqlens_q = problem.cu_queries.data();
      DeviceProblem::put(device.params.problem.cu_seqlens_q, cu);
      device.mark();
      graph.replay();
      device.download();
      EXPECT_EQ(compare_on_gpu(problem).mismatch, "") << describe(c);
    }
  }
}

TEST_F(DecodeKernels, GraphSeesNewLengthsAndThresholds) {
  for (Case c : mixed_cases()) {
    c.layout = Layout::kPaged;
    Problem problem(c);
    DeviceProblem device(problem, Reports::kCounts);
    Graph graph([&](cudaStream_t stream) {
      device.params.execution.stream = stream;
      device.launch();
    });
    device.params.execution.stream = nullptr;
    for (const float shrink : {1.0f, 0.5f, 0.1f}) {
      std::vector<int32_t> lengths = problem.lengths;
      std::vector<float> thresholds = problem.thresholds;
      for (int32_t& x : lengths) x = static_cast<int32_t>(static_cast<float>(x) * shrink);
      for (float& x : thresholds) x *= shrink;
      DeviceProblem::put(device.params.problem.kv.lengths, lengths);
      DeviceProblem::put(device.params.decision.test.values, thresholds);
      device.mark();
      graph.replay();
      device.download();
      const std::vector<std::byte> replayed = problem.out_bits();
      device.run();
      EXPECT_EQ(replayed, problem.out_bits());
    }
  }
}

// A captured graph keeps its batch. Slots without a request have length 0, and one comes in later.
TEST_F(DecodeKernels, GraphTakesRequestsUpToItsBatch) {
  Case c = mixed_case();
  c.requests = {{1, 900}, {1, 3000}, {1, 700}};
  Problem problem(c);
  DeviceProblem device(problem, Reports::kCounts);
  Graph graph([&](cudaStream_t stream) {
    device.params.execution.stream = stream;
    device.launch();
  });
  device.params.execution.stream = nullptr;
  for (const std::vector<int32_t>& lengths :
       {std::vector<int32_t>{900, 0, 0}, {900, 3000, 0}, {900, 3000, 700}}) {
    DeviceProblem::put(device.params.problem.kv.lengths, lengths);
    device.mark();
    graph.replay();
    device.download();
    const std::vector<std::byte> replayed = problem.out_bits();
    const auto row = static_cast<int64_t>(replayed.size()) / 3;
    for (int64_t b = 0; b < 3; ++b)
      EXPECT_EQ(lengths[b] == 0,
                std::all_of(replayed.begin() + b * row, replayed.begin() + (b + 1) * row,
                            [](std::byte x) { return x == std::byte{}; }));
    device.run();
    EXPECT_EQ(replayed, problem.out_bits());
  }
}

// Rows are padded with zeros to a multiple of 8, and 0 times infinity is not a number.
TEST_F(DecodeKernels, WhatIsNoRowDoesNotWantAnInfiniteKey) {
  for (Case c : mixed_cases()) {
    c.requests = {{1, 3000}};
    c.per_head = false, c.threshold = 0.9f;
    Problem problem(c);
    const Access access(problem.params);
    const auto last = 2 * (c.head_dim - 1);  // of the rotary elements of latents
    for (int64_t h = 0; h < c.heads; ++h) store_element(c.dtype, access.query(0, 0, h) + last, 1);
    for (int64_t key = 7; key < 3000; key += 64) {
      for (int64_t h = 0; h < c.kv_heads; ++h)
        store_element(c.dtype, access.key(0, key, h) + last, -INFINITY);
    }
    const Comparison comparison = run_and_compare(problem);
    EXPECT_EQ(comparison.mismatch, "") << describe(c);
    EXPECT_GT(comparison.skipped, 0);
  }
}

TEST_F(DecodeKernels, NotANumber) {
  for (const int64_t key : {5, 700, 1000}) {
    for (const Case& plain : mixed_cases()) {
      for (const bool value : {false, true}) {
        if (value && plain.values_in_keys) continue;
        Case c = plain;
        c.requests = {{1, 1100}};
        Problem problem(c);
        const Access access(problem.params);
        const int64_t head = c.kv_heads - 1;
        std::memset(value ? access.value(0, key, head) : access.key(0, key, head), 0xff, 2);
        EXPECT_EQ(run_and_compare(problem).mismatch, "") << key << value;
      }
    }
  }
}

}  // namespace
}  // namespace blasst::check
