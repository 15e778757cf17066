// Calls on a GPU beside the plain ones: padded batches, merging, page checks, calls that fail.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "on_gpu.h"
#include "testing/compare.h"
#include "testing/device.h"
#include "testing/element.h"

namespace blasst::check {
namespace {

class Calls : public OnGpu {};

Case paged_case(bool decode) {
  return {.seed = 3,
          .decode = decode,
          .dtype = BLASST_BFLOAT16,
          .requests = {{2, 900}, {2, 0}, {2, 3000}, {2, 1}},
          .heads = 8,
          .kv_heads = 2,
          .head_dim = 128,
          .value_dim = 128,
          .layout = Layout::kPaged,
          .page_size = 64,
          .causal = true};
}

std::vector<int32_t> check(const DeviceProblem& device) {
  DeviceMemory memory;
  const std::vector<int32_t> marks(4, -7);
  std::vector<int32_t> found(4);
  int32_t* on_device = memory.copy(marks.data(), 4);
  check_pages(device.params.problem, on_device, nullptr);
  synchronize();
  DeviceMemory::read(found.data(), on_device, sizeof(int32_t) * 4);
  return found;
}

TEST_F(Calls, PageCheckNamesTheFirstFault) {
  Problem problem(paged_case(true));
  const KeysValues& kv = problem.params.problem.kv;
  const auto pages = static_cast<int32_t>(kv.pages), room = int32_t{3000};
  DeviceProblem device(problem);
  EXPECT_EQ(check(device), std::vector<int32_t>(4, 0));
  const std::vector<int32_t> table = problem.page_table;
  for (const int32_t id : {pages, pages + 7, -3}) {
    std::vector<int32_t> bad = table;
    bad[2 * kv.page_table_stride + 5] = bad[2 * kv.page_table_stride + 40] = id;
    DeviceProblem::put(device.params.problem.kv.page_table, bad);
    EXPECT_EQ(check(device), (std::vector<int32_t>{BLASST_PAGE_ID, 2, 5, id}));
    device.run();  // and the call stays inside its memory
  }
  for (const int32_t length : {room + 1, -1}) {
    std::vector<int32_t> lengths = problem.lengths;
    lengths[1] = length;
    DeviceProblem::put(device.params.problem.kv.lengths, lengths);
    EXPECT_EQ(check(device), (std::vector<int32_t>{BLASST_PAGE_LENGTH, 1, length, room}));
  }
}

// As if they were as long as there is room.
TEST_F(Calls, LengthsBeyondThePageTableAreCut) {
  for (const bool decode : {false, true}) {
    Problem problem(paged_case(decode));
    DeviceProblem device(problem, Reports::kCounts);
    device.run();
    const std::vector<std::byte> bits = problem.out_bits();
    std::vector<int32_t> lengths = problem.lengths;
    lengths[2] = 1 << 30;  // the longest request's
    DeviceProblem::put(device.params.problem.kv.lengths, lengths);
    device.run();
    EXPECT_EQ(problem.out_bits(), bits);
  }
}

// Keys from the middle of the room on, and rows that are no request's: the bits of each request
// alone, and zeros.
TEST_F(Calls, PaddedRequestsAreAsAlone) {
  constexpr int64_t kRows = 300, kKeys = 700, kHeads = 4, kKvHeads = 2, kDim = 64;
  const std::vector<int32_t> starts = {0, 130, 600, 0}, ends = {700, 700, 690, 50},
                             used = {300, 300, 200, 40};
  Case c{.seed = 5,
         .dtype = BLASST_BFLOAT16,
         .requests = {{kRows, kKeys}, {kRows, kKeys}, {kRows, kKeys}, {kRows, kKeys}},
         .heads = kHeads,
         .kv_heads = kKvHeads,
         .head_dim = kDim,
         .value_dim = kDim,
         .sinks = true,
         .causal = true,
         .test = BLASST_TEST_RELATIVE,
         .threshold = 0.05f};
  Problem problem(c);
  DeviceProblem device(problem, Reports::kCounts);
  DeviceMemory memory;
  AttentionParams& p = device.params;
  p.problem.kv.starts = memory.copy(starts.data(), 4);
  p.problem.query_lengths = memory.copy(used.data(), 4);
  DeviceProblem::put(p.problem.kv.lengths, ends);
  device.run();
  const std::vector<std::byte> batch = problem.out_bits();
  const std::vector<float> lse = problem.lse;
  const std::vector<int64_t> skipped = problem.tiles_skipped;
  const int64_t row_bytes = kHeads * kDim * 2;
  for (int64_t b = 0; b < 4; ++b) {
    const int64_t keys = ends[b] - starts[b], rows = std::min<int64_t>(used[b], keys);
    const int64_t first = used[b] - rows;
    AttentionParams alone = p;
    const auto from = [](View& view, int64_t offset) {
      view.elements -= offset;
      view.data = static_cast<std::byte*>(view.data) + 2 * offset;
    };
    alone.problem.batch = 1, alone.problem.query_length = rows,
    alone.problem.query_lengths = nullptr;
    from(alone.problem.q, b * p.problem.q.stride_request + first * p.problem.q.stride_token);
    from(alone.problem.out, b * p.problem.out.stride_request + first * p.problem.out.stride_token);
    from(alone.problem.kv.k,
         b * p.problem.kv.k.stride_request + starts[b] * p.problem.kv.k.stride_token);
    from(alone.problem.kv.v,
         b * p.problem.kv.v.stride_request + starts[b] * p.problem.kv.v.stride_token);
    alone.problem.kv.key_length = keys;
    alone.problem.kv.lengths = alone.problem.kv.starts = nullptr;
    alone.report = {.tiles_skipped = p.report.tiles_skipped};
    device.mark();
    prefill(alone);
    device.download();
    const std::vector<std::byte> wanted = problem.out_bits();
    const auto part = [&](const std::vector<std::byte>& bits, int64_t row, int64_t count) {
      const auto begin = bits.begin() + (b * kRows + row) * row_bytes;
      return std::vector<std::byte>(begin, begin + count * row_bytes);
    };
    EXPECT_EQ(part(batch, first, rows), part(wanted, first, rows)) << b;
    EXPECT_EQ(part(batch, 0, first), std::vector<std::byte>(first * row_bytes)) << b;
    EXPECT_EQ(part(batch, used[b], kRows - used[b]),
              std::vector<std::byte>((kRows - used[b]) * row_bytes))
        << b;
    // Rows in use that stand before every key have the sink, rows that are not in use nothing.
    for (int64_t i = 0; i < kRows; ++i) {
      EXPECT_EQ(lse[b * kRows + i] == problem.sinks[0], i < first) << b << ' ' << i;
      EXPECT_EQ(std::isinf(lse[b * kRows + i]), i >= used[b]) << b << ' ' << i;
    }
    for (int64_t h = 0; h < kHeads; ++h)
      EXPECT_EQ(skipped[b * kHeads + h], problem.tiles_skipped[h]) << b << ' ' << h;
  }
}

TEST_F(Calls, FromAStart) {
  Case c{.seed = 5,
         .decode = true,
         .dtype = BLASST_FLOAT16,
         .requests = {{1, 3000}, {1, 3000}, {1, 3000}},
         .heads = 8,
         .kv_heads = 2,
         .head_dim = 128,
         .value_dim = 128,
         .causal = true,
         .test = BLASST_TEST_RELATIVE,
         .threshold = 0.05f};
  Problem problem(c);
  DeviceProblem device(problem, Reports::kCounts);
  const std::vector<int32_t> starts = {0, 100, 2999}, ends = {3000, 2000, 2999};
  DeviceMemory memory;
  AttentionParams& p = device.params;
  p.problem.kv.starts = memory.copy(starts.data(), 3);
  DeviceProblem::put(p.problem.kv.lengths, ends);
  device.run();
  const std::vector<std::byte> batch = problem.out_bits();
  // The second request's keys, moved to the first place.
  p.problem.kv.starts = nullptr;
  const int64_t offset = p.problem.kv.k.stride_request + 100 * p.problem.kv.k.stride_token;
  for (View* view : {&p.problem.kv.k, &p.problem.kv.v}) {
    view->data = static_cast<std::byte*>(view->data) + 2 * (offset - p.problem.kv.k.stride_request);
    view->elements -= 100 * view->stride_token;
  }
  p.problem.kv.key_length -= 100;
  DeviceProblem::put(p.problem.kv.lengths, std::vector<int32_t>{2900, 1900, 0});
  device.run();
  const std::vector<std::byte> moved = problem.out_bits();
  const auto row = [&](const std::vector<std::byte>& bits, int64_t b) {
    const auto size = static_cast<int64_t>(bits.size()) / 3;
    return std::vector<std::byte>(bits.begin() + b * size, bits.begin() + (b + 1) * size);
  };
  EXPECT_EQ(row(batch, 1), row(moved, 1));
  EXPECT_EQ(row(batch, 2), std::vector<std::byte>(batch.size() / 3));
}

TEST_F(Calls, MergeIsExactUpToRounding) {
  constexpr int64_t kBatch = 2, kRows = 37, kHeads = 3, kDim = 72;
  constexpr int64_t kCells = kHeads * kBatch * kRows, kElements = kCells * kDim;
  for (const DType dtype : {BLASST_FLOAT16, BLASST_BFLOAT16}) {
    SeededChoices choose(9);
    const auto number = [&] { return static_cast<float>(choose.between(-1000, 1000)) / 200; };
    std::vector<std::byte> a(2 * kElements), b(2 * kElements), out(2 * kElements);
    for (int64_t i = 0; i < kElements; ++i) {
      store_element(dtype, &a[2 * i], number());
      store_element(dtype, &b[2 * i], number());
    }
    std::vector<float> lse_a(kCells), lse_b(kCells), lse(kCells);
    for (int64_t i = 0; i < kCells; ++i) {
      lse_a[i] = i % 7 == 0 ? -INFINITY : 4 * number();
      lse_b[i] = i % 5 == 0 ? -INFINITY : 4 * number();
    }
    DeviceMemory memory;
    const auto view = [&](const std::vector<std::byte>& host) {
      return View{.data = memory.copy(host.data(), host.size()),
                  .dtype = dtype,
                  .elements = kElements,
                  .stride_request = kRows * kHeads * kDim,
                  .stride_token = kHeads * kDim,
                  .stride_head = kDim};
    };
    MergeParams p{
        .batch = kBatch, .query_length = kRows, .heads = kHeads, .value_dim = kDim};  // by memory
    p.out_a = view(a), p.out_b = view(b), p.out = view(out);
    p.lse_a = memory.copy(lse_a.data(), lse_a.size());
    p.lse_b = memory.copy(lse_b.data(), lse_b.size());
    p.lse = memory.copy(lse.data(), lse.size());
    merge(p);
    synchronize();
    DeviceMemory::read(out.data(), p.out.data, out.size());
    DeviceMemory::read(lse.data(), p.lse, lse.size() * sizeof(float));
    for (int64_t row = 0; row < kBatch * kRows; ++row) {
      for (int64_t h = 0; h < kHeads; ++h) {
        const int64_t cell = h * kBatch * kRows + row;
        const double x = std::exp(double{lse_a[cell]}), y = std::exp(double{lse_b[cell]});
        if (x + y == 0)
          EXPECT_EQ(lse[cell], -INFINITY);
        else
          EXPECT_NEAR(lse[cell], std::log(x + y), 1e-5);
        for (int64_t d = 0; d < kDim; ++d) {
          const int64_t at = 2 * ((row * kHeads + h) * kDim + d);
          const double wanted =
              x + y == 0
                  ? 0
                  : (x * load_element(dtype, &a[at]) + y * load_element(dtype, &b[at])) / (x + y);
          EXPECT_NEAR(load_element(dtype, &out[at]), wanted,
                      1e-5 + unit_roundoff(dtype) * std::abs(wanted));
        }
      }
    }
    // In place.
    p.out = p.out_a;
    merge(p);
    synchronize();
    DeviceMemory::read(a.data(), p.out.data, a.size());
    EXPECT_EQ(a, out);
  }
}

// --- what fails, fails whole -------------------------------------------------------------------

// Runs `call`, which must fail: the error says `part`, no error is left to the caller.
template <typename Call>
void expect_failure(blasst_status status, const std::string& part, const Call& call) {
  try {
    call();
    ADD_FAILURE() << "accepted: " << part;
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), status) << error.what();
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
  EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess) << part;
}

// Any kind of call, with all arrays that a call of its kind may have.
struct AnyCall {
  explicit AnyCall(bool decode, Layout layout) : problem(case_of(decode, layout)), device(problem) {
    AttentionParams& p = device.params;
    if (!decode && layout == Layout::kDense) {
      p.problem.kv.starts = memory.copy(std::vector<int32_t>(4, 0).data(), 4);
      p.problem.query_lengths = memory.copy(std::vector<int32_t>(4, 2).data(), 4);
    }
  }

  // Everything that a call may write.
  auto outputs() {
    device.download();
    return std::tuple(problem.out_bits(), problem.lse, problem.dropped_mass_bound,
                      problem.tiles_visitable, problem.tiles_skipped, problem.tile_bits,
                      problem.gap_histogram, problem.tile_maxima);
  }

  static Case case_of(bool decode, Layout layout) {
    Case c = paged_case(decode);
    c.layout = layout;
    c.ragged_queries = layout == Layout::kRagged;
    c.bands = !decode;
    c.sinks = true;
    c.test = BLASST_TEST_RELATIVE;
    c.threshold = 0.1f;
    return c;
  }

  Problem problem;
  DeviceMemory memory;
  DeviceProblem device;
};

TEST_F(Calls, MemoryOfTheHostIsRefusedInAnyArray) {
  alignas(256) static std::byte host[4096];
  for (const bool decode : {false, true}) {
    for (const Layout layout : {Layout::kDense, Layout::kRagged, Layout::kPaged}) {
      AnyCall any(decode, layout);
      AttentionParams& p = any.device.params;
      any.device.mark();
      const auto before = any.outputs();
      int tried = 0;
      const auto try_array = [&](const char* name, auto& array) {
        if (!array) return;
        using Pointer = std::remove_reference_t<decltype(array)>;
        const Pointer good = std::exchange(array, static_cast<Pointer>(static_cast<void*>(host)));
        expect_failure(BLASST_INVALID_ARGUMENT, std::string(name) + " is host memory",
                       [&] { any.device.launch(); });
        array = good;
        ++tried;
      };
      try_array("q.data", p.problem.q.data);
      try_array("out.data", p.problem.out.data);
      try_array("k.data", p.problem.kv.k.data);
      try_array("v.data", p.problem.kv.v.data);
      try_array("cu_seqlens_q", p.problem.cu_seqlens_q);
      try_array("query_lengths", p.problem.query_lengths);
      try_array("kv.starts", p.problem.kv.starts);
      try_array("kv.lengths", p.problem.kv.lengths);
      try_array("kv.cu_seqlens", p.problem.kv.cu_seqlens);
      try_array("kv.page_table", p.problem.kv.page_table);
      try_array("sinks", p.problem.sinks);
      try_array("mask.bands", p.problem.mask.bands);
      try_array("test.values", p.decision.test.values);
      try_array("report.lse", p.report.lse);
      try_array("report.dropped_mass_bound", p.report.dropped_mass_bound);
      try_array("report.tiles_visitable", p.report.tiles_visitable);
      try_array("report.tiles_skipped", p.report.tiles_skipped);
      try_array("report.tile_bits", p.report.tile_bits);
      try_array("report.gap_histogram", p.report.gap_histogram);
      try_array("report.tile_maxima", p.report.tile_maxima);
      try_array("workspace", p.execution.workspace);
      EXPECT_GE(tried, 13);
      EXPECT_EQ(any.outputs(), before);
      any.device.run();  // the device is still there
    }
  }
}

TEST_F(Calls, MemoryOfTheHostIsRefusedByMergeAndPageCheck) {
  Problem problem(paged_case(false));
  DeviceProblem device(problem);
  const AttentionParams& p = device.params;
  std::vector<float> host(1 << 16);
  auto* found = reinterpret_cast<int32_t*>(host.data());
  expect_failure(BLASST_INVALID_ARGUMENT, "found is host memory",
                 [&] { check_pages(p.problem, found, nullptr); });
  blasst::Problem paged = p.problem;
  paged.kv.lengths = found;
  expect_failure(BLASST_INVALID_ARGUMENT, "kv.lengths is host memory", [&] {
    check_pages(paged, static_cast<int32_t*>(p.execution.workspace), nullptr);
  });
  DeviceMemory memory;
  MergeParams m{.batch = p.problem.batch,
                .query_length = p.problem.query_length,
                .heads = p.problem.heads,
                .value_dim = p.problem.value_dim,
                .out_a = p.problem.out,
                .out_b = memory.copy(p.problem.out),
                .lse_a = p.report.lse,
                .lse_b = p.report.dropped_mass_bound,
                .out = p.problem.out,
                .execution = {.backend = BLASST_BACKEND_CUDA}};
  m.lse = host.data();
  expect_failure(BLASST_INVALID_ARGUMENT, "lse is host memory", [&] { merge(m); });
  m.lse = nullptr, m.lse_b = host.data();
  expect_failure(BLASST_INVALID_ARGUMENT, "lse_b is host memory", [&] { merge(m); });
}

// The runtime remembers the newest error of a thread. The caller's is not thrown as ours, and what
// is left there afterwards is not ours.
TEST_F(Calls, AnEarlierErrorOfTheCallerIsNotOurs) {
  for (const bool decode : {false, true}) {
    for (const Layout layout : {Layout::kDense, Layout::kPaged}) {
      AnyCall any(decode, layout);
      any.device.run();
      const std::vector<std::byte> bits = any.problem.out_bits();
      any.device.mark();
      void* nothing = nullptr;
      EXPECT_EQ(cudaMalloc(&nothing, size_t{1} << 60), cudaErrorMemoryAllocation);
      any.device.launch();
      backends();
      const cudaError_t left = cudaGetLastError();
      EXPECT_TRUE(left == cudaErrorMemoryAllocation || left == cudaSuccess) << left;
      any.device.download();
      EXPECT_EQ(any.problem.out_bits(), bits);
    }
  }
}

// A thread has no context before its first call that needs one.
TEST_F(Calls, FirstOfTheirThread) {
  for (const bool decode : {false, true}) {
    Problem problem(paged_case(decode));
    DeviceProblem device(problem);
    device.mark();
    std::string failure;
    std::thread([&] {
      try {
        device.launch();
      } catch (const std::exception& error) {
        failure = error.what();
      }
    }).join();
    EXPECT_EQ(failure, "");
    device.download();
    EXPECT_EQ(compare_on_gpu(problem).mismatch, "");
  }
}

// A stream whose capture was broken takes nothing.
TEST_F(Calls, NothingIsWrittenWhereLaunchingFails) {
  for (const bool decode : {false, true}) {
    for (const Layout layout : {Layout::kDense, Layout::kRagged}) {
      AnyCall any(decode, layout);
      any.device.mark();
      const auto before = any.outputs();
      cudaStream_t stream;
      must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
      EXPECT_NE(cudaStreamSynchronize(stream), cudaSuccess);
      cudaGetLastError();
      any.device.params.execution.stream = stream;
      expect_failure(BLASST_INTERNAL, "capture", [&] { any.device.launch(); });
      cudaGraph_t graph = nullptr;
      EXPECT_NE(cudaStreamEndCapture(stream, &graph), cudaSuccess);
      cudaGetLastError();
      must(cudaStreamDestroy(stream));
      any.device.params.execution.stream = nullptr;
      EXPECT_EQ(any.outputs(), before);
      any.device.run();
    }
  }
}

// The current device counts: its memory is taken, another's is refused, the bits are the same, in a
// graph, too.
TEST_F(Calls, SecondDevice) {
  int devices = 0;
  must(cudaGetDeviceCount(&devices));
  if (devices < 2) GTEST_SKIP() << "one device";
  for (const bool decode : {false, true}) {
    for (const Layout layout : {Layout::kDense, Layout::kRagged, Layout::kPaged}) {
      AnyCall first(decode, layout);
      first.device.run();
      const auto wanted = first.outputs();
      must(cudaSetDevice(1));
      expect_failure(BLASST_INVALID_ARGUMENT,
                     "q.data is on device 0; it must be memory of the current device, 1",
                     [&] { first.device.launch(); });
      {
        AnyCall second(decode, layout);
        second.device.run();
        EXPECT_EQ(second.outputs(), wanted);
        if (layout == Layout::kPaged) EXPECT_EQ(check(second.device), std::vector<int32_t>(4, 0));
        Graph graph([&](cudaStream_t stream) {
          second.device.params.execution.stream = stream;
          second.device.launch();
        });
        second.device.mark();
        graph.replay();
        EXPECT_EQ(second.outputs(), wanted);
      }
      must(cudaSetDevice(0));
      first.device.run();
      EXPECT_EQ(first.outputs(), wanted);
    }
  }
}

}  // namespace
}  // namespace blasst::check
