#include "problem.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <string_view>
#include <tuple>
#include <utility>

namespace blasst::binding {
namespace {

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

void check_tensors(const Arguments& a) {
  check_devices("q", a.q,
                {{"k", &a.k},
                 {"v", &a.v},
                 {"starts", pointer(a.starts)},
                 {"lengths", pointer(a.lengths)},
                 {"query_lengths", pointer(a.query_lengths)},
                 {"cu_seqlens_q", pointer(a.cu_seqlens_q)},
                 {"cu_seqlens_k", pointer(a.cu_seqlens_k)},
                 {"page_table", pointer(a.page_table)},
                 {"sinks", pointer(a.sinks)},
                 {"bands", pointer(a.bands)},
                 {"blocks", pointer(a.blocks)},
                 {"k_scale", pointer(a.k_scale)},
                 {"v_scale", pointer(a.v_scale)}});
  dtype_of("q", a.q);
  for (const auto& [name, t, scale] :
       {std::tuple{"k", &a.k, &a.k_scale}, std::tuple{"v", &a.v, &a.v_scale}}) {
    const bool in_8_bits =
        t->scalar_type() == ScalarType::Char || t->scalar_type() == ScalarType::Float8_e4m3fn;
    if (!in_8_bits && t->scalar_type() != a.q.scalar_type())
      raise("TypeError", name, " is ", t->scalar_type(), ", but q is ", a.q.scalar_type(),
            "; they must be of one type, or ", name, " int8 or float8_e4m3fn");
    check(in_8_bits || !*scale, name, "_scale is given, but ", name, " is ", t->scalar_type(),
          "; it goes with int8 and float8_e4m3fn");
  }
  check(!a.starts || (!a.cu_seqlens_k && !a.page_table),
        "starts is given; it needs k as [batch, keys, kv_heads, head_dim], without cu_seqlens_k "
        "and page_table");
  check(!a.query_lengths || !a.cu_seqlens_q,
        "query_lengths is given; it needs q as [batch, query_length, heads, head_dim], without "
        "cu_seqlens_q");
  check(!a.cu_seqlens_k || (!a.page_table && !a.lengths),
        "cu_seqlens_k is given together with page_table or lengths; they exclude each other");
  check(!a.max_seqlen_q || a.cu_seqlens_q, "max_seqlen_q is given without cu_seqlens_q");
  check(!a.max_seqlen_k || a.cu_seqlens_k || a.page_table,
        "max_seqlen_k is given without cu_seqlens_k or page_table");
  for (const auto& [name, most] :
       {std::pair{"max_seqlen_q", a.max_seqlen_q}, std::pair{"max_seqlen_k", a.max_seqlen_k}})
    check(!most || *most >= 0, name, " is ", most.value_or(0), "; it must be 0 or more");
}

// No request has more tokens than the caller says. CUDA's arrays are not read here.
void check_most(std::string_view name, int64_t most, std::string_view array, const int32_t* at,
                int64_t batch, bool cumulative) {
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = cumulative ? int64_t{at[b + 1]} - at[b] : at[b];
    check(length <= most, name, " is ", most, ", but request ", b, " has ", length, " tokens by ",
          array);
  }
}

void describe_queries(Problem& p, Arguments& a, Phase phase) {
  const bool ragged = a.cu_seqlens_q.has_value();
  check(a.q.dim() == (ragged ? 3 : 4), "q is ", a.q, "; it must be ",
        ragged ? "[rows, heads, head_dim], since cu_seqlens_q is given"
               : "[batch, query_length, heads, head_dim]");
  p.heads = a.q.size(a.q.dim() - 2);
  p.head_dim = a.q.size(a.q.dim() - 1);
  a.q = readable(a.q);
  p.q = view_of(a.q);
  if (!ragged) {
    p.batch = a.q.size(0);
    p.query_length = a.q.size(1);
    return;
  }
  check(a.cu_seqlens_q->dim() == 1 && a.cu_seqlens_q->size(0) > 0, "cu_seqlens_q is ",
        *a.cu_seqlens_q, "; it must be [batch + 1]");
  p.query_layout = BLASST_LAYOUT_RAGGED;
  p.batch = a.cu_seqlens_q->size(0) - 1;
  p.rows = a.q.size(0);
  // What decode decides on is of the most rows of a request, whatever the others of the batch have.
  p.query_length = a.max_seqlen_q.value_or(p.rows);
  if (phase == Phase::kPrefill) p.query_length = std::min(p.query_length, p.rows);
  p.cu_seqlens_q = indices("cu_seqlens_q", a.cu_seqlens_q, "[batch + 1]", {p.batch + 1});
  if (a.q.is_cuda()) return;
  check(p.cu_seqlens_q[p.batch] == p.rows, "cu_seqlens_q ends at ", p.cu_seqlens_q[p.batch],
        ", but q is ", a.q);
  if (a.max_seqlen_q) {
    check_most("max_seqlen_q", *a.max_seqlen_q, "cu_seqlens_q", p.cu_seqlens_q, p.batch, true);
    return;
  }
  p.query_length = phase == Phase::kDecode ? 1 : 0;
  for (int64_t b = 0; b < p.batch; ++b)
    p.query_length = std::max(p.query_length, int64_t{p.cu_seqlens_q[b + 1]} - p.cu_seqlens_q[b]);
}

void describe_pages(Problem& p, Arguments& a) {
  check(a.page_table->dim() == 2, "page_table is ", *a.page_table,
        "; it must be [batch, pages a request]");
  check(p.kv.lengths != nullptr,
        "page_table is given without lengths; pages need the length of each request");
  p.kv.layout = BLASST_LAYOUT_PAGED;
  p.kv.page_table_stride = a.page_table->size(1);
  p.kv.page_table = indices("page_table", a.page_table, "[batch, pages a request]",
                            {p.batch, p.kv.page_table_stride});
  p.kv.page_size = a.k.size(1);
  p.kv.pages = a.k.size(0);
  if (!a.max_seqlen_k) return;
  p.kv.key_length =
      std::min(std::max<int64_t>(1, *a.max_seqlen_k), p.kv.page_table_stride * p.kv.page_size);
  if (!a.k.is_cuda())
    check_most("max_seqlen_k", *a.max_seqlen_k, "lengths", p.kv.lengths, p.batch, false);
}

void describe_ragged_keys(Problem& p, Arguments& a) {
  p.kv.layout = BLASST_LAYOUT_RAGGED;
  p.kv.tokens = a.k.size(0);
  // 0 would be none that is said.
  p.kv.key_length =
      std::min(std::max<int64_t>(1, a.max_seqlen_k.value_or(p.kv.tokens)), p.kv.tokens);
  if (a.k.is_cuda()) return;
  const int32_t* ends = p.kv.cu_seqlens;
  check(ends[p.batch] == p.kv.tokens, "cu_seqlens_k ends at ", ends[p.batch], ", but k is ", a.k);
  if (a.max_seqlen_k)
    check_most("max_seqlen_k", *a.max_seqlen_k, "cu_seqlens_k", ends, p.batch, true);
}

void describe_keys(Problem& p, Arguments& a) {
  const int64_t dims = a.cu_seqlens_k ? 3 : 4;
  check(a.k.dim() == dims, "k is ", a.k, "; it must be ",
        a.cu_seqlens_k ? "[total keys, kv_heads, head_dim], since cu_seqlens_k is given"
        : a.page_table ? "[pages, page_size, kv_heads, head_dim], since page_table is given"
                       : "[batch, keys, kv_heads, head_dim]");
  check(a.k.size(dims - 1) == p.head_dim, "k is ", a.k, ", but q has head_dim ", p.head_dim);
  check(a.v.dim() == dims, "v is ", a.v, ", but k is ", a.k);
  for (int64_t i = 0; i + 1 < dims; ++i)
    check(a.v.size(i) == a.k.size(i), "v is ", a.v, ", but k is ", a.k);
  p.kv_heads = a.k.size(dims - 2);
  p.value_dim = a.v.size(dims - 1);

  a.k = readable(a.k);
  a.v = readable(a.v);
  p.kv.k = view_of(a.k);
  p.kv.v = view_of(a.v);
  p.kv.lengths = indices("lengths", a.lengths, "[batch]", {p.batch});
  p.kv.cu_seqlens = indices("cu_seqlens_k", a.cu_seqlens_k, "[batch + 1]", {p.batch + 1});
  if (a.cu_seqlens_k) {
    describe_ragged_keys(p, a);
  } else if (a.page_table) {
    describe_pages(p, a);
  } else {
    check(a.k.size(0) == p.batch, "k is ", a.k, ", but q has batch ", p.batch);
    p.kv.key_length = a.k.size(1);
  }
}

// The band of each head and the block mask, made fit to be read in place.
void describe_mask(Problem& p, Arguments& a) {
  p.mask.causal = a.causal;
  p.mask.window_left = a.window_left;
  p.mask.window_right = a.window_right;
  if (a.bands) {
    check_shape("bands", *a.bands, "[heads, 2]", {p.heads, 2});
    check_type("bands", *a.bands, ScalarType::Long);
    a.bands = torch::stable::contiguous(*a.bands);
    p.mask.bands = static_cast<const int64_t*>(a.bands->const_data_ptr());
  }
  if (!a.blocks) return;
  check_type("blocks", *a.blocks, ScalarType::Byte);
  check(a.blocks->dim() == 3, "blocks is ", *a.blocks,
        "; it must be [heads, query tiles, key tiles], in decode [kv_heads, batch, key tiles]");
  a.blocks = torch::stable::contiguous(*a.blocks);
  p.mask.blocks = static_cast<const uint8_t*>(a.blocks->const_data_ptr());
  p.mask.blocks_stride_query_tile = a.blocks->size(2);
  p.mask.blocks_stride_head = a.blocks->size(1) * a.blocks->size(2);
}

// [1 or batch, 1 or kv_heads].
Scales scales_of(std::string_view name, OptionalTensor& t, const Problem& p) {
  if (!t) return {};
  check(t->dim() == 2 && (t->size(0) == 1 || t->size(0) == p.batch) &&
            (t->size(1) == 1 || t->size(1) == p.kv_heads),
        name, " is ", *t, "; it must be [1 or batch, 1 or kv_heads] with batch ", p.batch,
        " and kv_heads ", p.kv_heads);
  const int64_t requests = t->size(0), heads = t->size(1);
  return {.values = floats(name, t, "[requests, kv_heads]", shape_of(*t)),
          .stride_request = requests == 1 ? 0 : heads,
          .stride_head = heads == 1 ? 0 : 1};
}

// Where nothing is padding, the batch is not padded. CUDA's arrays are not read here.
void describe_padding(Problem& p, Arguments& a) {
  p.kv.starts = indices("starts", a.starts, "[batch]", {p.batch});
  p.query_lengths = indices("query_lengths", a.query_lengths, "[batch]", {p.batch});
  if (a.q.is_cuda()) return;
  const auto all = [&](const int32_t* array, int64_t value) {
    return std::all_of(array, array + p.batch, [&](int32_t x) { return x == value; });
  };
  if (p.kv.starts && all(p.kv.starts, 0)) p.kv.starts = nullptr;
  if (p.query_lengths && all(p.query_lengths, p.query_length)) p.query_lengths = nullptr;
  check(
      !a.blocks || (!p.kv.starts && !p.query_lengths),
      "blocks is given together with starts or query_lengths, but it is of the tiles of the whole "
      "batch: pass the requests one by one, or ragged");
}

}  // namespace

Place::Place(const Tensor& first) {
  if (!first.is_cuda()) {
    execution_.backend = BLASST_BACKEND_CPU;
    execution_.threads = static_cast<int32_t>(torch::stable::get_num_threads());
    return;
  }
  guard_.emplace(first.get_device_index());
  execution_.backend = BLASST_BACKEND_CUDA;
  execution_.stream = current_stream(first.get_device_index());
}

Problem describe(Arguments& a, Phase phase) {
  check_tensors(a);
  dtype_of("q", a.q);
  Problem p;
  describe_queries(p, a, phase);
  describe_keys(p, a);
  describe_padding(p, a);
  p.scale = static_cast<float>(a.scale);
  p.softcap = static_cast<float>(a.softcap);
  p.sinks = floats("sinks", a.sinks, "[heads]", {p.heads});
  describe_mask(p, a);
  p.k_scales = scales_of("k_scale", a.k_scale, p);
  p.v_scales = scales_of("v_scale", a.v_scale, p);
  p.out.dtype = p.q.dtype;
  return p;
}

Plan plan(const AttentionParams& p, Phase phase) {
  return phase == Phase::kDecode ? decode_plan(p) : prefill_plan(p);
}

void check_blocks(const AttentionParams& params, Phase phase, const OptionalTensor& blocks) {
  if (!blocks || blocks->is_cuda()) return;
  // The tiles of the rows and keys in use: a cache may have room for more, and so has a plan of
  // ragged queries.
  AttentionParams used = params;
  Problem& p = used.problem;
  p.mask.blocks = nullptr;
  p.kv.key_length = 0;
  int64_t ragged_tiles = 0;
  const Plan room = plan(params, phase);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t keys = p.kv.cu_seqlens ? int64_t{p.kv.cu_seqlens[b + 1]} - p.kv.cu_seqlens[b]
                         : p.kv.lengths  ? int64_t{p.kv.lengths[b]}
                                         : params.problem.kv.key_length;
    p.kv.key_length = std::max(p.kv.key_length, keys);
    if (p.cu_seqlens_q)
      ragged_tiles += (p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b] + room.shape.query_rows - 1) /
                      room.shape.query_rows;
  }
  const bool by_rows = p.cu_seqlens_q && phase == Phase::kPrefill;
  const int64_t query_tiles = by_rows ? ragged_tiles : room.query_tiles;
  const int64_t key_tiles = plan(used, phase).key_tiles;
  check(blocks->size(0) == room.tile_heads && blocks->size(1) == query_tiles &&
            blocks->size(2) >= key_tiles,
        "blocks is ", *blocks, "; for tiles of ", room.shape.query_rows, " rows and ",
        room.shape.keys, " keys it must be [", room.tile_heads, ", ", query_tiles, ", at least ",
        key_tiles, "]");
}

}  // namespace blasst::binding
