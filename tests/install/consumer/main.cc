#include <blasst/blasst.hpp>
#include <blasst/reference.hpp>
#include <cmath>
#include <cstdio>
#include <vector>

// Attention of one head over its own rows, by the kernel and by the reference.
int main() {
  constexpr int64_t kRows = 100, kDim = 16, kElements = kRows * kDim;
  std::vector<float> qkv(kElements), out(kElements);
  for (int64_t i = 0; i < kElements; ++i) qkv[i] = std::sin(static_cast<float>(i));
  const auto view = [](std::vector<float>& x) {
    return blasst::View{x.data(), kElements, kElements, kDim, kDim};
  };
  blasst::PrefillParams params{.heads = 1,
                               .kv_heads = 1,
                               .head_dim = kDim,
                               .value_dim = kDim,
                               .query_length = kRows,
                               .q = view(qkv),
                               .out = view(out)};
  params.kv = {.k = view(qkv), .v = view(qkv), .key_length = kRows};
  blasst::prefill(params);
  const auto wanted = blasst::reference::prefill(params, blasst::tile_shape(params));
  double error = 0;
  for (int64_t i = 0; i < kElements; ++i)
    error = std::fmax(error, std::abs(out[i] - wanted.out[i]));
  std::printf("blasst %s on %s: error %g\n", blasst::version().c_str(), blasst::cpu_isa().c_str(),
              error);
  return error < 1e-5 ? 0 : 1;
}
