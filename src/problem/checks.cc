#include "problem/checks.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <tuple>
#include <utility>

#include "problem/element.h"
#include "problem/text.h"

namespace blasst::problem {
namespace {

void check_dim(std::string_view name, int64_t value) {
  if (value < 16 || value > kMaxDim || value % 8 != 0)
    fail("{} is {}; it must be a multiple of 8 from 16 to {}", name, value, kMaxDim);
}

void check_dtype(std::string_view name, DType dtype) {
  if (dtype < BLASST_FLOAT32 || dtype > BLASST_BFLOAT16)
    fail("{}.dtype is {}; it must be a blasst_dtype: float32 (0), float16 (1) or bfloat16 (2)",
         name, static_cast<int>(dtype));
}

void check_cache(std::string_view name, DType dtype, const Scales& scales,
                 const blasst_problem& p) {
  if (dtype < BLASST_FLOAT32 || dtype > BLASST_FLOAT8_E4M3)
    fail(
        "{}.dtype is {}; it must be a blasst_dtype: float32 (0), float16 (1), bfloat16 (2), int8 "
        "(3) or float8_e4m3 (4)",
        name, static_cast<int>(dtype));
  if (scales.values && !is_8_bits(dtype))
    fail("{}_scales.values is set, but {} is {}; scales go with int8 (3) and float8_e4m3 (4)", name,
         name, dtype_name(dtype));
  check_range(formatted("{}_scales.stride_request", name), scales.stride_request, 0,
              most_stride(p.batch));
  check_range(formatted("{}_scales.stride_head", name), scales.stride_head, 0,
              most_stride(p.kv_heads));
}

// What one layout has and another does not.
void check_absent(std::string_view name, bool present, std::string_view layout_name,
                  std::string_view wanted) {
  if (present) fail("{} is set; it goes with {} {}", name, layout_name, wanted);
}

void check_queries(const blasst_problem& p, Phase phase) {
  const bool decode = phase == Phase::kDecode;
  if (p.query_layout != BLASST_LAYOUT_DENSE && p.query_layout != BLASST_LAYOUT_RAGGED)
    fail("query_layout is {}; it must be dense (0) or ragged (1)",
         static_cast<int>(p.query_layout));
  check_range("query_length", p.query_length, decode ? 1 : 0, decode ? kMaxDecodeRows : kMaxCount);
  check_range("rows", p.rows, 0, kMaxCount);
  if (p.query_layout == BLASST_LAYOUT_DENSE) {
    check_absent("cu_seqlens_q", p.cu_seqlens_q, "query_layout", "ragged (1)");
    check_absent("rows", p.rows != 0, "query_layout", "ragged (1)");
  } else {
    check_absent("query_lengths", p.query_lengths, "query_layout", "dense (0)");
    check_absent("kv.starts", p.kv.starts, "query_layout", "dense (0)");
    const int64_t room = p.batch * most_rows(p);
    if (p.rows > room)
      fail("rows is {}, more than batch {} times query_length {}, the most rows of a request",
           p.rows, p.batch, most_rows(p));
  }
  check_range("rows of all requests", all_rows(p), 0, kMaxCount);
}

void check_problem(const blasst_problem& p, Phase phase) {
  check_range("batch", p.batch, 0, 1 << 20);
  check_range("heads", p.heads, 1, 1 << 20);
  check_range("kv_heads", p.kv_heads, 1, p.heads);
  if (p.heads % p.kv_heads != 0)
    fail("heads is {} and kv_heads is {}; heads must be a multiple of kv_heads", p.heads,
         p.kv_heads);
  check_dim("head_dim", p.head_dim);
  check_dim("value_dim", p.value_dim);
  check_queries(p, phase);
  check_keys(p.kv);
  check_range("the most keys of a request", most_keys(p), 0, kMaxCount);
  check_dtype("q", p.q.dtype);
  check_dtype("out", p.out.dtype);
  check_cache("k", p.kv.k.dtype, p.k_scales, p);
  check_cache("v", p.kv.v.dtype, p.v_scales, p);
  if (!(p.scale >= 0 && std::isfinite(p.scale)))
    fail("scale is {}; it must be positive and finite, or 0 for 1 / sqrt(head_dim)", p.scale);
  if (!(p.softcap >= 0 && std::isfinite(p.softcap)))
    fail("softcap is {}; it must be positive and finite, or 0 for none", p.softcap);
  const Mask& mask = p.mask;
  if (mask.causal != 0 && mask.causal != 1)
    fail("mask.causal is {}; it must be 0 or 1", mask.causal);
  check_range("mask.window_left", mask.window_left, -1, kMaxCount);
  check_range("mask.window_right", mask.window_right, -1, kMaxCount);
}

void check_decision(const Decision& d, const blasst_problem& p) {
  if (d.order < BLASST_FORWARD || d.order > BLASST_SINK_FIRST)
    fail("order is {}; it must be a blasst_order: forward (0), reverse (1) or sink_first (2)",
         static_cast<int>(d.order));
  const TileTest& test = d.test;
  if (test.kind < BLASST_TEST_NONE || test.kind > BLASST_TEST_ABSOLUTE)
    fail("test.kind is {}; it must be a blasst_test, 0 to 3", static_cast<int>(test.kind));
  if (test.kind == BLASST_TEST_NONE && test.values)
    fail("test.values is set but test.kind is BLASST_TEST_NONE; choose a test");
  check_range("test.places", test.places, 1, kMaxCount);
  check_range("test.stride_request", test.stride_request, 0, most_stride(p.batch));
  check_range("test.stride_head", test.stride_head, 0, most_stride(p.heads));
  check_range("test.stride_place", test.stride_place, 0, most_stride(test.places));
  check_range("tile_query_rows", d.tile_query_rows, 0, kMaxCount);
  check_range("tile_keys", d.tile_keys, 0, kMaxCount);
  if (d.scores < BLASST_SCORES_EXACT || d.scores > BLASST_SCORES_INT8)
    fail("scores is {}; it must be a blasst_scores: exact (0) or int8 (1)",
         static_cast<int>(d.scores));
}

}  // namespace

void check_range(std::string_view name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most)
    fail("{} is {}; it must be {} to {}", name, value, least, most);
}

void check_struct_size(std::string_view name, std::size_t given, std::size_t known) {
  if (given != known)
    fail(
        "struct_size of {} is {}; this library, blasst {}, knows {}: start from its header's "
        "blasst_*_init, in C++ from the struct's defaults",
        name, given, BLASST_VERSION, known);
}

void check_keys(const KeysValues& kv) {
  if (kv.layout < BLASST_LAYOUT_DENSE || kv.layout > BLASST_LAYOUT_PAGED)
    fail("kv.layout is {}; it must be a blasst_layout: dense (0), ragged (1) or paged (2)",
         static_cast<int>(kv.layout));
  check_range("kv.key_length", kv.key_length, 0, kMaxCount);
  check_range("kv.tokens", kv.tokens, 0, kMaxCount);
  check_range("kv.pages", kv.pages, 0, kMaxCount);
  check_range("kv.page_table_stride", kv.page_table_stride, 0, kMaxCount);
  const bool paged = kv.layout == BLASST_LAYOUT_PAGED, ragged = kv.layout == BLASST_LAYOUT_RAGGED;
  if (!paged) {
    check_absent("kv.page_table", kv.page_table, "kv.layout", "paged (2)");
    check_absent("kv.page_size", kv.page_size != 0, "kv.layout", "paged (2)");
    check_absent("kv.pages", kv.pages != 0, "kv.layout", "paged (2)");
  }
  if (!ragged) {
    check_absent("kv.cu_seqlens", kv.cu_seqlens, "kv.layout", "ragged (1)");
    check_absent("kv.tokens", kv.tokens != 0, "kv.layout", "ragged (1)");
  } else {
    check_absent("kv.lengths", kv.lengths, "kv.layout", "dense (0) or paged (2)");
  }
  if (paged || ragged) check_absent("kv.starts", kv.starts, "kv.layout", "dense (0)");
  if (!paged) return;
  check_range("kv.page_size", kv.page_size, 1, 256);
  const int64_t table = kv.page_table_stride * kv.page_size;
  if (kv.key_length > table)
    fail("kv.key_length is {}; the page table has room for {}", kv.key_length, table);
}

void check_execution(const Execution& e) {
  check_struct_size("execution", e.struct_size, sizeof e);
  if (e.backend < BLASST_BACKEND_AUTO || e.backend > BLASST_BACKEND_CUDA_SM80)
    fail(
        "backend is {}; it must be a blasst_backend: auto (0), cpu (1), cuda (2), "
        "cuda-sm90 (3) or cuda-sm80 (4)",
        static_cast<int>(e.backend));
  check_range("threads", e.threads, 0, kMaxThreads);
  if (!e.workspace && e.workspace_bytes > 0)
    fail("workspace is null but workspace_bytes is {}", e.workspace_bytes);
}

void check_scalars(const AttentionParams& params, Phase phase) {
  check_struct_size("params", params.struct_size, sizeof params);
  check_struct_size("problem", params.problem.struct_size, sizeof params.problem);
  check_struct_size("decision", params.decision.struct_size, sizeof params.decision);
  check_struct_size("report", params.report.struct_size, sizeof params.report);
  check_problem(params.problem, phase);
  check_decision(params.decision, params.problem);
  check_execution(params.execution);
}

void check_scalars(const BackwardParams& params) {
  check_struct_size("params", params.struct_size, sizeof params);
  check_struct_size("problem", params.problem.struct_size, sizeof params.problem);
  check_struct_size("gradients", params.gradients.struct_size, sizeof params.gradients);
  check_problem(params.problem, Phase::kPrefill);
  check_execution(params.execution);
  const Gradients& g = params.gradients;
  for (const auto& [name, view] : {std::pair{"dout", &g.dout}, std::pair{"dq", &g.dq},
                                   std::pair{"dk", &g.dk}, std::pair{"dv", &g.dv}})
    check_dtype(name, view->dtype);
}

void check_arrays(const AttentionParams& params) {
  const blasst_problem& p = params.problem;
  if (p.query_layout == BLASST_LAYOUT_RAGGED && !p.cu_seqlens_q)
    fail("cu_seqlens_q is null; ragged queries need the first row of each request");
  if (p.kv.layout == BLASST_LAYOUT_RAGGED && !p.kv.cu_seqlens)
    fail("kv.cu_seqlens is null; ragged keys need the first key of each request");
  if (p.kv.layout == BLASST_LAYOUT_PAGED) {
    if (!p.kv.page_table) fail("kv.page_table is null; paged keys need the pages of each request");
    if (!p.kv.lengths) fail("kv.lengths is null; paged keys need the length of each request");
  }
  const TileTest& test = params.decision.test;
  if (test.kind != BLASST_TEST_NONE && !test.values)
    fail("test.values is null; test.kind {} needs it", static_cast<int>(test.kind));
}

void check_tiles(std::string_view backend, const Decision& decision, TileShape shape) {
  const auto differs = [](int64_t wanted, int64_t is) { return wanted != 0 && wanted != is; };
  if (differs(decision.tile_query_rows, shape.query_rows) ||
      differs(decision.tile_keys, shape.keys))
    throw Error(BLASST_UNSUPPORTED,
                formatted("{}: tile_query_rows is {} and tile_keys {}; it decides on tiles of {} "
                          "query rows and {} keys",
                          backend, decision.tile_query_rows, decision.tile_keys, shape.query_rows,
                          shape.keys));
}

void check_exact_scores(std::string_view backend, std::string_view what, const Decision& decision) {
  if (decision.scores == BLASST_SCORES_INT8)
    throw Error(BLASST_UNSUPPORTED,
                formatted("{}: scores is int8 (1); {} has exact scores (0) only", backend, what));
}

void check_types(std::string_view backend, std::string_view what, Caches caches,
                 const blasst_problem& p) {
  const bool takes_8_bits = caches == Caches::kOfQueriesOr8Bits;
  const bool int8_keys = caches == Caches::kInt8Keys && p.kv.k.dtype == BLASST_INT8;
  for (const auto& [name, view, may_be_8_bits] :
       {std::tuple{"k", &p.kv.k, takes_8_bits || int8_keys}, std::tuple{"v", &p.kv.v, takes_8_bits},
        std::tuple{"out", &p.out, false}}) {
    if (view->dtype == p.q.dtype || (may_be_8_bits && is_8_bits(view->dtype))) continue;
    throw Error(BLASST_UNSUPPORTED,
                formatted("{}: q is {} and {} {}; {} does tensors of one type{}", backend,
                          dtype_name(p.q.dtype), name, dtype_name(view->dtype), what,
                          takes_8_bits ? ", and keys and values in int8 and float8_e4m3" : ""));
  }
}

void check_block_mask(const Mask& mask, int64_t heads, int64_t query_tiles, int64_t key_tiles) {
  if (!mask.blocks) return;
  check_range("mask.blocks_stride_query_tile", mask.blocks_stride_query_tile, key_tiles,
              most_stride(query_tiles));
  check_range("mask.blocks_stride_head", mask.blocks_stride_head,
              query_tiles * mask.blocks_stride_query_tile, most_stride(heads));
}

void check_tile_maxima(const Report& report, const Geometry& g) {
  if (report.tile_maxima)
    check_range("report.tile_maxima_stride", report.tile_maxima_stride, g.key_tiles,
                most_stride(g.tile_heads * g.query_tiles));
}

void check_view(std::string_view name, const View& view, int64_t outer, int64_t tokens,
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
  const int64_t bytes = element_bytes(view.dtype);
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
                      const View& input) {
  const auto* out_begin = static_cast<const std::byte*>(out.data);
  const auto* in_begin = static_cast<const std::byte*>(input.data);
  if (!out_begin || !in_begin) return;
  if (std::less<>{}(out_begin, in_begin + input.elements * element_bytes(input.dtype)) &&
      std::less<>{}(in_begin, out_begin + out.elements * element_bytes(out.dtype)))
    fail("{} and {} share memory; {} needs a buffer of its own", out_name, name, out_name);
}

void check_gradients(const BackwardParams& params) {
  const blasst_problem& p = params.problem;
  const Gradients& g = params.gradients;
  if (!g.lse && all_rows(p) > 0) fail("lse is null; backward needs what prefill reported");
  if (g.dsinks && !p.sinks) fail("dsinks is set but sinks is null");
  const RowTensor rows = query_tensor(p), keys = key_tensor(p);
  check_view("dout", g.dout, rows.outer, rows.tokens, p.heads, p.value_dim);

  struct Gradient {
    std::string_view name;
    const View& view;
    RowTensor rows;
    int64_t heads, dim;
  };
  const std::array gradients{Gradient{"dq", g.dq, rows, p.heads, p.head_dim},
                             Gradient{"dk", g.dk, keys, p.kv_heads, p.head_dim},
                             Gradient{"dv", g.dv, keys, p.kv_heads, p.value_dim}};
  const std::array<std::pair<std::string_view, const View*>, 5> inputs{
      {{"q", &p.q}, {"k", &p.kv.k}, {"v", &p.kv.v}, {"out", &p.out}, {"dout", &g.dout}}};
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Gradient& gradient = gradients[i];
    const auto [outer, tokens] = gradient.rows;
    check_view(gradient.name, gradient.view, outer, tokens, gradient.heads, gradient.dim);
    if (outer > 0 && tokens > 0)
      check_no_overlap(gradient.name, gradient.view, outer, tokens, gradient.heads, gradient.dim);
    for (const auto& [name, input] : inputs)
      check_not_shared(gradient.name, gradient.view, name, *input);
    for (size_t other = 0; other < i; ++other)
      check_not_shared(gradient.name, gradient.view, gradients[other].name, gradients[other].view);
  }
}

void check_merge(const MergeParams& p) {
  check_struct_size("params", p.struct_size, sizeof p);
  check_execution(p.execution);
  if (p.execution.workspace) fail("workspace is set; merge needs none");
  check_range("batch", p.batch, 0, 1 << 20);
  check_range("query_length", p.query_length, 0, kMaxCount);
  check_range("batch * query_length", p.batch * p.query_length, 0, kMaxCount);
  check_range("heads", p.heads, 1, 1 << 20);
  check_dim("value_dim", p.value_dim);
  for (const auto& [name, view] :
       {std::pair{"out_a", &p.out_a}, std::pair{"out_b", &p.out_b}, std::pair{"out", &p.out}}) {
    check_dtype(name, view->dtype);
    check_view(name, *view, p.batch, p.query_length, p.heads, p.value_dim);
  }
  if (p.batch == 0 || p.query_length == 0) return;
  check_no_overlap("out", p.out, p.batch, p.query_length, p.heads, p.value_dim);
  for (const auto& [name, view] : {std::pair{"out_a", &p.out_a}, std::pair{"out_b", &p.out_b}}) {
    const bool same = view->data == p.out.data && view->dtype == p.out.dtype &&
                      view->stride_request == p.out.stride_request &&
                      view->stride_token == p.out.stride_token &&
                      view->stride_head == p.out.stride_head;
    if (!same) check_not_shared("out", p.out, name, *view);
  }
  for (const auto& [name, lse] : {std::pair{"lse_a", p.lse_a}, std::pair{"lse_b", p.lse_b}}) {
    if (!lse) fail("{} is null; it must be what the call reported", name);
    if (lse == p.lse) fail("lse and {} are the same memory; lse needs a buffer of its own", name);
  }
}

}  // namespace blasst::problem
