// torch.ops.blasst.prefill, decode, and the tiles that they decide on.
//
// What Python callers use is blasst.attention, which documents the arguments.
#include <array>
#include <concepts>
#include <cstring>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "blasst/blasst.hpp"
#include "padding.h"
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

// What the call decides by.
struct Decision {
  std::string order, test;
  OptionalTensor thresholds;
};

template <typename Params>
void describe_decision(Params& p, Decision& d, const Tensor& q) {
  p.order = order_of(d.order);
  p.test.kind = test_of(d.test);
  if (!d.thresholds) return;
  const Tensor& t = *d.thresholds;
  check_devices("q", q, {{"thresholds", &t}});
  check(t.dim() == 3 && (t.size(0) == 1 || t.size(0) == p.batch) &&
            (t.size(1) == 1 || t.size(1) == p.heads),
        "thresholds is ", t, "; it must be [1 or batch, 1 or heads, places] with batch ", p.batch,
        " and heads ", p.heads);
  p.test.values = floats("thresholds", d.thresholds, "[requests, heads, places]", shape_of(t));
  p.test.places = t.size(2);
  p.test.stride_place = 1;
  p.test.stride_head = t.size(1) == 1 ? 0 : p.test.places;
  p.test.stride_request = t.size(0) == 1 ? 0 : t.size(1) * p.test.places;
}

// What the call writes beside the output; undefined where it is not wanted.
struct Reports {
  Tensor lse, dropped_mass_bound;  // float32 [heads, rows]
  Tensor tiles;                    // int64 [2, batch, heads]: visitable, skipped
  Tensor gaps;                     // int64 [heads, gap bins]
  Tensor maxima;                   // float32 [heads, query tiles, key tiles]
  // int32: a bit a tile, packed as the call packs them, in a flat tensor as large as they may get.
  // A padded batch's requests each have room for all rows and keys.
  Tensor bits;
};

template <typename T>
T* data_of(const Tensor& t) {
  return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

template <typename Params>
void set_report(Params& p, const Reports& r) {
  p.report.lse = data_of<float>(r.lse);
  p.report.dropped_mass_bound = data_of<float>(r.dropped_mass_bound);
  if (r.tiles.defined()) {
    p.report.tiles_visitable = data_of<int64_t>(r.tiles);
    p.report.tiles_skipped = p.report.tiles_visitable + p.batch * p.heads;
  }
  p.report.gap_histogram = data_of<uint64_t>(r.gaps);
  p.report.tile_maxima = data_of<float>(r.maxima);
  if (r.maxima.defined()) p.report.tile_maxima_stride = r.maxima.size(2);
  p.report.tile_bits = data_of<uint32_t>(r.bits);
}

template <typename Params>
void run_cuda(Params& p, Arguments& a) {
  p.kv.starts = indices("starts", a.starts, "[batch]", {p.batch});
  const int32_t* used = indices("query_lengths", a.query_lengths, "[batch]", {p.batch});
  if constexpr (requires { p.query_lengths; })
    p.query_lengths = used;
  else
    check(!used, "query_lengths is given; decode on a CUDA device has none");
  // Freed at the end of this call, and reused by torch only behind it on the stream.
  p.workspace_bytes = blasst::workspace_bytes(p);
  const Tensor workspace = torch::stable::new_empty(
      a.q, std::vector<int64_t>{static_cast<int64_t>(p.workspace_bytes)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  if constexpr (std::same_as<Params, blasst::PrefillParams>)
    blasst::prefill(p);
  else
    blasst::decode(p);
}

template <typename Params>
void run_cpu(Params& p, Arguments& a, const Reports& reports) {
  if (p.report.tile_bits)  // also what the call leaves unused
    std::memset(p.report.tile_bits, 0, reports.bits.numel() * sizeof(*p.report.tile_bits));
  check_blocks(p, a.blocks);
  const Padding padding(p, a);
  if (padding.any()) {
    check(!a.blocks && !p.report.tile_maxima, a.blocks ? "blocks is given" : "maxima is true",
          " together with starts or query_lengths, but it is of the tiles of the whole batch: pass "
          "the requests one by one, or ragged");
    run_padded(p, padding, tiles_of(p, a).bit_words());
  } else if constexpr (std::same_as<Params, blasst::PrefillParams>) {
    blasst::prefill(p);
  } else {
    blasst::decode(p);
  }
}

// The reports that are wanted, in their order; the others are undefined, which Python sees as None.
using Reported = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Wanted {
  bool lse, dropped_mass_bound, tiles, gaps, maxima, bits;
};

// Runs the call into `out`, [..., heads, value_dim] with rows like q's; a new tensor if it is none.
template <typename Params>
Reported run(Arguments a, Decision decision, const Wanted& wanted, OptionalTensor& out) {
  Params p;
  describe(p, a);
  describe_decision(p, decision, a.q);
  check(!wanted.maxima || !a.cu_seqlens_q,
        "maxima is true; it needs q as [batch, query_length, heads, head_dim], without "
        "cu_seqlens_q");
  const Place place(a.q);
  place.set(p);

  std::vector<int64_t> out_shape = shape_of(a.q);
  out_shape.back() = p.value_dim;
  if (!out) out = torch::stable::new_empty(a.q, out_shape);
  check_devices("q", a.q, {{"out", &*out}});
  check_shape("out", *out, "[..., heads, value_dim], rows like q's", out_shape);
  check_type("out", *out, a.q.scalar_type());
  check(out->numel() == 0 || out->stride(out->dim() - 1) == 1,
        "out has a last dimension that is not contiguous; it is written in place");
  p.out = view_of(*out);

  const Tiles tiles = wanted.maxima || wanted.bits ? tiles_of(p, a) : Tiles{};
  const auto report = [&](bool want, ScalarType type, const std::vector<int64_t>& shape) {
    return want ? torch::stable::new_empty(a.q, shape, type) : Tensor();
  };
  const Reports reports{.lse = report(wanted.lse, ScalarType::Float, {p.heads, a.rows()}),
                        .dropped_mass_bound = report(wanted.dropped_mass_bound, ScalarType::Float,
                                                     {p.heads, a.rows()}),
                        .tiles = report(wanted.tiles, ScalarType::Long, {2, p.batch, p.heads}),
                        .gaps = report(wanted.gaps, ScalarType::Long, {p.heads, BLASST_GAP_BINS}),
                        .maxima = report(wanted.maxima, ScalarType::Float,
                                         {tiles.heads, tiles.query_tiles, tiles.key_tiles}),
                        .bits = report(wanted.bits, ScalarType::Int, {tiles.bit_words()})};
  set_report(p, reports);
  if (a.q.is_cuda())
    run_cuda(p, a);
  else
    run_cpu(p, a, reports);
  return {reports.lse, reports.dropped_mass_bound, reports.tiles, reports.gaps, reports.maxima,
          reports.bits};
}

template <typename Params>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention(
    Tensor q, Tensor k, Tensor v, BLASST_ARGUMENTS, std::string order, std::string test,
    OptionalTensor thresholds, bool want_lse, bool want_bound, bool want_tiles, bool want_gaps,
    bool want_maxima, bool want_bits, std::optional<int64_t> max_seqlen_q,
    std::optional<int64_t> max_seqlen_k) {
  OptionalTensor out;
  const Reported reported =
      run<Params>(BLASST_ARGUMENTS_GIVEN, {order, test, thresholds},
                  {want_lse, want_bound, want_tiles, want_gaps, want_maxima, want_bits}, out);
  return std::tuple_cat(std::tuple{*out}, reported);
}

// The same into a tensor of the caller's.
template <typename Params>
Reported attention_into(Tensor out, Tensor q, Tensor k, Tensor v, BLASST_ARGUMENTS,
                        std::string order, std::string test, OptionalTensor thresholds,
                        bool want_lse, bool want_bound, bool want_tiles, bool want_gaps,
                        bool want_maxima, bool want_bits, std::optional<int64_t> max_seqlen_q,
                        std::optional<int64_t> max_seqlen_k) {
  OptionalTensor into = out;
  return run<Params>(BLASST_ARGUMENTS_GIVEN, {order, test, thresholds},
                     {want_lse, want_bound, want_tiles, want_gaps, want_maxima, want_bits}, into);
}

// What blasst_check_pages finds, int32 [4] on the device.
Tensor check_pages(Tensor page_table, Tensor lengths, int64_t page_size, int64_t pages) {
  check(page_table.dim() == 2, "page_table is ", page_table,
        "; it must be [batch, pages a request]");
  check_devices("page_table", page_table, {{"lengths", &lengths}});
  OptionalTensor table = page_table, ends = lengths;
  blasst::KeysValues kv;
  const int64_t batch = page_table.size(0);
  kv.page_table_stride = page_table.size(1);
  kv.page_table =
      indices("page_table", table, "[batch, pages a request]", {batch, kv.page_table_stride});
  kv.lengths = indices("lengths", ends, "[batch]", {batch});
  kv.page_size = page_size;
  kv.pages = pages;
  const Place place(page_table);
  Tensor found = torch::stable::new_empty(page_table, std::vector<int64_t>{4}, ScalarType::Int);
  blasst::check_pages(kv, batch, static_cast<int32_t*>(found.mutable_data_ptr()), place.stream());
  return found;
}

// The tile that decisions are taken on: query rows, keys, tiles a split (0: one split).
template <typename Params>
std::vector<int64_t> tile_shape(Tensor q, Tensor k, Tensor v) {
  Arguments a{.q = q, .k = k, .v = v};
  Params p;
  describe(p, a);
  const Place place(a.q);
  place.set(p);
  std::vector<int64_t> out_shape = shape_of(a.q);
  out_shape.back() = p.value_dim;
  const Tensor out = torch::stable::new_empty(a.q, out_shape);
  p.out = view_of(out);
  const blasst::TileShape shape = blasst::tile_shape(p);
  return {shape.query_rows, shape.keys, shape.split_tiles};
}

constexpr std::string_view kArguments =
    "Tensor q, Tensor k, Tensor v, Tensor? starts, Tensor? lengths, Tensor? query_lengths,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? page_table, float scale, float softcap,"
    " Tensor? sinks, bool causal, int window_left, int window_right, Tensor? bands,"
    " Tensor? blocks, str order, str test, Tensor? thresholds, bool want_lse,"
    " bool want_dropped_mass_bound, bool want_tiles, bool want_gaps, bool want_maxima,"
    " bool want_bits, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None) -> (";
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
    m.def(joined({phase, "(", kArguments, "Tensor out, ", kReports}).c_str());
    m.def(joined({phase, "_into(Tensor(a!) out, ", kArguments, kReports}).c_str());
  }
  m.def("check_pages(Tensor page_table, Tensor lengths, int page_size, int pages) -> Tensor");
  m.def("prefill_tile_shape(Tensor q, Tensor k, Tensor v) -> int[]");
  m.def("decode_tile_shape(Tensor q, Tensor k, Tensor v) -> int[]");
}

#define BLASST_IMPLEMENT(m)                                                                 \
  m.impl("prefill", TORCH_BOX(Kernel<attention<blasst::PrefillParams>>::call));             \
  m.impl("decode", TORCH_BOX(Kernel<attention<blasst::DecodeParams>>::call));               \
  m.impl("prefill_into", TORCH_BOX(Kernel<attention_into<blasst::PrefillParams>>::call));   \
  m.impl("decode_into", TORCH_BOX(Kernel<attention_into<blasst::DecodeParams>>::call));     \
  m.impl("prefill_tile_shape", TORCH_BOX(Kernel<tile_shape<blasst::PrefillParams>>::call)); \
  m.impl("decode_tile_shape", TORCH_BOX(Kernel<tile_shape<blasst::DecodeParams>>::call))

STABLE_TORCH_LIBRARY_IMPL(blasst, CPU, m) { BLASST_IMPLEMENT(m); }
STABLE_TORCH_LIBRARY_IMPL(blasst, CUDA, m) {
  BLASST_IMPLEMENT(m);
  m.impl("check_pages", TORCH_BOX(Kernel<check_pages>::call));
}
