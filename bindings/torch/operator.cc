// torch.ops.blasst.prefill, its gradients, and decode: tensors in, parameter structs out.
//
// Built on PyTorch's stable ABI, so one binary loads in every torch >= 2.10 and every Python. What
// Python callers use is blasst.attention, which documents the arguments; here shapes are checked
// against each other, and blasst::prefill / blasst::decode check the rest.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "blasst/blasst.hpp"
#include "check.h"

namespace {

using namespace blasst::binding;
using OptionalTensor = std::optional<Tensor>;

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

// The stream that torch works on, of a CUDA device. torch's CUDA library exists only in some builds
// of torch, so it is looked up where the process has it.
void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Get>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream")
                                         : nullptr);
  }();
  check(get != nullptr, "torch has no libtorch_cuda.so with aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  check(get(device, &stream) == AOTI_TORCH_SUCCESS, "torch has no current CUDA stream");
  return stream;
}

// [request, token, head, element] of a 4-d tensor, [token, head, element] of a 3-d one.
blasst::View view_of(const Tensor& t) {
  int64_t elements = t.numel() == 0 ? 0 : 1;
  for (int64_t i = 0; elements > 0 && i < t.dim(); ++i) elements += (t.size(i) - 1) * t.stride(i);
  return {.data = t.data_ptr(),
          .elements = elements,
          .stride_request = t.dim() == 4 ? t.stride(0) : 0,
          .stride_token = t.stride(t.dim() - 3),
          .stride_head = t.stride(t.dim() - 2)};
}

// An index tensor of the given shape as contiguous int32, or null. `t` is replaced by it, to live
// as long as the caller's.
const int32_t* indices(std::string_view name, OptionalTensor& t, std::string_view meaning,
                       const std::vector<int64_t>& sizes) {
  if (!t) return nullptr;
  check_shape(name, *t, meaning, sizes);
  t = torch::stable::contiguous(*t);
  if (t->is_cuda()) {
    check(t->scalar_type() == ScalarType::Int, name, " is ", t->scalar_type(),
          "; on a CUDA device it must be int32");
    return static_cast<const int32_t*>(t->const_data_ptr());
  }
  if (t->scalar_type() == ScalarType::Long) {
    Tensor narrow = torch::stable::new_empty(*t, sizes, ScalarType::Int);
    const auto* from = static_cast<const int64_t*>(t->const_data_ptr());
    auto* to = static_cast<int32_t*>(narrow.mutable_data_ptr());
    for (int64_t i = 0; i < t->numel(); ++i) {
      check(std::in_range<int32_t>(from[i]), name, " holds ", from[i], "; it must fit in int32");
      to[i] = static_cast<int32_t>(from[i]);
    }
    t = narrow;
  }
  check(t->scalar_type() == ScalarType::Int, name, " is ", t->scalar_type(),
        "; it must be int32 or int64");
  return static_cast<const int32_t*>(t->const_data_ptr());
}

struct KeysValuesArguments {
  Tensor k, v;
  OptionalTensor lengths, cu_seqlens, page_table;
};

blasst::KeysValues keys_values(KeysValuesArguments& a, int64_t batch, int64_t head_dim) {
  const int64_t dims = a.cu_seqlens ? 3 : 4;
  check(a.k.dim() == dims, "k is ", a.k, "; it must be ",
        a.cu_seqlens   ? "[total keys, kv_heads, head_dim], since cu_seqlens_k is given"
        : a.page_table ? "[pages, page_size, kv_heads, head_dim], since page_table is given"
                       : "[batch, keys, kv_heads, head_dim]");
  check(a.k.size(dims - 1) == head_dim, "k is ", a.k, ", but q has head_dim ", head_dim);
  check(a.v.dim() == dims, "v is ", a.v, ", but k is ", a.k);
  for (int64_t i = 0; i + 1 < dims; ++i)
    check(a.v.size(i) == a.k.size(i), "v is ", a.v, ", but k is ", a.k);

  a.k = readable(a.k);
  a.v = readable(a.v);
  blasst::KeysValues kv;
  kv.k = view_of(a.k);
  kv.v = view_of(a.v);
  kv.lengths = indices("lengths", a.lengths, "[batch]", {batch});
  kv.cu_seqlens = indices("cu_seqlens_k", a.cu_seqlens, "[batch + 1]", {batch + 1});
  check(!a.cu_seqlens || (!a.page_table && !a.lengths),
        "cu_seqlens_k is given together with page_table or lengths; they exclude each other");
  if (kv.cu_seqlens) {
    check(a.k.is_cuda() || kv.cu_seqlens[batch] == a.k.size(0), "cu_seqlens_k ends at ",
          kv.cu_seqlens[batch], ", but k is ", a.k);
  } else if (a.page_table) {
    check(a.page_table->dim() == 2, "page_table is ", *a.page_table,
          "; it must be [batch, pages a request]");
    check(kv.lengths != nullptr,
          "page_table is given without lengths; pages need the length of "
          "each request");
    kv.page_table_stride = a.page_table->size(1);
    kv.page_table = indices("page_table", a.page_table, "[batch, pages a request]",
                            {batch, kv.page_table_stride});
    kv.page_size = a.k.size(1);
    kv.pages = a.k.size(0);
  } else {
    check(a.k.size(0) == batch, "k is ", a.k, ", but q has batch ", batch);
    kv.key_length = a.k.size(1);
  }
  return kv;
}

void run(const blasst::PrefillParams& p) { blasst::prefill(p); }
void run(const blasst::DecodeParams& p) { blasst::decode(p); }

// What a padded batch leaves out: keys before a request's first, rows from its query length on,
// and the rows that causally see no key, so that a request has the query tiles it has without
// padding.
struct Padding {
  const int32_t* starts = nullptr;         // [batch] null: 0
  const int32_t* query_lengths = nullptr;  // [batch] null: all rows

  int64_t start(int64_t request) const { return starts ? starts[request] : 0; }
  int64_t rows(int64_t request, int64_t all) const {
    return query_lengths ? query_lengths[request] : all;
  }
};

template <typename Params>
int64_t key_length(const Params& p, int64_t request) {
  return p.kv.lengths ? p.kv.lengths[request] : p.kv.key_length;
}

template <typename Params>
bool is_padded(const Params& p, const Padding& padding) {
  bool padded = false;
  for (int64_t b = 0; b < p.batch && (padding.starts || padding.query_lengths); ++b) {
    const int64_t start = padding.start(b), end = key_length(p, b);
    const int64_t rows = padding.rows(b, p.query_length);
    check(start >= 0 && start <= end, "starts[", b, "] is ", start, "; it must be 0 to ", end,
          ", the end of the request's keys");
    check(rows >= 0 && rows <= p.query_length, "query_lengths[", b, "] is ", rows,
          "; it must be 0 to ", p.query_length, ", the query_length of q");
    padded = padded || start > 0 || rows < p.query_length;
  }
  return padded;
}

blasst::View from(const blasst::View& view, int64_t offset, blasst::DType dtype) {
  const int64_t bytes = element_bytes(dtype);
  blasst::View rest = view;
  rest.elements = std::max<int64_t>(0, view.elements - offset);
  if (rest.elements > 0) rest.data = static_cast<std::byte*>(view.data) + offset * bytes;
  return rest;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The band of each head and the block mask, made fit to be read in place.
template <typename Params>
void set_policy(Params& p, OptionalTensor& bands, OptionalTensor& blocks) {
  if (bands) {
    check_shape("bands", *bands, "[heads, 2]", {p.heads, 2});
    check(bands->scalar_type() == ScalarType::Long, "bands is ", bands->scalar_type(),
          "; it must be int64");
    bands = torch::stable::contiguous(*bands);
    p.mask.bands = static_cast<const int64_t*>(bands->const_data_ptr());
  }
  if (!blocks) return;
  check(blocks->scalar_type() == ScalarType::Byte, "blocks is ", blocks->scalar_type(),
        "; it must be uint8");
  check(blocks->dim() == 3, "blocks is ", *blocks,
        "; it must be [heads, query tiles, key tiles], in decode [kv_heads, batch, key tiles]");
  blocks = torch::stable::contiguous(*blocks);
  p.mask.blocks = static_cast<const uint8_t*>(blocks->const_data_ptr());
  p.mask.blocks_stride_query_tile = blocks->size(2);
  p.mask.blocks_stride_head = blocks->size(1) * blocks->size(2);
}

// The block mask is of the tiles that the call decides on. CUDA's arrays are not read here.
template <typename Params>
void check_blocks(const Params& p, const OptionalTensor& blocks) {
  if (!blocks || blocks->is_cuda()) return;
  const blasst::TileShape shape = blasst::tile_shape(p);
  int64_t heads = p.kv_heads, query_tiles = p.batch, keys = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    keys = std::max(keys, p.kv.cu_seqlens ? int64_t{p.kv.cu_seqlens[b + 1] - p.kv.cu_seqlens[b]}
                          : p.kv.lengths  ? int64_t{p.kv.lengths[b]}
                                          : p.kv.key_length);
  }
  if constexpr (requires { p.cu_seqlens_q; }) {
    heads = p.heads;
    query_tiles = 0;
    for (int64_t b = 0; b < p.batch; ++b)
      query_tiles +=
          ceil_div(p.cu_seqlens_q ? p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b] : p.query_length,
                   shape.query_rows);
  }
  const int64_t key_tiles = ceil_div(keys, shape.keys);
  check(blocks->size(0) == heads && blocks->size(1) == query_tiles && blocks->size(2) >= key_tiles,
        "blocks is ", *blocks, "; for tiles of ", shape.query_rows, " rows and ", shape.keys,
        " keys it must be [", heads, ", ", query_tiles, ", at least ", key_tiles, "]");
}

// Tile bits as the operator returns them: packed as the call packs them, in a flat tensor as large
// as they may get, so that its size follows from the other tensors' sizes. A padded batch's
// requests each have room for all rows and keys.
struct Bits {
  int64_t tiles, words;  // query tiles of all requests; words of a query tile
  int64_t heads;

  int64_t size() const { return heads * tiles * words; }
};

template <typename Params>
Bits bits_of(const Params& p, int64_t rows) {
  const blasst::TileShape shape = blasst::tile_shape(p);
  const int64_t keys = p.kv.cu_seqlens   ? p.kv.cu_seqlens[p.batch]
                       : p.kv.page_table ? p.kv.page_table_stride * p.kv.page_size
                                         : p.kv.key_length;
  Bits bits{p.batch, ceil_div(ceil_div(keys, shape.keys), 32), p.kv_heads};
  if constexpr (requires { p.cu_seqlens_q; }) {
    bits.heads = p.heads;
    bits.tiles = p.cu_seqlens_q ? rows / shape.query_rows + p.batch
                                : p.batch * ceil_div(p.query_length, shape.query_rows);
  }
  return bits;
}

// Tile maxima as the operator returns them: of dense queries.
struct Maxima {
  int64_t heads = 0, query_tiles = 0, key_tiles = 0;
};

template <typename Params>
Maxima maxima_of(const Params& p) {
  const blasst::TileShape shape = blasst::tile_shape(p);
  const int64_t keys = p.kv.cu_seqlens   ? p.kv.cu_seqlens[p.batch]
                       : p.kv.page_table ? p.kv.page_table_stride * p.kv.page_size
                                         : p.kv.key_length;
  const int64_t key_tiles = ceil_div(keys, shape.keys);
  if constexpr (requires { p.cu_seqlens_q; })
    return {p.heads, p.batch * ceil_div(p.query_length, shape.query_rows), key_tiles};
  return {p.kv_heads, p.batch, key_tiles};
}

// What a padded batch computes of one request.
struct Part {
  int64_t request;
  int64_t start, keys;  // first key, number of keys
  int64_t first, rows;  // the same of rows
};

template <typename Params>
std::vector<Part> parts_of(const Params& batch, const Padding& padding) {
  std::vector<Part> parts;
  for (int64_t b = 0; b < batch.batch; ++b) {
    const int64_t start = padding.start(b), keys = key_length(batch, b) - start;
    const int64_t used = padding.rows(b, batch.query_length);
    const int64_t rows = batch.mask.causal ? std::min(used, keys) : used;
    if (rows > 0) parts.push_back({b, start, keys, used - rows, rows});
  }
  return parts;
}

blasst::View rows_of(const blasst::View& view, const Part& part, blasst::DType dtype) {
  return from(view, part.request * view.stride_request + part.first * view.stride_token, dtype);
}

blasst::View keys_of(const blasst::View& view, const Part& part, blasst::DType dtype) {
  return from(view, part.request * view.stride_request + part.start * view.stride_token, dtype);
}

// The part as a call of its own, without a report.
template <typename Params>
Params call_of(const Params& batch, const Part& part) {
  Params p = batch;
  p.batch = 1;
  p.query_length = part.rows;
  p.q = rows_of(p.q, part, p.dtype);
  p.out = rows_of(p.out, part, p.dtype);
  if (p.kv.page_table) {
    p.kv.page_table += part.request * p.kv.page_table_stride;
    p.kv.lengths += part.request;
  } else {
    p.kv.k = keys_of(p.kv.k, part, p.dtype);
    p.kv.v = keys_of(p.kv.v, part, p.dtype);
    p.kv.key_length = part.keys;
    p.kv.lengths = nullptr;
  }
  if (p.test.values) p.test.values += part.request * p.test.stride_request;
  p.report = {};
  return p;
}

// Of [heads, rows of the batch], where the part's rows of a head begin.
template <typename Params>
int64_t head_row(const Params& batch, const Part& part, int64_t head) {
  return (head * batch.batch + part.request) * batch.query_length + part.first;
}

// Request by request. Rows left out are 0, their lse is -inf; out and the report are contiguous.
template <typename Params>
void run_padded(const Params& batch, const Padding& padding) {
  const int64_t all_rows = batch.batch * batch.query_length;
  const Bits bits = bits_of(batch, all_rows);  // checks the whole batch before anything is written
  const blasst::Report& report = batch.report;
  std::memset(batch.out.data, 0, batch.out.elements * element_bytes(batch.dtype));
  if (report.lse)
    std::fill_n(report.lse, batch.heads * all_rows, -std::numeric_limits<float>::infinity());
  if (report.dropped_mass_bound)
    std::fill_n(report.dropped_mass_bound, batch.heads * all_rows, 0.0f);
  if (report.tiles_visitable) std::fill_n(report.tiles_visitable, 2 * batch.batch * batch.heads, 0);
  if (report.gap_histogram) std::fill_n(report.gap_histogram, batch.heads * BLASST_GAP_BINS, 0);

  std::vector<float> lse, bound;
  std::vector<uint64_t> gaps;
  for (const Part& part : parts_of(batch, padding)) {
    Params p = call_of(batch, part);
    if (report.tiles_visitable) {
      p.report.tiles_visitable = report.tiles_visitable + part.request * p.heads;
      p.report.tiles_skipped = report.tiles_skipped + part.request * p.heads;
    }
    lse.resize(report.lse ? p.heads * part.rows : 0);
    bound.resize(report.dropped_mass_bound ? p.heads * part.rows : 0);
    gaps.resize(report.gap_histogram ? p.heads * BLASST_GAP_BINS : 0);
    if (report.lse) p.report.lse = lse.data();
    if (report.dropped_mass_bound) p.report.dropped_mass_bound = bound.data();
    if (report.gap_histogram) p.report.gap_histogram = gaps.data();
    if (report.tile_bits)
      p.report.tile_bits = report.tile_bits + part.request * (bits.size() / batch.batch);
    run(p);
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t to = head_row(batch, part, h);
      if (report.lse) std::copy_n(&lse[h * part.rows], part.rows, report.lse + to);
      if (report.dropped_mass_bound)
        std::copy_n(&bound[h * part.rows], part.rows, report.dropped_mass_bound + to);
    }
    if (report.gap_histogram) {
      for (size_t i = 0; i < gaps.size(); ++i) report.gap_histogram[i] += gaps[i];
    }
  }
}

// The part of the parameters that says what attends to what. The tensors are made fit to be read,
// in place, and must outlive the call.
template <typename Params>
void describe(Params& p, Tensor& q, KeysValuesArguments& keys, const OptionalTensor& starts,
              const OptionalTensor& query_lengths, OptionalTensor& cu_seqlens_q, double scale,
              double softcap, OptionalTensor& sinks, bool causal, int64_t window_left,
              int64_t window_right, OptionalTensor& bands, OptionalTensor& blocks) {
  const bool ragged = cu_seqlens_q.has_value();
  check(q.dim() == (ragged ? 3 : 4), "q is ", q, "; it must be ",
        ragged ? "[rows, heads, head_dim], since cu_seqlens_q is given"
               : "[batch, query_length, heads, head_dim]");
  for (const auto& [name, t] : {std::pair{"k", &keys.k}, std::pair{"v", &keys.v}})
    check(t->scalar_type() == q.scalar_type(), name, " is ", t->scalar_type(), ", but q is ",
          q.scalar_type(), "; they must be of one type");

  p.dtype = dtype_of(q);
  p.heads = q.size(q.dim() - 2);
  p.head_dim = q.size(q.dim() - 1);
  if constexpr (requires { p.cu_seqlens_q; }) {
    if (ragged) {
      check(cu_seqlens_q->dim() == 1 && cu_seqlens_q->size(0) > 0, "cu_seqlens_q is ",
            *cu_seqlens_q, "; it must be [batch + 1]");
      p.batch = cu_seqlens_q->size(0) - 1;
      p.cu_seqlens_q = indices("cu_seqlens_q", cu_seqlens_q, "[batch + 1]", {p.batch + 1});
      if (q.is_cuda()) {  // a request may have all the rows
        p.rows = p.query_length = q.size(0);
      } else {
        check(p.cu_seqlens_q[p.batch] == q.size(0), "cu_seqlens_q ends at ",
              p.cu_seqlens_q[p.batch], ", but q is ", q);
      }
    }
  } else {
    check(!ragged,
          "cu_seqlens_q is given, but decode takes q as [batch, query_length, heads, head_dim]");
  }
  if (!ragged) {
    p.batch = q.size(0);
    p.query_length = q.size(1);
  }
  check(
      !starts || (!keys.cu_seqlens && !keys.page_table),
      "starts is given; it needs k as [batch, keys, kv_heads, head_dim], without cu_seqlens_k and "
      "page_table");
  check(!query_lengths || !ragged,
        "query_lengths is given; it needs q as [batch, query_length, heads, head_dim], without "
        "cu_seqlens_q");
  p.kv = keys_values(keys, p.batch, p.head_dim);
  p.kv_heads = keys.k.size(keys.k.dim() - 2);
  p.value_dim = keys.v.size(keys.v.dim() - 1);

  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  if (sinks) {
    check_shape("sinks", *sinks, "[heads]", {p.heads});
    check(sinks->scalar_type() == ScalarType::Float, "sinks is ", sinks->scalar_type(),
          "; it must be float32");
    sinks = torch::stable::contiguous(*sinks);
    p.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }
  p.mask.causal = causal;
  p.mask.window_left = window_left;
  p.mask.window_right = window_right;
  set_policy(p, bands, blocks);
  if (!q.is_cuda()) p.threads = static_cast<int32_t>(torch::stable::get_num_threads());
  q = readable(q);
  p.q = view_of(q);
}

template <typename Params>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention(
    Tensor q, Tensor k, Tensor v, OptionalTensor starts, OptionalTensor lengths,
    OptionalTensor query_lengths, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    OptionalTensor page_table, double scale, double softcap, OptionalTensor sinks, bool causal,
    int64_t window_left, int64_t window_right, OptionalTensor bands, OptionalTensor blocks,
    std::string order, std::string test, OptionalTensor thresholds, bool want_lse, bool want_bound,
    bool want_tiles, bool want_gaps, bool want_maxima, bool want_bits) {
  const bool ragged = cu_seqlens_q.has_value();
  if constexpr (std::same_as<Params, blasst::DecodeParams>)
    check(!want_bits, "bits is true, but decode has no backward pass that would read them");
  Params p;
  KeysValuesArguments keys{k, v, lengths, cu_seqlens_k, page_table};
  describe(p, q, keys, starts, query_lengths, cu_seqlens_q, scale, softcap, sinks, causal,
           window_left, window_right, bands, blocks);
  p.order = order_of(order);
  p.test.kind = test_of(test);
  if (thresholds) {
    check(thresholds->dim() == 3 && (thresholds->size(0) == 1 || thresholds->size(0) == p.batch) &&
              (thresholds->size(1) == 1 || thresholds->size(1) == p.heads),
          "thresholds is ", *thresholds,
          "; it must be [1 or batch, 1 or heads, places] with batch ", p.batch, " and heads ",
          p.heads);
    check(thresholds->scalar_type() == ScalarType::Float, "thresholds is ",
          thresholds->scalar_type(), "; it must be float32");
    thresholds = torch::stable::contiguous(*thresholds);
    p.test.values = static_cast<const float*>(thresholds->const_data_ptr());
    p.test.places = thresholds->size(2);
    p.test.stride_place = 1;
    p.test.stride_head = thresholds->size(1) == 1 ? 0 : p.test.places;
    p.test.stride_request = thresholds->size(0) == 1 ? 0 : thresholds->size(1) * p.test.places;
  }
  const bool cuda = q.is_cuda();
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (cuda) {
    check(!want_bits, "bits is true, but there is no backward pass on a CUDA device");
    guard.emplace(q.get_device_index());
    p.backend = BLASST_BACKEND_CUDA_SM90;
    p.stream = current_stream(q.get_device_index());
  }

  std::vector<int64_t> out_shape(q.sizes().begin(), q.sizes().end());
  out_shape.back() = p.value_dim;
  Tensor out = torch::stable::new_empty(q, out_shape);
  p.out = view_of(out);

  // Outputs that are not asked for are empty.
  const auto output = [&q](bool wanted, std::vector<int64_t> shape, ScalarType type) {
    if (!wanted) shape = {0};
    return torch::stable::new_empty(q, shape, type);
  };
  const int64_t rows = ragged ? q.size(0) : p.batch * p.query_length;
  Tensor lse = output(want_lse, {p.heads, rows}, ScalarType::Float);
  Tensor bound = output(want_bound, {p.heads, rows}, ScalarType::Float);
  Tensor tiles = output(want_tiles, {2, p.batch, p.heads}, ScalarType::Long);
  Tensor gaps = output(want_gaps, {p.heads, BLASST_GAP_BINS}, ScalarType::Long);
  if (want_lse) p.report.lse = lse.mutable_data_ptr<float>();
  if (want_bound) p.report.dropped_mass_bound = bound.mutable_data_ptr<float>();
  if (want_tiles) {
    p.report.tiles_visitable = tiles.mutable_data_ptr<int64_t>();
    p.report.tiles_skipped = p.report.tiles_visitable + p.batch * p.heads;
  }
  Tensor bits = output(want_bits, {want_bits ? bits_of(p, rows).size() : 0}, ScalarType::Int);
  check(!want_maxima || !ragged,
        "maxima is true; it needs q as [batch, query_length, heads, head_dim], without "
        "cu_seqlens_q");
  const Maxima size = want_maxima ? maxima_of(p) : Maxima{};
  Tensor maxima =
      output(want_maxima, {size.heads, size.query_tiles, size.key_tiles}, ScalarType::Float);
  if (want_maxima) {
    p.report.tile_maxima = maxima.mutable_data_ptr<float>();
    p.report.tile_maxima_stride = size.key_tiles;
  }
  if (want_gaps) p.report.gap_histogram = static_cast<uint64_t*>(gaps.mutable_data_ptr());
  if (want_bits) {
    p.report.tile_bits = static_cast<uint32_t*>(bits.mutable_data_ptr());
    std::memset(p.report.tile_bits, 0, bits.numel() * 4);  // also what the call leaves unused
  }

  if (cuda) {
    p.kv.starts = indices("starts", starts, "[batch]", {p.batch});
    const int32_t* used = indices("query_lengths", query_lengths, "[batch]", {p.batch});
    if constexpr (requires { p.query_lengths; })
      p.query_lengths = used;
    else
      check(!used, "query_lengths is given; decode on a CUDA device has none");
    // Freed at the end of this call, and reused by torch only behind it on the stream.
    p.workspace_bytes = blasst::workspace_bytes(p);
    const Tensor workspace = torch::stable::new_empty(
        q, std::vector<int64_t>{static_cast<int64_t>(p.workspace_bytes)}, ScalarType::Byte);
    p.workspace = workspace.mutable_data_ptr();
    run(p);
    return {out, lse, bound, tiles, gaps, maxima, bits};
  }
  check_blocks(p, blocks);
  const Padding padding{
      .starts = indices("starts", starts, "[batch]", {p.batch}),
      .query_lengths = indices("query_lengths", query_lengths, "[batch]", {p.batch})};
  if (is_padded(p, padding)) {
    check(!blocks && !want_maxima, blocks ? "blocks is given" : "maxima is true",
          " together with starts or query_lengths, but it is of the tiles of the whole batch: pass "
          "the requests one by one, or ragged");
    run_padded(p, padding);
  } else {
    run(p);
  }
  return {out, lse, bound, tiles, gaps, maxima, bits};
}

blasst::BackwardParams backward_of(const blasst::PrefillParams& f) {
  blasst::BackwardParams b;
  b.backend = f.backend;
  b.dtype = f.dtype;
  b.batch = f.batch;
  b.heads = f.heads;
  b.kv_heads = f.kv_heads;
  b.head_dim = f.head_dim;
  b.value_dim = f.value_dim;
  b.query_length = f.query_length;
  b.cu_seqlens_q = f.cu_seqlens_q;
  b.q = f.q;
  b.kv = f.kv;
  b.out = f.out;
  b.scale = f.scale;
  b.softcap = f.softcap;
  b.sinks = f.sinks;
  b.mask = f.mask;
  b.threads = f.threads;
  return b;
}

// Request by request, as the forward. Rows and keys left out have no gradient.
void run_padded_backward(const blasst::PrefillParams& forward, const blasst::BackwardParams& batch,
                         const Padding& padding) {
  const Bits bits = bits_of(forward, forward.batch * forward.query_length);
  for (const blasst::View* gradient : {&batch.dq, &batch.dk, &batch.dv})
    std::memset(gradient->data, 0, gradient->elements * element_bytes(batch.dtype));
  if (batch.dsinks) std::fill_n(batch.dsinks, batch.heads, 0.0f);
  std::vector<float> lse, dlse, dsinks(batch.heads);
  for (const Part& part : parts_of(forward, padding)) {
    blasst::BackwardParams b = backward_of(call_of(forward, part));
    b.dout = rows_of(batch.dout, part, b.dtype);
    b.dq = rows_of(batch.dq, part, b.dtype);
    b.dk = keys_of(batch.dk, part, b.dtype);
    b.dv = keys_of(batch.dv, part, b.dtype);
    b.tile_bits = batch.tile_bits + part.request * (bits.size() / forward.batch);
    lse.clear(), dlse.clear();
    for (int64_t h = 0; h < b.heads; ++h) {
      const int64_t at = head_row(forward, part, h);
      lse.insert(lse.end(), batch.lse + at, batch.lse + at + part.rows);
      if (batch.dlse) dlse.insert(dlse.end(), batch.dlse + at, batch.dlse + at + part.rows);
    }
    b.lse = lse.data();
    if (batch.dlse) b.dlse = dlse.data();
    if (batch.dsinks) b.dsinks = dsinks.data();
    blasst::backward(b);
    for (int64_t h = 0; batch.dsinks && h < b.heads; ++h) batch.dsinks[h] += dsinks[h];
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prefill_backward(
    Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    Tensor bits, OptionalTensor starts, OptionalTensor lengths, OptionalTensor query_lengths,
    OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor page_table,
    double scale, double softcap, OptionalTensor sinks, bool causal, int64_t window_left,
    int64_t window_right, OptionalTensor bands, OptionalTensor blocks) {
  blasst::PrefillParams forward;
  KeysValuesArguments keys{k, v, lengths, cu_seqlens_k, page_table};
  describe(forward, q, keys, starts, query_lengths, cu_seqlens_q, scale, softcap, sinks, causal,
           window_left, window_right, bands, blocks);
  check(std::ranges::equal(dout.sizes(), out.sizes()), "dout is ", dout, ", but out is ", out);
  for (const auto& [name, t] : {std::pair{"out", &out}, std::pair{"dout", &dout}}) {
    check(t->dim() == q.dim(), name, " is ", *t, ", but q is ", q);
    check(t->scalar_type() == q.scalar_type(), name, " is ", t->scalar_type(), ", but q is ",
          q.scalar_type(), "; they must be of one type");
    *t = readable(*t);
  }
  forward.out = view_of(out);
  check_blocks(forward, blocks);
  const int64_t rows = cu_seqlens_q ? q.size(0) : forward.batch * forward.query_length;

  blasst::BackwardParams p = backward_of(forward);
  p.dout = view_of(dout);
  check_shape("lse", lse, "[heads, rows]", {p.heads, rows});
  lse = torch::stable::contiguous(lse);
  p.lse = lse.mutable_data_ptr<float>();
  if (dlse) {
    check_shape("dlse", *dlse, "[heads, rows]", {p.heads, rows});
    dlse = torch::stable::contiguous(*dlse);
    p.dlse = dlse->mutable_data_ptr<float>();
  }
  check_shape("bits", bits, "as prefill returned them", {bits_of(forward, rows).size()});
  p.tile_bits = static_cast<const uint32_t*>(bits.const_data_ptr());

  const auto like = [](const Tensor& t) {
    return torch::stable::new_empty(t, std::vector<int64_t>(t.sizes().begin(), t.sizes().end()));
  };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  Tensor dsinks =
      torch::stable::new_empty(q, std::vector<int64_t>{sinks ? p.heads : 0}, ScalarType::Float);
  p.dq = view_of(dq);
  p.dk = view_of(dk);
  p.dv = view_of(dv);
  if (sinks) p.dsinks = dsinks.mutable_data_ptr<float>();
  const Padding padding{
      .starts = indices("starts", starts, "[batch]", {p.batch}),
      .query_lengths = indices("query_lengths", query_lengths, "[batch]", {p.batch})};
  if (is_padded(forward, padding)) {
    check(!page_table, "query_lengths is given together with page_table, which has no backward");
    run_padded_backward(forward, p, padding);
  } else {
    blasst::backward(p);
  }
  return {dq, dk, dv, dsinks};
}

// Rows are [batch, query_length] or ragged; lse [heads, rows].
std::tuple<Tensor, Tensor> merge(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) {
  check(out_a.dim() == 3 || out_a.dim() == 4, "out_a is ", out_a,
        "; it must be [batch, query_length, heads, value_dim] or [rows, heads, value_dim]");
  check(std::ranges::equal(out_b.sizes(), out_a.sizes()), "out_b is ", out_b, ", but out_a is ",
        out_a);
  check(out_b.scalar_type() == out_a.scalar_type(), "out_b is ", out_b.scalar_type(),
        ", but out_a is ", out_a.scalar_type(), "; they must be of one type");
  blasst::MergeParams p;
  p.dtype = dtype_of(out_a);
  const bool ragged = out_a.dim() == 3;
  p.batch = ragged ? 1 : out_a.size(0);
  p.query_length = out_a.size(out_a.dim() - 3);
  p.heads = out_a.size(out_a.dim() - 2);
  p.value_dim = out_a.size(out_a.dim() - 1);
  for (const auto& [name, lse] : {std::pair{"lse_a", &lse_a}, std::pair{"lse_b", &lse_b}}) {
    check_shape(name, *lse, "[heads, rows]", {p.heads, p.batch * p.query_length});
    check(lse->scalar_type() == ScalarType::Float, name, " is ", lse->scalar_type(),
          "; it must be float32");
    *lse = torch::stable::contiguous(*lse);
  }
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (out_a.is_cuda()) {
    guard.emplace(out_a.get_device_index());
    p.backend = BLASST_BACKEND_CUDA_SM90;
    p.stream = current_stream(out_a.get_device_index());
  } else {
    p.threads = static_cast<int32_t>(torch::stable::get_num_threads());
  }
  out_a = readable(out_a);
  out_b = readable(out_b);
  const auto like = [](const Tensor& t) {
    return torch::stable::new_empty(t, std::vector<int64_t>(t.sizes().begin(), t.sizes().end()));
  };
  Tensor out = like(out_a), lse = like(lse_a);
  p.out_a = view_of(out_a);
  p.out_b = view_of(out_b);
  p.out = view_of(out);
  p.lse_a = static_cast<const float*>(lse_a.const_data_ptr());
  p.lse_b = static_cast<const float*>(lse_b.const_data_ptr());
  p.lse = lse.mutable_data_ptr<float>();
  blasst::merge(p);
  return {out, lse};
}

// What blasst_check_pages finds, int32 [4] on the device.
Tensor check_pages(Tensor page_table, Tensor lengths, int64_t page_size, int64_t pages) {
  check(page_table.dim() == 2, "page_table is ", page_table,
        "; it must be [batch, pages a request]");
  OptionalTensor table = page_table, ends = lengths;
  blasst::KeysValues kv;
  const int64_t batch = page_table.size(0);
  kv.page_table_stride = page_table.size(1);
  kv.page_table =
      indices("page_table", table, "[batch, pages a request]", {batch, kv.page_table_stride});
  kv.lengths = indices("lengths", ends, "[batch]", {batch});
  kv.page_size = page_size;
  kv.pages = pages;
  const int32_t device = page_table.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor found = torch::stable::new_empty(page_table, std::vector<int64_t>{4}, ScalarType::Int);
  blasst::check_pages(kv, batch, static_cast<int32_t*>(found.mutable_data_ptr()),
                      current_stream(device));
  return found;
}

// The tile that decisions are taken on: query rows, keys, tiles a split (0: one split).
template <typename Params>
std::vector<int64_t> tile_shape(Tensor q, Tensor k, Tensor v) {
  Params p;
  p.dtype = dtype_of(q);
  p.batch = q.size(0);
  p.query_length = q.size(1);
  p.heads = q.size(2);
  p.head_dim = q.size(3);
  KeysValuesArguments keys{k, v, {}, {}, {}};
  p.kv = keys_values(keys, p.batch, p.head_dim);
  p.kv_heads = k.size(2);
  p.value_dim = v.size(3);
  p.q = view_of(q);
  if (q.is_cuda()) p.backend = BLASST_BACKEND_CUDA_SM90;
  const Tensor out = torch::stable::new_empty(
      q, std::vector<int64_t>{p.batch, p.query_length, p.heads, p.value_dim});
  p.out = view_of(out);
  const blasst::TileShape shape = blasst::tile_shape(p);
  return {shape.query_rows, shape.keys, shape.split_tiles};
}

constexpr const char* kArguments =
    "(Tensor q, Tensor k, Tensor v, Tensor? starts, Tensor? lengths, Tensor? query_lengths,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? page_table, float scale, float softcap, "
    "Tensor? sinks, bool causal, int window_left,"
    " int window_right, Tensor? bands, Tensor? blocks, str order, str test, Tensor? thresholds,"
    " bool lse, bool dropped_mass_bound, bool tiles, bool gaps, bool maxima, bool bits) -> "
    "(Tensor out, Tensor lse, Tensor dropped_mass_bound, Tensor tiles, Tensor gaps, Tensor maxima,"
    " Tensor bits)";

}  // namespace

STABLE_TORCH_LIBRARY(blasst, m) {
  m.def((std::string("prefill") + kArguments).c_str());
  m.def((std::string("decode") + kArguments).c_str());
  m.def(
      "prefill_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out,"
      " Tensor lse, Tensor bits, Tensor? starts, Tensor? lengths, Tensor? query_lengths,"
      " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? page_table, float scale,"
      " float softcap, Tensor? sinks, bool causal, int window_left, int window_right, Tensor? "
      "bands, Tensor? blocks)"
      " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)");
  m.def(
      "merge(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)");
  m.def("check_pages(Tensor page_table, Tensor lengths, int page_size, int pages) -> Tensor");
  m.def("prefill_tile_shape(Tensor q, Tensor k, Tensor v) -> int[]");
  m.def("decode_tile_shape(Tensor q, Tensor k, Tensor v) -> int[]");
}

#define BLASST_IMPLEMENT(m)                                                   \
  m.impl("prefill", TORCH_BOX(attention<blasst::PrefillParams>));             \
  m.impl("decode", TORCH_BOX(attention<blasst::DecodeParams>));               \
  m.impl("merge", TORCH_BOX(merge));                                          \
  m.impl("prefill_tile_shape", TORCH_BOX(tile_shape<blasst::PrefillParams>)); \
  m.impl("decode_tile_shape", TORCH_BOX(tile_shape<blasst::DecodeParams>))

STABLE_TORCH_LIBRARY_IMPL(blasst, CPU, m) {
  BLASST_IMPLEMENT(m);
  m.impl("prefill_backward", TORCH_BOX(prefill_backward));
}
STABLE_TORCH_LIBRARY_IMPL(blasst, CUDA, m) {
  BLASST_IMPLEMENT(m);
  m.impl("check_pages", TORCH_BOX(check_pages));
}
