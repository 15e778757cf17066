// torch.ops.blasst.prefill, decode, and the tiles that they decide on.
//
// What Python callers use is blasst.attention, which documents the arguments.
#include <array>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "blasst/blasst.hpp"
#include "problem.h"
#include "tensors.h"

namespace {

using namespace blasst::binding;

blasst::Order order_of(std::string_view name) {
  return choose("order", name,
                std::array{std::pair{std::string_view("forward"), BLASST_FORWARD},
                           std::pair{std::string_view("reverse"), BLASST_REVERSE},
                           std::pair{std::string_view("sink_first"), BLASST_SINK_FIRST}});
}

blasst::TestKind test_of(std::string_view name) {
  return choose("test", name,
                std::array{std::pair{std::string_view("none"), BLASST_TEST_NONE},
                           std::pair{std::string_view("relative"), BLASST_TEST_RELATIVE},
                           std::pair{std::string_view("scale_factor"), BLASST_TEST_SCALE_FACTOR},
                           std::pair{std::string_view("absolute"), BLASST_TEST_ABSOLUTE}});
}

blasst::Scores scores_of(std::string_view name) {
  return choose("scores", name,
                std::array{std::pair{std::string_view("exact"), BLASST_SCORES_EXACT},
                           std::pair{std::string_view("int8"), BLASST_SCORES_INT8}});
}

// What the call decides by.
struct Decision {
  std::string order, test;
  OptionalTensor thresholds;
  std::string scores;
};

blasst::Decision describe_decision(Decision& d, const blasst::Problem& p, const Tensor& q) {
  blasst::Decision decision{
      .order = order_of(d.order), .test = {.kind = test_of(d.test)}, .scores = scores_of(d.scores)};
  if (!d.thresholds) return decision;
  blasst::TileTest& test = decision.test;
  const Tensor& t = *d.thresholds;
  check_devices("q", q, {{"thresholds", &t}});
  check(t.dim() == 3 && (t.size(0) == 1 || t.size(0) == p.batch) &&
            (t.size(1) == 1 || t.size(1) == p.heads),
        "thresholds is ", t, "; it must be [1 or batch, 1 or heads, places] with batch ", p.batch,
        " and heads ", p.heads);
  test.values = floats("thresholds", d.thresholds, "[requests, heads, places]", shape_of(t));
  test.places = t.size(2);
  test.stride_place = 1;
  test.stride_head = t.size(1) == 1 ? 0 : test.places;
  test.stride_request = t.size(0) == 1 ? 0 : t.size(1) * test.places;
  return decision;
}

// What the call writes beside the output; undefined where it is not wanted.
struct Reports {
  Tensor lse, dropped_mass_bound;  // float32 [heads, rows]
  Tensor tiles;                    // int64 [2, batch, heads]: visitable, skipped
  Tensor gaps;                     // int64 [heads, gap bins]
  Tensor maxima;                   // float32 [heads, query tiles, key tiles]
  Tensor bits;                     // int32 [heads * query tiles * words]: a bit a tile
};

template <typename T>
T* data_of(const Tensor& t) {
  return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

blasst::Report report_of(const Reports& r, const blasst::Problem& p) {
  blasst::Report report{.lse = data_of<float>(r.lse),
                        .dropped_mass_bound = data_of<float>(r.dropped_mass_bound),
                        .tiles_visitable = data_of<int64_t>(r.tiles),
                        .tile_bits = data_of<uint32_t>(r.bits),
                        .gap_histogram = data_of<uint64_t>(r.gaps),
                        .tile_maxima = data_of<float>(r.maxima)};
  if (r.tiles.defined()) report.tiles_skipped = report.tiles_visitable + p.batch * p.heads;
  if (r.maxima.defined()) report.tile_maxima_stride = r.maxima.size(2);
  return report;
}

// The reports that are wanted, in their order; the others are undefined, which Python sees as None.
using Reported = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Wanted {
  bool lse, dropped_mass_bound, tiles, gaps, maxima, bits;
};

// The caller's workspace, or a tensor that is freed at the end of the call, and reused by torch
// only behind it on the stream.
void take_workspace(blasst::Execution& execution, const Tensor& q, OptionalTensor& workspace,
                    std::size_t needed) {
  const auto bytes = static_cast<int64_t>(needed);
  if (!workspace) {
    if (!q.is_cuda()) return;
    workspace = torch::stable::new_empty(q, std::vector<int64_t>{bytes}, ScalarType::Byte);
  }
  check_devices("q", q, {{"workspace", &*workspace}});
  check_type("workspace", *workspace, ScalarType::Byte);
  check(workspace->dim() == 1 && workspace->is_contiguous() && workspace->numel() >= bytes,
        "workspace is ", *workspace, "; it must be [bytes], contiguous, of at least ", bytes,
        " for this call");
  execution.workspace = workspace->mutable_data_ptr();
  execution.workspace_bytes = static_cast<std::size_t>(workspace->numel());
}

// Runs the call into `out`, [..., heads, value_dim] with rows like q's; a new tensor if it is none.
template <Phase phase>
Reported run(Arguments a, Decision decision, const Wanted& wanted, OptionalTensor& out,
             OptionalTensor workspace = {}) {
  const Place place(a.q);
  blasst::AttentionParams params{.problem = describe(a, phase), .execution = place.execution()};
  blasst::Problem& p = params.problem;
  params.decision = describe_decision(decision, p, a.q);
  check(!wanted.maxima || !a.cu_seqlens_q,
        "maxima is true; it needs q as [batch, query_length, heads, head_dim], without "
        "cu_seqlens_q");
  check_blocks(params, phase, a.blocks);

  std::vector<int64_t> out_shape = shape_of(a.q);
  out_shape.back() = p.value_dim;
  if (!out) out = torch::stable::new_empty(a.q, out_shape);
  check_devices("q", a.q, {{"out", &*out}});
  check_shape("out", *out, "[..., heads, value_dim], rows like q's", out_shape);
  check_type("out", *out, a.q.scalar_type());
  check(out->numel() == 0 || out->stride(out->dim() - 1) == 1,
        "out has a last dimension that is not contiguous; it is written in place");
  p.out = view_of(*out);

  const blasst::Plan tiles = plan(params, phase);
  const auto report = [&](bool want, ScalarType type, const std::vector<int64_t>& shape) {
    return want ? torch::stable::new_empty(a.q, shape, type) : Tensor();
  };
  const Reports reports{.lse = report(wanted.lse, ScalarType::Float, {p.heads, a.rows()}),
                        .dropped_mass_bound = report(wanted.dropped_mass_bound, ScalarType::Float,
                                                     {p.heads, a.rows()}),
                        .tiles = report(wanted.tiles, ScalarType::Long, {2, p.batch, p.heads}),
                        .gaps = report(wanted.gaps, ScalarType::Long, {p.heads, BLASST_GAP_BINS}),
                        .maxima = report(wanted.maxima, ScalarType::Float,
                                         {tiles.tile_heads, tiles.query_tiles, tiles.key_tiles}),
                        .bits = report(wanted.bits, ScalarType::Int, {bit_words(tiles)})};
  params.report = report_of(reports, p);
  take_workspace(params.execution, a.q, workspace, tiles.workspace_bytes);
  phase == Phase::kDecode ? blasst::decode(params) : blasst::prefill(params);
  return {reports.lse, reports.dropped_mass_bound, reports.tiles, reports.gaps, reports.maxima,
          reports.bits};
}

template <Phase phase>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention(
    Tensor q, Tensor k, Tensor v, BLASST_ARGUMENTS, std::string order, std::string test,
    OptionalTensor thresholds, bool want_lse, bool want_bound, bool want_tiles, bool want_gaps,
    bool want_maxima, bool want_bits, std::optional<int64_t> max_seqlen_q,
    std::optional<int64_t> max_seqlen_k, std::string scores, OptionalTensor k_scale,
    OptionalTensor v_scale) {
  OptionalTensor out;
  Arguments given = BLASST_ARGUMENTS_GIVEN;
  given.k_scale = k_scale, given.v_scale = v_scale;
  const Reported reported =
      run<phase>(given, {order, test, thresholds, scores},
                 {want_lse, want_bound, want_tiles, want_gaps, want_maxima, want_bits}, out);
  return std::tuple_cat(std::tuple{*out}, reported);
}

// The same into a tensor of the caller's, with the caller's workspace.
template <Phase phase>
Reported attention_into(Tensor out, Tensor q, Tensor k, Tensor v, BLASST_ARGUMENTS,
                        std::string order, std::string test, OptionalTensor thresholds,
                        bool want_lse, bool want_bound, bool want_tiles, bool want_gaps,
                        bool want_maxima, bool want_bits, std::optional<int64_t> max_seqlen_q,
                        std::optional<int64_t> max_seqlen_k, std::string scores,
                        OptionalTensor k_scale, OptionalTensor v_scale, OptionalTensor workspace) {
  OptionalTensor into = out;
  Arguments given = BLASST_ARGUMENTS_GIVEN;
  given.k_scale = k_scale, given.v_scale = v_scale;
  return run<phase>(given, {order, test, thresholds, scores},
                    {want_lse, want_bound, want_tiles, want_gaps, want_maxima, want_bits}, into,
                    workspace);
}

// What blasst_check_pages finds, int32 [4] on the device.
Tensor check_pages(Tensor page_table, Tensor lengths, int64_t page_size, int64_t pages) {
  check(page_table.dim() == 2, "page_table is ", page_table,
        "; it must be [batch, pages a request]");
  check_devices("page_table", page_table, {{"lengths", &lengths}});
  OptionalTensor table = page_table, ends = lengths;
  blasst::Problem p{.batch = page_table.size(0)};
  blasst::KeysValues& kv = p.kv;
  kv.layout = BLASST_LAYOUT_PAGED;
  kv.page_table_stride = page_table.size(1);
  kv.page_table =
      indices("page_table", table, "[batch, pages a request]", {p.batch, kv.page_table_stride});
  kv.lengths = indices("lengths", ends, "[batch]", {p.batch});
  kv.page_size = page_size;
  kv.pages = pages;
  const Place place(page_table);
  Tensor found = torch::stable::new_empty(page_table, std::vector<int64_t>{4}, ScalarType::Int);
  blasst::check_pages(p, static_cast<int32_t*>(found.mutable_data_ptr()), place.execution().stream);
  return found;
}

// What a call decides on and needs, from numbers alone (blasst_plan): query rows, keys and tiles a
// split of its tiles, heads, query tiles and key tiles of a report, words of tile bits, bytes of
// workspace, most splits. `rows`: of all requests, of ragged queries; `keys`: that a request has
// room for.
std::vector<int64_t> plan_of(std::string phase, std::string device, std::string dtype,
                             int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim,
                             int64_t value_dim, int64_t query_length, int64_t keys,
                             std::optional<int64_t> rows, std::string scores,
                             std::optional<std::string> k_dtype,
                             std::optional<std::string> v_dtype) {
  using Name = std::string_view;
  const auto of_queries = std::array{std::pair{Name("float32"), BLASST_FLOAT32},
                                     std::pair{Name("float16"), BLASST_FLOAT16},
                                     std::pair{Name("bfloat16"), BLASST_BFLOAT16}};
  const auto of_keys =
      std::array{of_queries[0], of_queries[1], of_queries[2], std::pair{Name("int8"), BLASST_INT8},
                 std::pair{Name("float8_e4m3fn"), BLASST_FLOAT8_E4M3}};
  blasst::AttentionParams params{.problem = {.batch = batch,
                                             .heads = heads,
                                             .kv_heads = kv_heads,
                                             .head_dim = head_dim,
                                             .value_dim = value_dim,
                                             .query_length = query_length,
                                             .kv = {.key_length = keys}},
                                 .decision = {.scores = scores_of(scores)}};
  blasst::Problem& p = params.problem;
  p.q.dtype = p.out.dtype = choose("dtype", dtype, of_queries);
  p.kv.k.dtype = choose("k_dtype", k_dtype.value_or(dtype), of_keys);
  p.kv.v.dtype = choose("v_dtype", v_dtype.value_or(dtype), of_keys);
  if (rows) p.query_layout = BLASST_LAYOUT_RAGGED, p.rows = *rows;
  params.execution.backend = choose("device", device,
                                    std::array{std::pair{Name("cpu"), BLASST_BACKEND_CPU},
                                               std::pair{Name("cuda"), BLASST_BACKEND_CUDA}});
  if (params.execution.backend == BLASST_BACKEND_CPU)
    params.execution.threads = static_cast<int32_t>(torch::stable::get_num_threads());
  const blasst::Plan found =
      plan(params, choose("phase", phase,
                          std::array{std::pair{Name("prefill"), Phase::kPrefill},
                                     std::pair{Name("decode"), Phase::kDecode}}));
  return {found.shape.query_rows,  found.shape.keys,
          found.shape.split_tiles, found.tile_heads,
          found.query_tiles,       found.key_tiles,
          found.tile_words,        static_cast<int64_t>(found.workspace_bytes),
          found.shape.most_splits};
}

// The tile that decisions are taken on: query rows, keys, tiles a split (0: one split), most splits
// (0: no limit).
template <Phase phase>
std::vector<int64_t> tile_shape(Tensor q, Tensor k, Tensor v) {
  Arguments a{.q = q, .k = k, .v = v};
  const Place place(a.q);
  const blasst::AttentionParams params{.problem = describe(a, phase),
                                       .execution = place.execution()};
  const blasst::TileShape shape = plan(params, phase).shape;
  return {shape.query_rows, shape.keys, shape.split_tiles, shape.most_splits};
}

constexpr std::string_view kArguments =
    "Tensor q, Tensor k, Tensor v, Tensor? starts, Tensor? lengths, Tensor? query_lengths,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? page_table, float scale, float softcap,"
    " Tensor? sinks, bool causal, int window_left, int window_right, Tensor? bands,"
    " Tensor? blocks, str order, str test, Tensor? thresholds, bool want_lse,"
    " bool want_dropped_mass_bound, bool want_tiles, bool want_gaps, bool want_maxima,"
    " bool want_bits, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None,"
    " str scores='exact', Tensor? k_scale=None, Tensor? v_scale=None";
constexpr std::string_view kReports =
    "Tensor lse, Tensor dropped_mass_bound, Tensor tiles, Tensor gaps, Tensor maxima, Tensor bits)";

std::string joined(std::initializer_list<std::string_view> parts) {
  std::string text;
  for (const std::string_view part : parts) text += part;
  return text;
}

}  // namespace

STABLE_TORCH_LIBRARY(blasst, m) {
  for (const std::string_view phase : {"prefill", "decode"}) {
    m.def(joined({phase, "(", kArguments, ") -> (Tensor out, ", kReports}).c_str());
    m.def(joined({phase, "_into(Tensor(a!) out, ", kArguments, ", Tensor(b!)? workspace=None) -> (",
                  kReports})
              .c_str());
  }
  m.def("check_pages(Tensor page_table, Tensor lengths, int page_size, int pages) -> Tensor");
  m.def("prefill_tile_shape(Tensor q, Tensor k, Tensor v) -> int[]");
  m.def("decode_tile_shape(Tensor q, Tensor k, Tensor v) -> int[]");
  m.def(
      "plan(str phase, str device, str dtype, int batch, int heads, int kv_heads, int head_dim,"
      " int value_dim, int query_length, int keys, int? rows=None,"
      " str scores='exact', str? k_dtype=None, str? v_dtype=None) -> int[]");
}

#define BLASST_IMPLEMENT(m)                                                           \
  m.impl("prefill", TORCH_BOX(Kernel<attention<Phase::kPrefill>>::call));             \
  m.impl("decode", TORCH_BOX(Kernel<attention<Phase::kDecode>>::call));               \
  m.impl("prefill_into", TORCH_BOX(Kernel<attention_into<Phase::kPrefill>>::call));   \
  m.impl("decode_into", TORCH_BOX(Kernel<attention_into<Phase::kDecode>>::call));     \
  m.impl("prefill_tile_shape", TORCH_BOX(Kernel<tile_shape<Phase::kPrefill>>::call)); \
  m.impl("decode_tile_shape", TORCH_BOX(Kernel<tile_shape<Phase::kDecode>>::call))

STABLE_TORCH_LIBRARY_IMPL(blasst, CompositeExplicitAutograd, m) {
  m.impl("plan", TORCH_BOX(Kernel<plan_of>::call));
}
STABLE_TORCH_LIBRARY_IMPL(blasst, CPU, m) { BLASST_IMPLEMENT(m); }
STABLE_TORCH_LIBRARY_IMPL(blasst, CUDA, m) {
  BLASST_IMPLEMENT(m);
  m.impl("check_pages", TORCH_BOX(Kernel<check_pages>::call));
}
