#include <blasst/blasst.hpp>
#include <blasst/chunks.hpp>
#include <cmath>
#include <cstdio>
#include <vector>

// Attention of one head over its own rows, by the library and by the definition.
int main() {
  constexpr int64_t kRows = 100, kDim = 16, kElements = kRows * kDim;
  std::vector<float> qkv(kElements), out(kElements);
  for (int64_t i = 0; i < kElements; ++i) qkv[i] = std::sin(static_cast<float>(i));
  const auto view = [](std::vector<float>& x) {
    return blasst::View{
        .data = x.data(), .elements = kElements, .stride_token = kDim, .stride_head = kDim};
  };
  blasst::prefill({.problem = {.heads = 1,
                               .kv_heads = 1,
                               .head_dim = kDim,
                               .value_dim = kDim,
                               .query_length = kRows,
                               .q = view(qkv),
                               .out = view(out),
                               .kv = {.k = view(qkv), .v = view(qkv), .key_length = kRows}}});
  double error = 0;
  for (int64_t i = 0; i < kRows; ++i) {
    double sum = 0, wanted[kDim] = {};
    for (int64_t j = 0; j < kRows; ++j) {
      double score = 0;
      for (int64_t d = 0; d < kDim; ++d) score += qkv[i * kDim + d] * qkv[j * kDim + d] / 4.0;
      sum += std::exp(score);
      for (int64_t d = 0; d < kDim; ++d) wanted[d] += std::exp(score) * qkv[j * kDim + d];
    }
    for (int64_t d = 0; d < kDim; ++d)
      error = std::fmax(error, std::abs(out[i * kDim + d] - wanted[d] / sum));
  }
  blasst::Chunks chunks;
  const blasst::HeadRows keys{.data = qkv.data(),
                              .elements = kElements,
                              .rows = kRows,
                              .heads = 1,
                              .head_dim = kDim,
                              .stride_row = kDim,
                              .stride_head = kDim};
  blasst::extend_chunks(chunks, {.most = 64}, keys, 1);
  std::printf("blasst %s on %s: error %g, %zu chunks\n", blasst::version().c_str(),
              blasst::cpu_isa().c_str(), error, chunks.starts.size());
  return error < 1e-5 && chunks.starts.size() == 2 ? 0 : 1;
}
