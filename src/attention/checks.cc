#include "attention/checks.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <functional>

#include "attention/element.h"

namespace blasst::attention {
namespace {

void check_dim(std::string_view name, int64_t value) {
  if (value < 16 || value > 256 || value % 8 != 0)
    fail("{} is {}; it must be a multiple of 8 from 16 to 256", name, value);
}

template <typename Params>
void check_all_scalars(const Params& params) {
  constexpr bool decode = std::same_as<Params, DecodeParams>;
  if (params.dtype < BLASST_FLOAT32 || params.dtype > BLASST_BFLOAT16)
    fail("dtype is {}; it must be a blasst_dtype: float32 (0), float16 (1) or bfloat16 (2)",
         static_cast<int>(params.dtype));
  check_range("batch", params.batch, 0, 1 << 20);
  check_range("heads", params.heads, 1, 1 << 20);
  check_range("kv_heads", params.kv_heads, 1, params.heads);
  if (params.heads % params.kv_heads != 0)
    fail("heads is {} and kv_heads is {}; heads must be a multiple of kv_heads", params.heads,
         params.kv_heads);
  check_dim("head_dim", params.head_dim);
  check_dim("value_dim", params.value_dim);
  check_range("query_length", params.query_length, decode ? 1 : 0, decode ? 16 : kMaxCount);
  if (!(params.scale >= 0 && std::isfinite(params.scale)))
    fail("scale is {}; it must be positive and finite, or 0 for 1 / sqrt(head_dim)", params.scale);
  if (!(params.softcap >= 0 && std::isfinite(params.softcap)))
    fail("softcap is {}; it must be positive and finite, or 0 for none", params.softcap);
  if (params.order < BLASST_FORWARD || params.order > BLASST_SINK_FIRST)
    fail("order is {}; it must be a blasst_order: forward (0), reverse (1) or sink_first (2)",
         static_cast<int>(params.order));
  check_range("threads", params.threads, 0, kMaxThreads);
  if (!params.workspace && params.workspace_bytes > 0)
    fail("workspace is null but workspace_bytes is {}", params.workspace_bytes);
  const Mask& mask = params.mask;
  if (mask.causal != 0 && mask.causal != 1)
    fail("mask.causal is {}; it must be 0 or 1", mask.causal);
  check_range("mask.window_left", mask.window_left, -1, kMaxCount);
  check_range("mask.window_right", mask.window_right, -1, kMaxCount);
  const TileTest& test = params.test;
  if (test.kind < BLASST_TEST_NONE || test.kind > BLASST_TEST_ABSOLUTE)
    fail("test.kind is {}; it must be a blasst_test, 0 to 3", static_cast<int>(test.kind));
  if (test.kind == BLASST_TEST_NONE) {
    if (test.values) fail("test.values is set but test.kind is BLASST_TEST_NONE; choose a test");
  } else if (!test.values) {
    fail("test.values is null; test.kind {} needs it", static_cast<int>(test.kind));
  }
  check_range("test.places", test.places, 1, kMaxCount);
  check_range("test.stride_request", test.stride_request, 0, most_stride(params.batch));
  check_range("test.stride_head", test.stride_head, 0, most_stride(params.heads));
  check_range("test.stride_place", test.stride_place, 0, most_stride(test.places));
}

}  // namespace

void check_range(std::string_view name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most)
    fail("{} is {}; it must be {} to {}", name, value, least, most);
}

void check_scalars(const PrefillParams& params) { check_all_scalars(params); }
void check_scalars(const DecodeParams& params) { check_all_scalars(params); }

void check_view(std::string_view name, const View& view, DType dtype, int64_t outer, int64_t tokens,
                int64_t heads, int64_t dim) {
  for (const auto& [stride_name, stride] :
       {std::pair{"stride_request", view.stride_request},
        std::pair{"stride_token", view.stride_token}, std::pair{"stride_head", view.stride_head}}) {
    if (stride < 0 || stride > kMaxElements)
      fail("{}.{} is {}; it must be 0 to {} elements", name, stride_name, stride, kMaxElements);
  }
  if (view.elements < 0 || view.elements > kMaxElements)
    fail("{}.elements is {}; it must be 0 to {}", name, view.elements, kMaxElements);
  if (outer == 0 || tokens == 0) return;
  if (!view.data)
    fail("{}.data is null, with {} x {} tokens to read or write", name, outer, tokens);
  const int64_t bytes = element_bytes(dtype);
  if (reinterpret_cast<uintptr_t>(view.data) % bytes != 0)
    fail("{}.data is not aligned to its {}-byte elements", name, bytes);
  const auto last = static_cast<__int128>(outer - 1) * view.stride_request +
                    static_cast<__int128>(tokens - 1) * view.stride_token +
                    static_cast<__int128>(heads - 1) * view.stride_head + dim;
  if (last > view.elements) {
    fail("{} reaches element {} ([{}, {}, {}, {}] with strides {}, {}, {}), but {}.elements is {}",
         name,
         last > kMaxElements ? std::numeric_limits<int64_t>::max() : static_cast<int64_t>(last),
         outer, tokens, heads, dim, view.stride_request, view.stride_token, view.stride_head, name,
         view.elements);
  }
}

// Sorted by stride, each dimension steps over all that lies inside it.
void check_no_overlap(std::string_view name, const View& view, int64_t outer, int64_t tokens,
                      int64_t heads, int64_t dim) {
  struct Dimension {
    std::string_view stride_name;
    int64_t stride, size;
  };
  std::array dimensions{Dimension{"stride_request", view.stride_request, outer},
                        Dimension{"stride_token", view.stride_token, tokens},
                        Dimension{"stride_head", view.stride_head, heads}};
  std::ranges::sort(dimensions, {}, &Dimension::stride);
  int64_t extent = dim;
  for (const Dimension& d : dimensions) {
    if (d.size <= 1) continue;
    if (d.stride < extent)
      fail("{}.{} is {}, which overlaps elements of {}; it must be at least {}", name,
           d.stride_name, d.stride, name, extent);
    extent += (d.size - 1) * d.stride;
  }
}

void check_not_shared(std::string_view out_name, const View& out, std::string_view name,
                      const View& input, DType dtype) {
  const int64_t bytes = element_bytes(dtype);
  const auto* out_begin = static_cast<const std::byte*>(out.data);
  const auto* in_begin = static_cast<const std::byte*>(input.data);
  if (!out_begin || !in_begin) return;
  if (std::less<>{}(out_begin, in_begin + input.elements * bytes) &&
      std::less<>{}(in_begin, out_begin + out.elements * bytes))
    fail("{} and {} share memory; {} needs a buffer of its own", out_name, name, out_name);
}

void check_merge(const MergeParams& p) {
  if (p.dtype < BLASST_FLOAT32 || p.dtype > BLASST_BFLOAT16)
    fail("dtype is {}; it must be a blasst_dtype: float32 (0), float16 (1) or bfloat16 (2)",
         static_cast<int>(p.dtype));
  check_range("batch", p.batch, 0, 1 << 20);
  check_range("query_length", p.query_length, 0, kMaxCount);
  check_range("batch * query_length", p.batch * p.query_length, 0, kMaxCount);
  check_range("heads", p.heads, 1, 1 << 20);
  check_dim("value_dim", p.value_dim);
  check_range("threads", p.threads, 0, kMaxThreads);
  for (const auto& [name, view] :
       {std::pair{"out_a", &p.out_a}, std::pair{"out_b", &p.out_b}, std::pair{"out", &p.out}})
    check_view(name, *view, p.dtype, p.batch, p.query_length, p.heads, p.value_dim);
  if (p.batch == 0 || p.query_length == 0) return;
  check_no_overlap("out", p.out, p.batch, p.query_length, p.heads, p.value_dim);
  for (const auto& [name, view] : {std::pair{"out_a", &p.out_a}, std::pair{"out_b", &p.out_b}}) {
    const bool same = view->data == p.out.data && view->stride_request == p.out.stride_request &&
                      view->stride_token == p.out.stride_token &&
                      view->stride_head == p.out.stride_head;
    if (!same) check_not_shared("out", p.out, name, *view, p.dtype);
  }
  for (const auto& [name, lse] : {std::pair{"lse_a", p.lse_a}, std::pair{"lse_b", p.lse_b}}) {
    if (!lse) fail("{} is null; it must be what the call reported", name);
    if (lse == p.lse) fail("lse and {} are the same memory; lse needs a buffer of its own", name);
  }
}

}  // namespace blasst::attention
