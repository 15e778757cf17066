// Causal attention of 8 query heads on 2 KV heads over 4,000 tokens, with a tile test, and what it
// skipped.
#include <blasst/blasst.hpp>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

int main() {
  const int64_t tokens = 4000, heads = 8, kv_heads = 2, dim = 64;
  std::vector<float> q(tokens * heads * dim), k(tokens * kv_heads * dim), v(k.size()),
      out(q.size());
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  for (auto* x : {&q, &k, &v})
    for (float& element : *x) element = normal(random);
  for (int64_t i = 0; i < 64 * kv_heads * dim; ++i) k[i] *= 8;  // the first keys matter most
  // [token, head, element], all contiguous.
  const auto view = [&](std::vector<float>& x, int64_t h) {
    return blasst::View{.data = x.data(),
                        .elements = static_cast<int64_t>(x.size()),
                        .stride_token = h * dim,
                        .stride_head = dim};
  };
  const float threshold = 0.01f;  // drop tiles whose scores are all 4.6 below their row's maximum
  int64_t visitable[heads], skipped[heads];
  blasst::prefill(
      {.problem = {.heads = heads,
                   .kv_heads = kv_heads,
                   .head_dim = dim,
                   .value_dim = dim,
                   .query_length = tokens,
                   .q = view(q, heads),
                   .out = view(out, heads),
                   .kv = {.k = view(k, kv_heads), .v = view(v, kv_heads), .key_length = tokens},
                   .mask = {.causal = 1}},
       .decision = {.test = {.kind = BLASST_TEST_RELATIVE, .values = &threshold}},
       .report = {.tiles_visitable = visitable, .tiles_skipped = skipped}});
  int64_t all = 0, dropped = 0;
  for (int h = 0; h < heads; ++h) all += visitable[h], dropped += skipped[h];
  std::printf("%lld of %lld tiles skipped\n", static_cast<long long>(dropped),
              static_cast<long long>(all));
}
