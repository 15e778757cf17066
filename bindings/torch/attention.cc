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

// What the call writes beside the output; each if it is wanted.
struct Reports {
  OptionalTensor lse, dropped_mass_bound;  // float32 [heads, rows]
  OptionalTensor tiles;                    // int64 [2, batch, heads]: visitable, skipped
  OptionalTensor gaps;                     // int64 [heads, gap bins]
  OptionalTensor maxima;                   // float32 [heads, query tiles, key tiles]
  // int32: a bit a tile, packed as the call packs them, in a flat tensor as large as they may get.
  // A padded batch's requests each have room for all rows and keys.
  OptionalTensor bits;
};

template <typename T>
T* data_of(const OptionalTensor& t) {
  return t ? static_cast<T*>(t->mutable_data_ptr()) : nullptr;
}

template <typename Params>
void set_report(Params& p, const Reports& r) {
  p.report.lse = data_of<float>(r.lse);
  p.report.dropped_mass_bound = data_of<float>(r.dropped_mass_bound);
  if (r.tiles) {
    p.report.tiles_visitable = data_of<int64_t>(r.tiles);
    p.report.tiles_skipped = p.report.tiles_visitable + p.batch * p.heads;
  }
  p.report.gap_histogram = data_of<uint64_t>(r.gaps);
  p.report.tile_maxima = data_of<float>(r.maxima);
  if (r.maxima) p.report.tile_maxima_stride = r.maxima->size(2);
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
  if (reports.bits)  // also what the call leaves unused
    std::memset(p.report.tile_bits, 0, reports.bits->numel() * sizeof(*p.report.tile_bits));
  check_blocks(p, a.blocks);
  const Padding padding(p, a);
  if (padding.any()) {
    check(!a.blocks && !reports.maxima, a.blocks ? "blocks is given" : "maxima is true",
          " together with starts or query_lengths, but it is of the tiles of the whole batch: pass "
          "the requests one by one, or ragged");
    run_padded(p, padding, tiles_of(p, a).bit_words());
  } else if constexpr (std::same_as<Params, blasst::PrefillParams>) {
    blasst::prefill(p);
  } else {
    blasst::decode(p);
  }
}

// The output and the reports that are wanted, in this order.
template <typename Params>
std::tuple<Tensor, std::vector<Tensor>> attention(
    Tensor q, Tensor k, Tensor v, OptionalTensor starts, OptionalTensor lengths,
    OptionalTensor query_lengths, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    OptionalTensor page_table, std::optional<int64_t> max_seqlen_q,
    std::optional<int64_t> max_seqlen_k, double scale, double softcap, OptionalTensor sinks,
    bool causal, int64_t window_left, int64_t window_right, OptionalTensor bands,
    OptionalTensor blocks, std::string order, std::string test, OptionalTensor thresholds,
    bool want_lse, bool want_bound, bool want_tiles, bool want_gaps, bool want_maxima,
    bool want_bits) {
  Arguments a{q,
              k,
              v,
              starts,
              lengths,
              query_lengths,
              cu_seqlens_q,
              cu_seqlens_k,
              page_table,
              max_seqlen_q,
              max_seqlen_k,
              scale,
              softcap,
              sinks,
              causal,
              window_left,
              window_right,
              bands,
              blocks};
  Decision decision{order, test, thresholds};
  Params p;
  describe(p, a);
  describe_decision(p, decision, a.q);
  check(!want_maxima || !a.cu_seqlens_q,
        "maxima is true; it needs q as [batch, query_length, heads, head_dim], without "
        "cu_seqlens_q");
  const Place place(a.q);
  place.set(p);

  std::vector<int64_t> out_shape = shape_of(a.q);
  out_shape.back() = p.value_dim;
  const Tensor out = torch::stable::new_empty(a.q, out_shape);
  p.out = view_of(out);

  const Tiles tiles = want_maxima || want_bits ? tiles_of(p, a) : Tiles{};
  std::vector<Tensor> wanted;
  const auto report = [&](bool want, ScalarType type, std::vector<int64_t> shape) {
    if (!want) return OptionalTensor{};
    wanted.push_back(torch::stable::new_empty(a.q, shape, type));
    return OptionalTensor(wanted.back());
  };
  const Reports reports{
      .lse = report(want_lse, ScalarType::Float, {p.heads, a.rows()}),
      .dropped_mass_bound = report(want_bound, ScalarType::Float, {p.heads, a.rows()}),
      .tiles = report(want_tiles, ScalarType::Long, {2, p.batch, p.heads}),
      .gaps = report(want_gaps, ScalarType::Long, {p.heads, BLASST_GAP_BINS}),
      .maxima =
          report(want_maxima, ScalarType::Float, {tiles.heads, tiles.query_tiles, tiles.key_tiles}),
      .bits = report(want_bits, ScalarType::Int, {tiles.bit_words()})};
  set_report(p, reports);
  if (a.q.is_cuda())
    run_cuda(p, a);
  else
    run_cpu(p, a, reports);
  return {out, wanted};
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

constexpr const char* kArguments =
    "(Tensor q, Tensor k, Tensor v, Tensor? starts, Tensor? lengths, Tensor? query_lengths,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? page_table, SymInt? max_seqlen_q,"
    " SymInt? max_seqlen_k, float scale, float softcap, Tensor? sinks, bool causal,"
    " int window_left, int window_right, Tensor? bands, Tensor? blocks, str order, str test,"
    " Tensor? thresholds, bool want_lse, bool want_dropped_mass_bound, bool want_tiles,"
    " bool want_gaps, bool want_maxima, bool want_bits) -> (Tensor out, Tensor[] reports)";

}  // namespace

STABLE_TORCH_LIBRARY(blasst, m) {
  m.def((std::string("prefill") + kArguments).c_str());
  m.def((std::string("decode") + kArguments).c_str());
  m.def("check_pages(Tensor page_table, Tensor lengths, int page_size, int pages) -> Tensor");
  m.def("prefill_tile_shape(Tensor q, Tensor k, Tensor v) -> int[]");
  m.def("decode_tile_shape(Tensor q, Tensor k, Tensor v) -> int[]");
}

#define BLASST_IMPLEMENT(m)                                                                 \
  m.impl("prefill", TORCH_BOX(Kernel<attention<blasst::PrefillParams>>::call));             \
  m.impl("decode", TORCH_BOX(Kernel<attention<blasst::DecodeParams>>::call));               \
  m.impl("prefill_tile_shape", TORCH_BOX(Kernel<tile_shape<blasst::PrefillParams>>::call)); \
  m.impl("decode_tile_shape", TORCH_BOX(Kernel<tile_shape<blasst::DecodeParams>>::call))

STABLE_TORCH_LIBRARY_IMPL(blasst, CPU, m) { BLASST_IMPLEMENT(m); }
STABLE_TORCH_LIBRARY_IMPL(blasst, CUDA, m) {
  BLASST_IMPLEMENT(m);
  m.impl("check_pages", TORCH_BOX(Kernel<check_pages>::call));
}
