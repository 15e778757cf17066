#include "testing/case.h"

#include <algorithm>
#include <cmath>

#include "problem/element.h"
#include "problem/text.h"

namespace blasst::check {
namespace {

// Lengths where kernels go wrong: one, a few, around a multiple of a tile; else anything.
int64_t random_length(Choices& choose, int64_t most) {
  most = std::max<int64_t>(most, 1);
  int64_t length = 0;
  switch (choose.between(0, 5)) {
    case 0:
      length = 1;
      break;
    case 1:
      length = choose.between(2, 70);
      break;
    case 2:
      length = 64 * choose.between(1, 8) + choose.between(-1, 1);
      break;
    default:
      length = choose.between(1, most);
  }
  return std::clamp<int64_t>(length, 1, most);
}

int64_t random_dim(Choices& choose) {
  if (choose.one_in(12)) return 8 * choose.between(33, 72);
  return choose.one_in(3) ? 8 * choose.between(2, 32) : choose.pick<int64_t>({16, 32, 64, 64, 128});
}

// Latent attention (MLA): values are the first elements of the keys of one KV head; expanded, or of
// any other model, the two have sizes of their own.
void choose_dims(Case& c, Choices& choose) {
  if (choose.one_in(8)) {
    c.values_in_keys = true;
    c.heads = choose.pick<int64_t>({8, 16, 16, 64, 128}), c.kv_heads = 1;
    c.head_dim = choose.one_in(2) ? 576 : random_dim(choose);
    c.value_dim = c.head_dim == 576 ? 512 : 8 * choose.between(2, c.head_dim / 8);
    return;
  }
  c.head_dim = random_dim(choose);
  c.value_dim = choose.one_in(2) ? c.head_dim : random_dim(choose);
}

void choose_lengths(Case& c, Choices& choose, int64_t budget) {
  const int64_t batch = choose.pick<int64_t>({1, 1, 2, 3});
  const int64_t pairs = budget / (c.heads * (c.head_dim + c.value_dim) * batch);
  c.requests.clear();
  for (int64_t b = 0; b < batch; ++b) {
    Lengths lengths{};
    if (c.decode) {
      lengths.queries = choose.one_in(2) ? 1 : choose.between(1, 16);
    } else {
      lengths.queries =
          random_length(choose, std::min<int64_t>(600, std::max<int64_t>(1, pairs / 64)));
    }
    if (b > 0 && !c.ragged_queries && !c.padded) lengths.queries = c.requests[0].queries;
    lengths.keys = random_length(choose, std::min<int64_t>(20000, pairs / lengths.queries));
    if (c.causal && choose.one_in(2)) lengths.keys = std::max(lengths.keys, lengths.queries);
    if (choose.one_in(12)) lengths.keys = 0;
    if ((c.ragged_queries || c.padded) && choose.one_in(6)) lengths.queries = 0;
    c.requests.push_back(lengths);
  }
}

// A quantised cache: of keys, values or both. Values that lie in keys are as these.
void choose_cache(Case& c, Choices& choose) {
  if (!choose.one_in(3)) return;
  const auto in_8_bits = [&] {
    return choose.one_in(4) ? std::optional<DType>()
                            : choose.pick({BLASST_INT8, BLASST_FLOAT8_E4M3});
  };
  c.k_dtype = in_8_bits();
  c.v_dtype = c.values_in_keys ? c.k_dtype : in_8_bits();
  c.scales_per_request = choose.one_in(3);
  c.scales_per_head = choose.one_in(2);
}

void choose_mask(Case& c, Choices& choose) {
  if (choose.one_in(4)) c.window_left = choose.pick<int64_t>({0, choose.between(1, 300)});
  if (choose.one_in(6)) c.window_right = choose.pick<int64_t>({0, choose.between(1, 300)});
  c.bands = choose.one_in(6);
  c.blocks = choose.one_in(5);
}

void choose_test(Case& c, Choices& choose) {
  const int64_t keys = std::ranges::max(c.requests, {}, &Lengths::keys).keys;
  const auto relative = static_cast<float>(choose.pick<double>(
      {0.0, 1.0, std::exp(-0.01 * static_cast<double>(choose.between(1, 900)))}));
  c.test = choose.pick({BLASST_TEST_NONE, BLASST_TEST_RELATIVE, BLASST_TEST_RELATIVE,
                        BLASST_TEST_SCALE_FACTOR, BLASST_TEST_ABSOLUTE});
  if (c.test == BLASST_TEST_RELATIVE) c.threshold = relative;
  if (c.test == BLASST_TEST_SCALE_FACTOR) c.threshold = relative * static_cast<float>(keys);
  if (c.test == BLASST_TEST_ABSOLUTE) c.threshold = static_cast<float>(choose.between(-4, 12));
  c.per_request = choose.one_in(3);
  c.per_head = choose.one_in(3);
  if (c.test != BLASST_TEST_NONE && choose.one_in(4)) c.places = choose.between(2, 6);
}

}  // namespace

int64_t SeededChoices::between(int64_t least, int64_t most) {
  const auto range = static_cast<uint64_t>(most - least) + 1;
  return least + static_cast<int64_t>(hash(seed_, drawn_++) % range);
}

Case random_case(Choices& choose, int64_t budget) {
  Case c;
  c.seed = static_cast<uint64_t>(choose.between(0, 1'000'000));
  c.decode = choose.one_in(2);
  c.dtype = choose.pick({BLASST_FLOAT32, BLASST_FLOAT16, BLASST_BFLOAT16});
  c.kv_heads = choose.between(1, 3);
  c.heads = c.kv_heads * choose.pick<int64_t>({1, 1, 2, 3, 4, 5, 8, 16});
  choose_dims(c, choose);
  c.inputs = choose.pick({Inputs::kGaussian, Inputs::kDrift, Inputs::kDrift, Inputs::kPlanted});
  c.density = static_cast<double>(choose.between(0, 10)) / 10;
  c.layout = choose.pick({Layout::kDense, Layout::kRagged, Layout::kPaged});
  c.ragged_queries = choose.one_in(2);
  c.padded = !c.ragged_queries && choose.one_in(3);
  c.page_size = choose.pick<int64_t>({1, 16, 64, 256, choose.between(1, 256)});
  c.head_major = choose.one_in(3);
  c.padding = choose.pick<int64_t>({0, 0, 8, choose.between(1, 40)});
  if (choose.one_in(3)) c.scale = 0.01f * static_cast<float>(choose.between(1, 30));
  if (choose.one_in(4)) c.softcap = static_cast<float>(choose.between(5, 50));
  c.sinks = choose.one_in(4);
  c.causal = choose.one_in(2);
  c.order = choose.pick({BLASST_FORWARD, BLASST_REVERSE, BLASST_SINK_FIRST});
  c.threads = static_cast<int>(choose.between(0, 4));
  choose_lengths(c, choose, budget);
  choose_mask(c, choose);
  choose_test(c, choose);
  if (!c.decode && choose.one_in(4)) c.scores = BLASST_SCORES_INT8;
  choose_cache(c, choose);
  return c;
}

std::string describe(const Case& c) {
  std::vector<std::string> lengths;
  for (const Lengths& r : c.requests) lengths.push_back(formatted("{}x{}", r.queries, r.keys));
  const auto option = [](bool on, std::string text) { return on ? " " + text : std::string(); };
  return formatted(
      "{} dtype {} queries x keys [{}] heads {}/{} dims {}/{}{}{} inputs {} layout "
      "{}{}{}{}{}{}{}{}{}{}{}{}{} "
      "order {} test {} threshold {}{}{}{}{} threads {} numbers {}",
      c.decode ? "decode" : "prefill", static_cast<int>(c.dtype), join(lengths, ", "), c.heads,
      c.kv_heads, c.head_dim, c.value_dim, option(c.values_in_keys, "values in keys"),
      option(c.k_dtype || c.v_dtype,
             formatted("cache {}/{}{}{}{}", problem::dtype_name(c.k_dtype.value_or(c.dtype)),
                       problem::dtype_name(c.v_dtype.value_or(c.dtype)),
                       option(c.scales_per_request, "per request"),
                       option(c.scales_per_head, "per head"),
                       option(c.scales_are_powers, "powers of two"))),
      static_cast<int>(c.inputs), static_cast<int>(c.layout),
      option(c.layout == Layout::kPaged, formatted("page {}", c.page_size)),
      option(c.ragged_queries, "ragged queries"), option(c.padded, "padded"),
      option(c.head_major, "head major"), option(c.padding > 0, formatted("padding {}", c.padding)),
      option(c.scale > 0, formatted("scale {}", c.scale)),
      option(c.softcap > 0, formatted("softcap {}", c.softcap)), option(c.sinks, "sinks"),
      option(c.causal, "causal"),
      option(c.window_left >= 0 || c.window_right >= 0,
             formatted("window {}, {}", c.window_left, c.window_right)),
      option(c.bands, "bands"), option(c.blocks, "blocks"), static_cast<int>(c.order),
      static_cast<int>(c.test), c.threshold, option(c.per_request, "per request"),
      option(c.per_head, "per head"), option(c.places > 1, formatted("places {}", c.places)),
      option(c.scores == BLASST_SCORES_INT8, "scores int8"), c.threads, c.seed);
}

}  // namespace blasst::check
