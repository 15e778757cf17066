// A fuzzer's bytes choose a small problem. Left whole, its result must agree with the reference;
// with one parameter bent, the call must either be refused with nothing written, or work.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>

#include "testing/calls.h"
#include "testing/compare.h"

namespace {

using namespace blasst;
using check::Problem;

class Bytes : public check::Choices {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  int64_t between(int64_t least, int64_t most) override {
    const auto range = static_cast<uint64_t>(most - least);
    uint64_t bits = 0;
    for (uint64_t left = range; left > 0; left >>= 8) bits = bits << 8 | next();
    return least + static_cast<int64_t>(range == UINT64_MAX ? bits : bits % (range + 1));
  }

 private:
  uint8_t next() { return size_ == 0 ? 0 : (--size_, *data_++); }

  const uint8_t* data_;
  size_t size_;
};

int64_t odd_number(check::Choices& choose) {
  constexpr auto kMost = std::numeric_limits<int64_t>::max();
  return choose.pick<int64_t>({0, 1, -1, 2, 3, 7, 8, 63, 65, 1 << 20, int64_t{1} << 31,
                               int64_t{1} << 40, kMost, -kMost, choose.between(-300, 300)});
}

float odd_scale(check::Choices& choose) {
  using Float = std::numeric_limits<float>;
  return choose.pick({0.0f, -1.0f, Float::quiet_NaN(), Float::infinity(), Float::max(),
                      Float::min(), Float::denorm_min(), 1.0f});
}

// Any entry of an index array, if it has one.
void bend(std::vector<int32_t>& indices, check::Choices& choose) {
  if (indices.empty()) return;
  indices[choose.between(0, std::ssize(indices) - 1)] = static_cast<int32_t>(odd_number(choose));
}

// A stride that is smaller than it was, or larger than any.
void bend(Mask& mask, check::Choices& choose) {
  int64_t& stride = choose.one_in(2) ? mask.blocks_stride_head : mask.blocks_stride_query_tile;
  constexpr auto kMost = std::numeric_limits<int64_t>::max();
  stride = choose.pick<int64_t>({0, -1, stride / 2, stride - 1, kMost, kMost / 2, -kMost});
}

// Changes one parameter. Not those that say how large a caller's buffer is: no library can check
// them.
void bend(Problem& problem, check::Choices& choose) {
  AttentionParams& p = problem.params;
  View* const views[] = {&p.problem.q, &p.problem.out, &p.problem.kv.k, &p.problem.kv.v};
  View& view = *views[choose.between(0, 3)];
  const auto number = static_cast<float>(odd_number(choose));
  switch (choose.between(0, 33)) {
    case 0:
      view.stride_request = odd_number(choose);
      break;
    case 1:
      view.stride_token = odd_number(choose);
      break;
    case 2:
      view.stride_head = odd_number(choose);
      break;
    case 3:
      view.data = nullptr;
      break;
    case 4:
      view.elements = std::min(view.elements, odd_number(choose));
      break;
    case 5:
      p.problem.head_dim = odd_number(choose);
      break;
    case 6:
      p.problem.value_dim = odd_number(choose);
      break;
    case 7:
      p.problem.query_length = odd_number(choose);
      break;
    case 8:
      p.problem.kv.key_length = odd_number(choose);
      break;
    case 9:
      p.problem.kv.page_size = odd_number(choose);
      break;
    case 10:
      p.problem.kv.pages = odd_number(choose);
      break;
    case 11:
      p.problem.scale = number;
      break;
    case 12:
      p.problem.softcap = number;
      break;
    case 13:
      p.problem.mask.window_left = odd_number(choose);
      break;
    case 14:
      p.problem.mask.window_right = odd_number(choose);
      break;
    case 15:
      p.problem.mask.causal = static_cast<int32_t>(odd_number(choose));
      break;
    case 16:
      p.decision.order = static_cast<Order>(odd_number(choose));
      break;
    case 17:
      p.decision.test.kind = static_cast<TestKind>(odd_number(choose));
      break;
    case 18:
      bend(problem.lengths, choose), bend(problem.starts, choose);
      bend(problem.query_lengths, choose);
      break;
    case 19:
      bend(problem.cu_keys, choose), bend(problem.cu_queries, choose);
      break;
    case 20:
      bend(problem.page_table, choose);
      break;
    case 21:
      p.problem.kv_heads = odd_number(choose);
      break;
    case 22:
      if (!problem.sinks.empty()) problem.sinks[0] = number * std::numeric_limits<float>::max();
      break;
    case 23:
      if (!problem.bands.empty()) problem.bands[choose.between(0, 1)] = odd_number(choose);
      break;
    case 24:
      p.problem.q.dtype =
          static_cast<DType>(odd_number(choose) | 4);  // none: another would be a larger buffer
      break;
    case 25:
      p.problem.rows = odd_number(choose);
      break;
    case 26:
      p.problem.kv.tokens = odd_number(choose);
      break;
    case 27:
      p.problem.query_layout = static_cast<blasst_layout>(odd_number(choose));
      break;
    case 28:
      p.problem.kv.layout = static_cast<blasst_layout>(odd_number(choose));
      break;
    case 29:
      p.decision.scores = static_cast<Scores>(odd_number(choose));
      break;
    case 30:  // of 8 bits, or none
      (choose.one_in(2) ? p.problem.kv.k : p.problem.kv.v).dtype = static_cast<DType>(
          choose.pick<int64_t>({BLASST_INT8, BLASST_FLOAT8_E4M3, odd_number(choose) | 8}));
      break;
    case 31:
      if (!problem.k_scales.empty()) problem.k_scales[0] = odd_scale(choose);
      if (!problem.v_scales.empty()) problem.v_scales[0] = odd_scale(choose);
      break;
    case 32:
      (choose.one_in(2) ? p.problem.k_scales : p.problem.v_scales).stride_head =
          choose.pick<int64_t>({0, -1, std::numeric_limits<int64_t>::max()});
      break;
    default:
      if (!problem.thresholds.empty())
        problem.thresholds[0] =
            choose.one_in(4) ? std::numeric_limits<float>::quiet_NaN() : number / 8;
  }
}

[[noreturn]] void fail(const Problem& problem, const std::string& what) {
  std::fprintf(stderr, "%s\n  %s\n", what.c_str(), check::describe(problem.description).c_str());
  std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  const bool bent = bytes.one_in(2);
  check::Case c = check::random_case(bytes, 200'000);
  c.threads = static_cast<int>(bytes.between(1, 2));
  // The block mask's buffer fits the lengths as they were: with it, only its strides are bent.
  const bool bent_mask = bent && bytes.one_in(10);
  if (bent) c.blocks = bent_mask;
  check::Problem problem(c);
  if (!bent) {
    problem.run();
    std::string mismatch = check::compare(problem).mismatch;
    if (mismatch.empty()) mismatch = check::check_calls(problem, bytes);
    if (!mismatch.empty()) fail(problem, mismatch);
    return 0;
  }
  problem.params.report = {};  // sized for the problem as it was
  bent_mask ? bend(problem.params.problem.mask, bytes) : bend(problem, bytes);
  try {
    problem.run();
  } catch (const Error& error) {
    if (problem.wrote_anything()) fail(problem, "refused, but something was written");
    if (std::string(error.what()).empty()) fail(problem, "refused without a message");
  }
  return 0;
}
