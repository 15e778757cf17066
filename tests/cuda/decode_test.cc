// The sm_90 decode kernels on a GPU: against the reference, and against themselves.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "attention/tiles.h"
#include "check/compare.h"
#include "cuda/sm90/decode/launch.h"
#include "cuda/sm90/decode/schedule.h"

namespace blasst::check {
namespace {

namespace decode = cuda::decode;

void must(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

// An array on the device.
template <typename T>
class Array {
 public:
  Array() = default;
  explicit Array(size_t count) : count_(count) {
    void* data;
    must(cudaMalloc(&data, std::max<size_t>(1, count) * sizeof(T)));
    data_.reset(static_cast<T*>(data));
  }
  Array(const T* host, size_t count) : Array(count) { upload(host); }
  explicit Array(const std::vector<T>& host) : Array(host.data(), host.size()) {}

  T* get() const { return data_.get(); }
  T* or_null() const { return count_ ? data_.get() : nullptr; }
  void upload(const T* host) {
    must(cudaMemcpy(data_.get(), host, count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  void download(T* host) const {
    must(cudaMemcpy(host, data_.get(), count_ * sizeof(T), cudaMemcpyDeviceToHost));
  }

 private:
  struct Free {
    void operator()(T* data) const { cudaFree(data); }
  };
  size_t count_ = 0;
  std::unique_ptr<T, Free> data_;
};

TileShape shape_of(const Problem& problem) {
  const PrefillParams& p = problem.params;
  const int rows = static_cast<int>(p.heads / p.kv_heads * p.query_length);
  return {rows, decode::kTileKeys, decode::least_split_tiles(rows),
          decode::most_splits(static_cast<int>(p.kv_heads))};
}

// A problem's tensors on the device.
class Device {
 public:
  explicit Device(Problem& problem, bool report = true)
      : problem_(problem), p_(problem.params), report_(report) {
    q_ = copy(p_.q), out_ = copy(p_.out), k_ = copy(p_.kv.k), v_ = copy(p_.kv.v);
    lengths_ = Array<int32_t>(problem.lengths);
    cu_keys_ = Array<int32_t>(problem.cu_keys);
    page_table_ = Array<int32_t>(problem.page_table);
    thresholds_ = Array<float>(problem.thresholds);
    sinks_ = Array<float>(problem.sinks);
    lse_ = Array<float>(problem.lse.size());
    bound_ = Array<float>(problem.dropped_mass_bound.size());
    visitable_ = Array<int64_t>(problem.tiles_visitable.size());
    skipped_ = Array<int64_t>(problem.tiles_skipped.size());
    bits_ = Array<uint32_t>(problem.tile_bits.size());
    gaps_ = Array<uint64_t>(problem.gap_histogram.size());
    launch_ = describe();
    const decode::Params& d = launch_.params;
    launch_.workspace_bytes = decode::workspace_bytes(d.batch, d.heads, d.kv_heads, d.query_length,
                                                      d.key_length, launch_.dim);
    workspace_ = Array<std::byte>(launch_.workspace_bytes);
    must(cudaMemset(workspace_.get(), 0xff, launch_.workspace_bytes));
    launch_.workspace = workspace_.get();
  }

  decode::Launch& launch() { return launch_; }
  Array<int32_t>& lengths() { return lengths_; }
  Array<float>& thresholds() { return thresholds_; }

  // Marks the outputs, runs, and reads everything back into the problem.
  void run() {
    mark();
    decode::launch(launch_);
    must(cudaDeviceSynchronize());
    download();
  }

  void mark() {
    problem_.mark_outputs();
    out_.upload(static_cast<const std::byte*>(p_.out.data));
  }

  void download() {
    out_.download(static_cast<std::byte*>(p_.out.data));
    lse_.download(problem_.lse.data());
    visitable_.download(problem_.tiles_visitable.data());
    skipped_.download(problem_.tiles_skipped.data());
    if (!report_) return;
    bound_.download(problem_.dropped_mass_bound.data());
    bits_.download(problem_.tile_bits.data());
    gaps_.download(problem_.gap_histogram.data());
  }

 private:
  Array<std::byte> copy(const View& view) const {
    return {static_cast<const std::byte*>(view.data), static_cast<size_t>(view.elements) * 2};
  }

  decode::Launch describe() const {
    const KeysValues& kv = p_.kv;
    const auto tensor = [](const Array<std::byte>& data, const View& view, int64_t outer,
                           int64_t tokens, int64_t heads) {
      return decode::Tensor{data.get(),        outer,           tokens, heads, view.stride_request,
                            view.stride_token, view.stride_head};
    };
    int64_t outer = p_.batch, tokens = kv.key_length, most = kv.key_length;
    if (kv.cu_seqlens) outer = 1, tokens = problem_.cu_keys.back();
    if (kv.page_table) outer = kv.pages, tokens = kv.page_size;
    if (!kv.lengths || kv.page_table)
      for (const Lengths& r : problem_.description.requests) most = std::max(most, r.keys);
    decode::Launch l{};
    l.q = tensor(q_, p_.q, p_.batch, p_.query_length, p_.heads);
    l.k = tensor(k_, kv.k, outer, tokens, p_.kv_heads);
    l.v = tensor(v_, kv.v, outer, tokens, p_.kv_heads);
    l.element = p_.dtype == BLASST_FLOAT16 ? decode::Element::kHalf : decode::Element::kBFloat16;
    l.dim = static_cast<int>(p_.head_dim);
    const auto distances = attention::allowed_distances(p_.mask, nullptr);
    const auto limited = [](int64_t x) {
      return static_cast<int>(std::clamp<int64_t>(x, -decode::kUnlimited, decode::kUnlimited));
    };
    l.params = {
        .batch = static_cast<int>(p_.batch),
        .heads = static_cast<int>(p_.heads),
        .kv_heads = static_cast<int>(p_.kv_heads),
        .query_length = static_cast<int>(p_.query_length),
        .out = out_.get(),
        .out_stride_request = p_.out.stride_request,
        .out_stride_token = p_.out.stride_token,
        .out_stride_head = p_.out.stride_head,
        .key_length = static_cast<int>(most),
        .lengths = kv.lengths ? lengths_.get() : nullptr,
        .cu_seqlens_k = kv.cu_seqlens ? cu_keys_.get() : nullptr,
        .page_table = kv.page_table ? page_table_.get() : nullptr,
        .page_table_stride = kv.page_table_stride,
        .page_size = static_cast<int>(kv.page_size),
        .pages = static_cast<int>(kv.pages),
        .scale = p_.scale > 0 ? p_.scale : 1 / std::sqrt(static_cast<float>(p_.head_dim)),
        .softcap = p_.softcap,
        .sinks = sinks_.or_null(),
        .least_distance = limited(distances.least),
        .most_distance = limited(distances.most),
        .order = p_.order,
        .test = p_.test.kind,
        .thresholds = thresholds_.or_null(),
        .threshold_stride_request = p_.test.stride_request,
        .threshold_stride_head = p_.test.stride_head,
        .lse = lse_.get(),
        .dropped_mass_bound = report_ ? bound_.get() : nullptr,
        .visitable = reinterpret_cast<unsigned long long*>(visitable_.get()),
        .skipped = reinterpret_cast<unsigned long long*>(skipped_.get()),
        .tile_bits = report_ ? bits_.get() : nullptr,
        .tile_words = static_cast<int>(problem_.tile_bits.size() /
                                       std::max<int64_t>(1, p_.kv_heads * p_.batch)),
        .gap_histogram = report_ ? reinterpret_cast<unsigned long long*>(gaps_.get()) : nullptr,
        .page_error = nullptr};
    return l;
  }

  Problem& problem_;
  const PrefillParams& p_;
  bool report_;
  Array<std::byte> q_, out_, k_, v_, workspace_;
  Array<int32_t> lengths_, cu_keys_, page_table_;
  Array<float> thresholds_, sinks_, lse_, bound_;
  Array<int64_t> visitable_, skipped_;
  Array<uint32_t> bits_;
  Array<uint64_t> gaps_;
  decode::Launch launch_;
};

struct Seen {
  int64_t decisions = 0, skipped = 0, rounded = 0;
};

void expect_agreement(const Case& c, Seen& seen) {
  Problem problem(c);
  Device(problem).run();
  const Comparison comparison = compare(problem, shape_of(problem), kTensorCoreRoundoff);
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
  c.ragged_queries = c.bands = c.blocks = false;
  c.dtype = choose.pick({BLASST_FLOAT16, BLASST_BFLOAT16});
  c.head_dim = c.value_dim = choose.pick<int64_t>({64, 128, 128, 256});
  c.page_size = choose.pick<int64_t>({16, 32, 64, 128, 256});
  c.padding = 8 * choose.between(0, 2);
  const int64_t group = c.heads / c.kv_heads;
  const int64_t queries =
      choose.one_in(2) ? 1 : choose.between(1, std::min<int64_t>(16, 64 / group));
  const int64_t most = budget / (c.heads * 2 * c.head_dim * queries * std::ssize(c.requests));
  for (Lengths& r : c.requests) {
    r.queries = queries;
    if (choose.one_in(2)) r.keys = choose.between(1, std::max<int64_t>(most, 1));
    r.keys = std::min(r.keys, most);
  }
  return c;
}

class DecodeKernels : public testing::Test {
 protected:
  void SetUp() override {
    int device, major = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        major != 9)
      GTEST_SKIP() << "needs a GPU of compute capability 9.0";
  }
};

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

class DecodeDim : public DecodeKernels, public testing::WithParamInterface<int64_t> {};

TEST_P(DecodeDim, EveryRatio) {
  Seen seen;
  const int64_t dim = GetParam();
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
      for (const int64_t keys : {200, 1300}) {
        if (group * queries > 32 && dtype == BLASST_FLOAT16 && keys > 200) continue;  // for time
        expect_agreement({.seed = 7,
                          .decode = true,
                          .dtype = dtype,
                          .requests = {{queries, keys}},
                          .heads = group,
                          .kv_heads = 1,
                          .head_dim = dim,
                          .value_dim = dim,
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
INSTANTIATE_TEST_SUITE_P(, DecodeDim, testing::Values(64, 128, 256));

// Many short requests: work items are groups of splits, not splits.
TEST_F(DecodeKernels, GroupsOfSplits) {
  Seen seen;
  for (const int64_t group : {4, 12}) {
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
    for (int64_t b = 0; b < 70; ++b) c.requests.push_back({1, 17 * b + b * b % 700});
    c.requests.push_back({1, 6000});
    expect_agreement(c, seen);
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

std::vector<std::byte> bits_of(const Case& c, bool report) {
  Problem problem(c);
  Device(problem, report).run();
  return problem.out_bits();
}

TEST_F(DecodeKernels, DenseIsThresholdZeroIsReported) {
  for (const int64_t dim : {64, 128, 256}) {
    Case c = mixed_case();
    c.head_dim = c.value_dim = dim;
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
  const std::vector<std::byte> bits = bits_of(mixed_case(), false);
  for (int run = 0; run < 20; ++run) EXPECT_EQ(bits_of(mixed_case(), run % 2), bits);
  for (const Layout layout : {Layout::kRagged, Layout::kPaged}) {
    for (const int64_t page_size : {16, 32, 64, 128, 256}) {
      Case c = mixed_case();
      c.layout = layout, c.page_size = page_size, c.head_major = page_size % 64 == 0;
      EXPECT_EQ(bits_of(c, false), bits) << describe(c);
    }
  }
}

// Alone a request's work items are splits, in a large batch groups of splits.
TEST_F(DecodeKernels, SameBitsAloneAndInAnyBatch) {
  Case c = mixed_case();
  c.per_request = c.per_head = false;
  c.requests = {{2, 5000}};
  const std::vector<std::byte> alone = bits_of(c, false);
  c.requests.assign(90, {2, 5000});
  for (size_t b = 1; b < c.requests.size(); ++b) c.requests[b].keys = static_cast<int64_t>(50 * b);
  std::vector<std::byte> batch = bits_of(c, false);
  batch.resize(alone.size());
  EXPECT_EQ(batch, alone);
}

TEST_F(DecodeKernels, GraphSeesNewLengthsAndThresholds) {
  Case c = mixed_case();
  c.layout = Layout::kPaged;
  Problem problem(c);
  Device device(problem, false);
  cudaStream_t stream;
  must(cudaStreamCreate(&stream));
  device.launch().stream = stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  decode::launch(device.launch());
  must(cudaStreamEndCapture(stream, &graph));
  must(cudaGraphInstantiate(&replay, graph, 0));
  for (const float shrink : {1.0f, 0.5f, 0.1f}) {
    std::vector<int32_t> lengths = problem.lengths;
    std::vector<float> thresholds = problem.thresholds;
    for (int32_t& x : lengths) x = static_cast<int32_t>(static_cast<float>(x) * shrink);
    for (float& x : thresholds) x *= shrink;
    device.lengths().upload(lengths.data());
    device.thresholds().upload(thresholds.data());
    device.mark();
    must(cudaGraphLaunch(replay, stream));
    must(cudaStreamSynchronize(stream));
    device.download();
    const std::vector<std::byte> replayed = problem.out_bits();
    device.run();
    EXPECT_EQ(replayed, problem.out_bits());
  }
  must(cudaGraphExecDestroy(replay));
  must(cudaGraphDestroy(graph));
  must(cudaStreamDestroy(stream));
}

TEST_F(DecodeKernels, NotANumber) {
  for (const int64_t key : {5, 700, 1000}) {
    for (const bool value : {false, true}) {
      Case c = mixed_case();
      c.requests = {{1, 1100}};
      Problem problem(c);
      const Access access(problem.params);
      std::memset(value ? access.value(0, key, 1) : access.key(0, key, 1), 0xff, 2);
      Device(problem).run();
      EXPECT_EQ(compare(problem, shape_of(problem), kTensorCoreRoundoff).mismatch, "")
          << key << value;
    }
  }
}

TEST_F(DecodeKernels, PageOutOfRangeIsReported) {
  Case c = mixed_case();
  c.layout = Layout::kPaged;
  Problem problem(c);
  const auto pages = static_cast<int32_t>(problem.params.kv.pages);
  for (const int32_t id : {0, pages + 7, -3}) {
    problem.page_table[2 * problem.params.kv.page_table_stride + 5] = id;
    Device device(problem, false);
    Array<int32_t> error(std::vector<int32_t>(4, 0));
    device.launch().params.page_error = error.get();
    device.run();
    std::vector<int32_t> found(4);
    error.download(found.data());
    EXPECT_EQ(found, id == 0 ? std::vector<int32_t>(4, 0) : (std::vector<int32_t>{1, 2, 5, id}));
  }
}

TEST_F(DecodeKernels, WorkspaceTooSmall) {
  Problem problem(mixed_case());
  Device device(problem, false);
  device.launch().workspace_bytes -= 1;
  EXPECT_THROW(decode::launch(device.launch()), Error);
}

}  // namespace
}  // namespace blasst::check
