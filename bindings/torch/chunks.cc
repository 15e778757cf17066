// torch.ops.blasst.chunks_*: chunks of keys and the choice among them, as blasst/chunks.hpp has
// them. State goes in and comes out as tensors. On the CPU.
#include "blasst/chunks.hpp"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include "tensors.h"

namespace {

using namespace blasst::binding;

int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

blasst::HeadRows rows_of(std::string_view name, Tensor& t) {
  check(t.dim() == 3, name, " is ", t, "; it must be [rows, heads, head_dim] of one request");
  const blasst::DType dtype = dtype_of(name, t);
  t = readable(t);
  const blasst::View view = view_of(t);
  return {.dtype = dtype,
          .data = view.data,
          .elements = view.elements,
          .rows = t.size(0),
          .heads = t.size(1),
          .head_dim = t.size(2),
          .stride_row = view.stride_token,
          .stride_head = view.stride_head};
}

// The predictor's arrays follow each other in one tensor, in the order of the struct.
blasst::BoundaryPredictor predictor_of(Tensor& weights, int64_t inputs, int64_t window,
                                       int64_t features, int64_t hidden) {
  const std::array sizes{
      inputs * features, window, window, (4 * features + 1) * hidden, hidden, hidden, int64_t{1}};
  int64_t total = 0;
  for (const int64_t size : sizes) total += size;
  check(weights.dim() == 1 && weights.size(0) == total, "predictor is ", weights, "; for inputs ",
        inputs, ", window ", window, ", features ", features, ", hidden ", hidden, " it must be [",
        total, "]");
  check_type("predictor", weights, ScalarType::Float);
  weights = torch::stable::contiguous(weights);
  const auto* at = static_cast<const float*>(weights.const_data_ptr());
  std::array<const float*, sizes.size()> parts{};
  for (size_t i = 0; i < sizes.size(); ++i) parts[i] = std::exchange(at, at + sizes[i]);
  return {.inputs = inputs,
          .window = window,
          .features = features,
          .hidden = hidden,
          .projection = parts[0],
          .left = parts[1],
          .right = parts[2],
          .weight1 = parts[3],
          .bias1 = parts[4],
          .weight2 = parts[5],
          .bias2 = *parts[6]};
}

struct Rule {
  blasst::BoundaryPredictor predictor;
  blasst::ChunkRule rule;
};

void read_rule(Rule& r, std::string_view chunker, int64_t least, int64_t most, double threshold,
               OptionalTensor& predictor, const std::vector<int64_t>& shape) {
  r.rule.chunker =
      choose("chunker", chunker,
             std::array{std::pair{std::string_view("fixed"), BLASST_CHUNKS_FIXED},
                        std::pair{std::string_view("shift"), BLASST_CHUNKS_SHIFT},
                        std::pair{std::string_view("trained"), BLASST_CHUNKS_TRAINED}});
  r.rule.least = least;
  r.rule.most = most;
  r.rule.threshold = static_cast<float>(threshold);
  check(predictor.has_value() == (r.rule.chunker == BLASST_CHUNKS_TRAINED),
        "predictor goes with the chunker 'trained', and with no other");
  if (!predictor) return;
  check(shape.size() == 4, "predictor_shape must be [inputs, window, features, hidden]");
  for (const int64_t size : shape)
    check(size > 0 && size < (1 << 20), "predictor_shape is ", std::span(shape),
          "; each must be positive");
  r.predictor = predictor_of(*predictor, shape[0], shape[1], shape[2], shape[3]);
  r.rule.predictor = &r.predictor;
}

// A view of what the tensors hold, which become contiguous.
blasst::ChunkView chunks_of(Tensor& starts, Tensor& sums, int64_t keys) {
  check(keys >= 0 && keys <= std::numeric_limits<int32_t>::max(), "keys is ", keys,
        "; it must be the number of keys that the chunks cover");
  check(starts.dim() == 1, "starts is ", starts, "; it must be [chunks]");
  check_type("starts", starts, ScalarType::Int);
  check(sums.dim() == 3 && sums.size(0) == starts.size(0), "sums is ", sums,
        "; it must be [chunks, kv_heads, head_dim] with chunks ", starts.size(0));
  check_type("sums", sums, ScalarType::Float);
  starts = torch::stable::contiguous(starts);
  sums = torch::stable::contiguous(sums);
  return {keys,
          {static_cast<const int32_t*>(starts.const_data_ptr()), size_t(starts.numel())},
          {static_cast<const float*>(sums.const_data_ptr()), size_t(sums.numel())}};
}

// A few of the keys, to know a request by: spread over all, the same from step to step as far as
// can be, and the newest.
Tensor sample_of(const Tensor& key, const blasst::HeadRows& rows, int64_t keys) {
  const int64_t step =
      int64_t{1} << std::max(0, static_cast<int>(std::bit_width(uint64_t(keys))) - 4);
  std::vector<int64_t> chosen;
  for (int64_t row = 0; row < keys; row += step) chosen.push_back(row);
  for (int64_t row = std::max<int64_t>(0, keys - 4); row < keys; ++row) chosen.push_back(row);
  Tensor sample = torch::stable::new_empty(
      key, std::vector<int64_t>{std::ssize(chosen), rows.heads, rows.head_dim}, key.scalar_type());
  const int64_t element = element_bytes(rows.dtype), bytes = rows.head_dim * element;
  auto* to = static_cast<std::byte*>(sample.mutable_data_ptr());
  for (const int64_t row : chosen) {
    for (int64_t head = 0; head < rows.heads; ++head, to += bytes)
      std::memcpy(to,
                  static_cast<const std::byte*>(rows.data) +
                      (row * rows.stride_row + head * rows.stride_head) * element,
                  bytes);
  }
  return sample;
}

bool same_bits(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.numel() == b.numel() &&
         std::memcmp(a.const_data_ptr(), b.const_data_ptr(),
                     a.numel() * element_bytes(dtype_of("sample", a))) == 0;
}

std::tuple<int64_t, Tensor, Tensor, Tensor> next_chunks_of(Tensor key, Tensor starts, Tensor sums,
                                                           int64_t keys, Tensor sample,
                                                           std::string chunker, int64_t least,
                                                           int64_t most, double threshold,
                                                           OptionalTensor predictor,
                                                           std::vector<int64_t> shape) {
  check_devices("key", key,
                {{"starts", &starts},
                 {"sums", &sums},
                 {"sample", &sample},
                 {"predictor", pointer(predictor)}});
  Rule rule;
  read_rule(rule, chunker, least, most, threshold, predictor, shape);
  const blasst::HeadRows rows = rows_of("key", key);
  blasst::ChunkView known = chunks_of(starts, sums, keys);
  check(keys >= 0 && keys <= rows.rows, rows.rows, " keys are given; the chunks cover ", keys,
        ", which must be 0 to as many");
  dtype_of("sample", sample);
  sample = torch::stable::contiguous(sample);
  if (!same_bits(sample, sample_of(key, rows, keys))) known = {0, {}, {}};
  const blasst::Chunks next = blasst::next_chunks(known, rule.rule, rows, threads());
  const auto count = static_cast<int64_t>(next.starts.size());
  Tensor new_starts = torch::stable::new_empty(key, std::vector<int64_t>{count}, ScalarType::Int);
  Tensor new_sums = torch::stable::new_empty(
      key, std::vector<int64_t>{count, rows.heads, rows.head_dim}, ScalarType::Float);
  std::ranges::copy(next.starts, static_cast<int32_t*>(new_starts.mutable_data_ptr()));
  std::ranges::copy(next.sums, static_cast<float*>(new_sums.mutable_data_ptr()));
  const int64_t kept = std::max<int64_t>(0, std::ssize(known.starts) - 1);
  return {kept, new_starts, new_sums, sample_of(key, rows, rows.rows)};
}

Tensor boundary_scores_of(Tensor key, std::string chunker, OptionalTensor predictor,
                          std::vector<int64_t> shape) {
  check_devices("key", key, {{"predictor", pointer(predictor)}});
  Rule rule;
  read_rule(rule, chunker, 1, 1, 0, predictor, shape);
  const blasst::HeadRows rows = rows_of("key", key);
  const std::vector<float> found =
      blasst::boundary_scores(rule.rule, rows, 0, rows.rows, threads());
  Tensor result = torch::stable::new_empty(key, std::vector<int64_t>{rows.rows}, ScalarType::Float);
  if (!found.empty())
    std::memcpy(result.mutable_data_ptr(), found.data(), found.size() * sizeof(float));
  return result;
}

Tensor select_chunks(Tensor query, Tensor starts, Tensor sums, int64_t keys, bool decode,
                     int64_t budget_keys, double budget_share) {
  check_devices("query", query, {{"starts", &starts}, {"sums", &sums}});
  const blasst::HeadRows rows = rows_of("query", query);
  const blasst::ChunkView chunks = chunks_of(starts, sums, keys);
  check(sums.size(2) == rows.head_dim, "sums is ", sums, ", but query is ", query);
  const auto tiles = [](int64_t count) { return (count + 63) / 64; };
  const int64_t kv_heads = sums.size(1);
  Tensor blocks =
      torch::stable::new_empty(query,
                               std::vector<int64_t>{decode ? kv_heads : rows.heads,
                                                    decode ? 1 : tiles(rows.rows), tiles(keys)},
                               ScalarType::Byte);
  blasst::select_tiles(chunks, kv_heads, rows, decode, {.keys = budget_keys, .share = budget_share},
                       static_cast<uint8_t*>(blocks.mutable_data_ptr()), threads());
  return blocks;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(blasst, m) {
  m.def(
      "chunks_next(Tensor key, Tensor starts, Tensor sums, int keys, Tensor sample, str chunker,"
      " int least, int most, float threshold, Tensor? predictor, int[] predictor_shape)"
      " -> (int kept, Tensor starts, Tensor sums, Tensor sample)");
  m.def(
      "chunks_scores(Tensor key, str chunker, Tensor? predictor, int[] predictor_shape) -> "
      "Tensor");
  m.def(
      "chunks_select(Tensor query, Tensor starts, Tensor sums, int keys, bool decode,"
      " int budget_keys, float budget_share) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(blasst, CPU, m) {
  m.impl("chunks_next", TORCH_BOX(Kernel<next_chunks_of>::call));
  m.impl("chunks_scores", TORCH_BOX(Kernel<boundary_scores_of>::call));
  m.impl("chunks_select", TORCH_BOX(Kernel<select_chunks>::call));
}
