// Bad input: an error that says what was passed and what is accepted, and nothing written.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "testing/problem.h"

namespace blasst::check {
namespace {

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();

// Ragged queries over paged keys; every optional array is set.
Case everything_set() {
  return {.requests = {{70, 100}, {3, 40}},
          .heads = 4,
          .kv_heads = 2,
          .head_dim = 32,
          .value_dim = 16,
          .layout = Layout::kPaged,
          .ragged_queries = true,
          .sinks = true,
          .bands = true,
          .blocks = true,
          .test = BLASST_TEST_RELATIVE,
          .threshold = 0.5f,
          .per_request = true,
          .per_head = true};
}

Case dense() {
  return {.requests = {{70, 100}, {70, 40}},
          .heads = 4,
          .kv_heads = 2,
          .head_dim = 32,
          .value_dim = 16};
}

Case ragged() {
  Case c = everything_set();
  c.layout = Layout::kRagged;
  return c;
}

Case in_8_bits() {
  Case c = dense();
  c.k_dtype = BLASST_INT8, c.v_dtype = BLASST_FLOAT8_E4M3;
  c.scales_per_request = c.scales_per_head = true;
  return c;
}

Case decode() {
  Case c = dense();
  c.decode = true;
  c.requests = {{2, 100}, {2, 40}};
  return c;
}

struct Bad {
  const char* name;
  Case start;
  std::function<void(Problem&)> spoil;
  std::vector<std::string>
      message;  // parts it must contain: the name, what was passed, what is accepted
  blasst_status status = BLASST_INVALID_ARGUMENT;
};

void PrintTo(const Bad& bad, std::ostream* os) { *os << bad.name; }

std::vector<Bad> bad_inputs() {
  const Case all = everything_set();
  return {
      // Null pointers.
      {"NullQ", all, [](Problem& p) { p.params.problem.q.data = nullptr; }, {"q", "null"}},
      {"NullK", all, [](Problem& p) { p.params.problem.kv.k.data = nullptr; }, {"k", "null"}},
      {"NullV", all, [](Problem& p) { p.params.problem.kv.v.data = nullptr; }, {"v", "null"}},
      {"NullOut", all, [](Problem& p) { p.params.problem.out.data = nullptr; }, {"out", "null"}},
      {"NullThresholds",
       all,
       [](Problem& p) { p.params.decision.test.values = nullptr; },
       {"test.values", "null"}},
      {"NullPagedLengths",
       all,
       [](Problem& p) { p.params.problem.kv.lengths = nullptr; },
       {"kv.lengths", "null"}},

      {"NullCuQueries",
       all,
       [](Problem& p) { p.params.problem.cu_seqlens_q = nullptr; },
       {"cu_seqlens_q is null"}},
      {"NullCuKeys",
       ragged(),
       [](Problem& p) { p.params.problem.kv.cu_seqlens = nullptr; },
       {"kv.cu_seqlens is null"}},
      {"NullPageTable",
       all,
       [](Problem& p) { p.params.problem.kv.page_table = nullptr; },
       {"kv.page_table is null"}},

      // Caches in 8 bits.
      {"QueryIn8Bits",
       dense(),
       [](Problem& p) { p.params.problem.q.dtype = BLASST_INT8; },
       {"q.dtype is 3", "bfloat16 (2)"}},
      {"OutIn8Bits",
       dense(),
       [](Problem& p) { p.params.problem.out.dtype = BLASST_FLOAT8_E4M3; },
       {"out.dtype is 4", "bfloat16 (2)"}},
      {"KeysOfAnotherType",
       dense(),
       [](Problem& p) { p.params.problem.kv.k.dtype = BLASST_BFLOAT16; },
       {"q is float32 and k bfloat16", "int8 and float8_e4m3"},
       BLASST_UNSUPPORTED},
      {"ScalesOfKeysIn32Bits",
       dense(),
       [](Problem& p) { p.params.problem.k_scales.values = p.params.report.lse; },
       {"k_scales.values is set, but k is float32", "int8"}},
      {"ScalesOfValuesIn32Bits",
       dense(),
       [](Problem& p) { p.params.problem.v_scales.values = p.params.report.lse; },
       {"v_scales.values is set, but v is float32", "float8_e4m3"}},
      {"ScaleOfZero",
       in_8_bits(),
       [](Problem& p) { p.k_scales[1] = 0; },
       {"k_scales of request 0, KV head 1 is 0", "positive and finite"}},
      {"ScaleBelowZero",
       in_8_bits(),
       [](Problem& p) { p.v_scales[2] = -0.5f; },
       {"v_scales of request 1, KV head 0 is -0.5", "positive and finite"}},
      {"ScaleOfNaN",
       in_8_bits(),
       [](Problem& p) { p.v_scales[3] = std::nanf(""); },
       {"v_scales of request 1, KV head 1 is nan", "positive and finite"}},
      {"InfiniteScale",
       in_8_bits(),
       [](Problem& p) { p.k_scales[0] = kInf; },
       {"k_scales of request 0, KV head 0 is inf", "positive and finite"}},
      {"ScaleThatVanishesInTheProblems",
       in_8_bits(),
       [](Problem& p) { p.k_scales[0] = 1e-40f, p.params.problem.scale = 1e-10f; },
       {"scale 1e-10 times k_scales of request 0, KV head 0 is 0"}},
      {"ScaleStrideRequest",
       in_8_bits(),
       [](Problem& p) { p.params.problem.k_scales.stride_request = -1; },
       {"k_scales.stride_request is -1", "0 to"}},
      {"ScaleStrideHead",
       in_8_bits(),
       [](Problem& p) { p.params.problem.v_scales.stride_head = kHuge; },
       {"v_scales.stride_head is", "0 to"}},

      // Layouts.
      {"QueryLayout",
       all,
       [](Problem& p) { p.params.problem.query_layout = BLASST_LAYOUT_PAGED; },
       {"query_layout is 2", "dense (0) or ragged (1)"}},
      {"KeyLayout",
       all,
       [](Problem& p) { p.params.problem.kv.layout = static_cast<blasst_layout>(3); },
       {"kv.layout is 3", "paged (2)"}},
      {"CuQueriesOfDense",
       dense(),
       [](Problem& p) { p.params.problem.cu_seqlens_q = p.lengths.data(); },
       {"cu_seqlens_q is set", "query_layout ragged"}},
      {"CuKeysOfDense",
       dense(),
       [](Problem& p) { p.params.problem.kv.cu_seqlens = p.lengths.data(); },
       {"kv.cu_seqlens is set", "kv.layout ragged"}},
      {"PageSizeOfDense",
       dense(),
       [](Problem& p) { p.params.problem.kv.page_size = 16; },
       {"kv.page_size is set", "kv.layout paged"}},
      {"TokensOfPages",
       all,
       [](Problem& p) { p.params.problem.kv.tokens = 16; },
       {"kv.tokens is set", "kv.layout ragged"}},
      {"RowsOfDense",
       dense(),
       [](Problem& p) { p.params.problem.rows = 140; },
       {"rows is set", "query_layout ragged"}},
      {"RowsDisagree",
       all,
       [](Problem& p) { p.params.problem.rows = 72; },
       {"cu_seqlens_q ends at", "rows is 72"}},

      // Padding.
      {"StartsBeyondTheKeys",
       dense(),
       [](Problem& p) { p.params.problem.kv.starts = p.lengths.data(), p.lengths[1] = 101; },
       {"kv.lengths[1] is 101"}},
      {"StartsNegative",
       dense(),
       [](Problem& p) {
         static const int32_t starts[] = {0, -1};
         p.params.problem.kv.starts = starts;
       },
       {"kv.starts[1] is -1", "0 to 40"}},
      {"StartsOfPages",
       all,
       [](Problem& p) { p.params.problem.kv.starts = p.lengths.data(); },
       {"kv.starts is set", "dense"}},
      {"QueryLengthsBeyondTheRows",
       dense(),
       [](Problem& p) { p.params.problem.query_lengths = p.lengths.data(); },
       {"query_lengths[0] is 100", "0 to"}},
      {"QueryLengthsOfRagged",
       all,
       [](Problem& p) { p.params.problem.query_lengths = p.lengths.data(); },
       {"query_lengths is set", "query_layout dense"}},

      // Sizes.
      {"NegativeBatch", all, [](Problem& p) { p.params.problem.batch = -1; }, {"batch", "-1"}},
      {"HugeBatch",
       all,
       [](Problem& p) { p.params.problem.batch = kHuge; },
       {"batch", std::to_string(kHuge)}},
      {"ZeroHeads", all, [](Problem& p) { p.params.problem.heads = 0; }, {"heads is 0"}},
      {"NegativeHeads", all, [](Problem& p) { p.params.problem.heads = -4; }, {"heads is -4"}},
      {"HugeHeads",
       all,
       [](Problem& p) { p.params.problem.heads = kHuge; },
       {"heads", std::to_string(kHuge)}},
      {"ZeroKvHeads", all, [](Problem& p) { p.params.problem.kv_heads = 0; }, {"kv_heads is 0"}},
      {"HeadsNoMultiple",
       all,
       [](Problem& p) { p.params.problem.kv_heads = 3; },
       {"heads is 4", "kv_heads is 3", "multiple"}},
      {"HeadDimOdd",
       all,
       [](Problem& p) { p.params.problem.head_dim = 20; },
       {"head_dim is 20", "multiple of 8", "16 to 576"}},
      {"HeadDimSmall",
       all,
       [](Problem& p) { p.params.problem.head_dim = 8; },
       {"head_dim is 8", "16 to 576"}},
      {"HeadDimLarge",
       all,
       [](Problem& p) { p.params.problem.head_dim = 584; },
       {"head_dim is 584", "16 to 576"}},
      {"ValueDim",
       all,
       [](Problem& p) { p.params.problem.value_dim = 0; },
       {"value_dim is 0", "16 to 576"}},
      {"NegativeQueryLength",
       dense(),
       [](Problem& p) { p.params.problem.query_length = -5; },
       {"query_length is -5"}},
      {"HugeQueryLength",
       dense(),
       [](Problem& p) { p.params.problem.query_length = kHuge; },
       {"query_length", std::to_string(kHuge)}},
      {"LongQueries",
       dense(),
       [](Problem& p) { p.params.problem.query_length = 1 << 29; },
       {"q", std::to_string(1 << 29)}},
      {"NegativeKeyLength",
       dense(),
       [](Problem& p) { p.params.problem.kv.key_length = -1; },
       {"kv.key_length is -1"}},
      {"HugeKeyLength",
       dense(),
       [](Problem& p) { p.params.problem.kv.key_length = kHuge; },
       {"kv.key_length", std::to_string(kHuge)}},
      {"LongKeys",
       dense(),
       [](Problem& p) { p.params.problem.kv.key_length = 1 << 30; },
       {"k", "elements"}},
      {"DecodeNoQuery",
       decode(),
       [](Problem& p) { p.params.problem.query_length = 0; },
       {"query_length is 0", "1 to 16"}},
      {"DecodeManyQueries",
       decode(),
       [](Problem& p) { p.params.problem.query_length = 17; },
       {"query_length is 17", "1 to 16"}},

      // Types and options.
      {"Backend",
       all,
       [](Problem& p) { p.params.execution.backend = BLASST_BACKEND_CUDA; },  // and float32
       {},
       BLASST_UNSUPPORTED},
      {"BackendUnknown",
       all,
       [](Problem& p) { p.params.execution.backend = static_cast<Backend>(77); },
       {"backend is 77", "cpu (1)"}},
      {"DType",
       all,
       [](Problem& p) { p.params.problem.q.dtype = static_cast<DType>(9); },
       {"q.dtype is 9", "float32"}},
      {"DTypeOfKeys",
       all,
       [](Problem& p) { p.params.problem.kv.k.dtype = static_cast<DType>(5); },
       {"k.dtype is 5", "float32", "float8_e4m3 (4)"}},
      {"MixedDTypes",
       all,
       [](Problem& p) {  // a smaller type: the buffer is large enough
         p.params.problem.kv.v.dtype = BLASST_BFLOAT16;
       },
       {"cpu", "q is float32", "v bfloat16"},
       BLASST_UNSUPPORTED},
      {"TileKeys",
       all,
       [](Problem& p) { p.params.decision.tile_keys = 128; },
       {"cpu", "tile_keys 128", "64 keys"},
       BLASST_UNSUPPORTED},
      {"Stream",
       all,
       [](Problem& p) { p.params.execution.stream = &p; },
       {"cpu", "stream is set"},
       BLASST_UNSUPPORTED},
      {"Scores",
       all,
       [](Problem& p) { p.params.decision.scores = static_cast<Scores>(2); },
       {"scores is 2", "exact (0) or int8 (1)"}},
      {"ScoresOfDecode",
       decode(),
       [](Problem& p) { p.params.decision.scores = BLASST_SCORES_INT8; },
       {"cpu", "scores is int8 (1)", "decode has exact scores (0)"},
       BLASST_UNSUPPORTED},
      {"Order",
       all,
       [](Problem& p) { p.params.decision.order = static_cast<Order>(3); },
       {"order is 3", "sink_first"}},
      {"Test",
       all,
       [](Problem& p) { p.params.decision.test.kind = static_cast<TestKind>(4); },
       {"test.kind is 4"}},
      {"ThresholdIgnored",
       all,
       [](Problem& p) { p.params.decision.test.kind = BLASST_TEST_NONE; },
       {"test.values", "BLASST_TEST_NONE"}},
      {"Scale", all, [](Problem& p) { p.params.problem.scale = -1; }, {"scale is -1"}},
      {"ScaleNan", all, [](Problem& p) { p.params.problem.scale = NAN; }, {"scale is nan"}},
      {"ScaleInf", all, [](Problem& p) { p.params.problem.scale = kInf; }, {"scale is inf"}},
      {"Softcap", all, [](Problem& p) { p.params.problem.softcap = -2; }, {"softcap is -2"}},
      {"SoftcapNan", all, [](Problem& p) { p.params.problem.softcap = NAN; }, {"softcap is nan"}},
      {"SinkNan", all, [](Problem& p) { p.sinks[2] = NAN; }, {"sinks[2] is nan"}},
      {"SinkInf", all, [](Problem& p) { p.sinks[2] = kInf; }, {"sinks[2] is inf"}},
      {"Threads", all, [](Problem& p) { p.params.execution.threads = -1; }, {"threads is -1"}},

      // Strides.
      {"NegativeStride",
       all,
       [](Problem& p) { p.params.problem.q.stride_token = -32; },
       {"q.stride_token is -32"}},
      {"HugeStride",
       all,
       [](Problem& p) { p.params.problem.kv.k.stride_head = kHuge; },
       {"k.stride_head", std::to_string(kHuge)}},
      {"QueryOverrun",
       all,
       [](Problem& p) { p.params.problem.q.stride_token += 8; },
       {"q reaches element", "q.elements is"}},
      {"KeyOverrun",
       all,
       [](Problem& p) { p.params.problem.kv.k.elements -= 1; },
       {"k reaches element", "k.elements is"}},
      {"ValueOverrun",
       all,
       [](Problem& p) { p.params.problem.kv.v.stride_request *= 2; },
       {"v reaches element", "v.elements is"}},
      {"OutOverrun",
       all,
       [](Problem& p) { p.params.problem.out.elements /= 2; },
       {"out reaches element", "out.elements is"}},
      {"NegativeElements",
       all,
       [](Problem& p) { p.params.problem.q.elements = -1; },
       {"q.elements is -1"}},
      {"OutHeadsOverlap",
       all,
       [](Problem& p) { p.params.problem.out.stride_head = 8; },
       {"out.stride_head is 8", "at least 16"}},
      {"OutTokensOverlap",
       all,
       [](Problem& p) { p.params.problem.out.stride_token = 0; },
       {"out.stride_token is 0"}},
      {"OutRequestsOverlap",
       dense(),
       [](Problem& p) { p.params.problem.out.stride_request = 64; },
       {"out.stride_", "overlap"}},
      {"OutIsQ",
       all,
       [](Problem& p) { p.params.problem.out = p.params.problem.q; },
       {"out and q share memory"}},
      {"OutIsV",
       dense(),
       [](Problem& p) {
         p.params.problem.out = p.params.problem.kv.v;
         p.params.problem.out.elements = p.params.problem.kv.v.elements;
         p.params.problem.query_length = 1;
       },
       {"out and v share memory"}},
      {"Misaligned",
       all,
       [](Problem& p) {
         p.params.problem.kv.k.data = static_cast<char*>(p.params.problem.kv.k.data) + 1;
         p.params.problem.kv.k.elements -= 1;
       },
       {"k", "align"}},

      // Index arrays.
      {"CuQueriesStart",
       all,
       [](Problem& p) { p.cu_queries[0] = 1; },
       {"cu_seqlens_q[0] is 1", "must be 0"}},
      {"CuQueriesFall",
       all,
       [](Problem& p) { p.cu_queries[1] = 80; },
       {"cu_seqlens_q[2] is 73", "80"}},
      {"CuQueriesLong",
       all,
       [](Problem& p) { p.cu_queries[2] = 1 << 30; },
       {"cu_seqlens_q ends at 1073741824", "rows is"}},
      {"CuQueriesUneven",
       all,
       [](Problem& p) { p.cu_queries[1] = 1; },
       {"cu_seqlens_q gives request 1 72", "query_length allows 70"}},
      {"CuKeysStart", ragged(), [](Problem& p) { p.cu_keys[0] = -1; }, {"kv.cu_seqlens[0] is -1"}},
      {"CuKeysFall",
       ragged(),
       [](Problem& p) { p.cu_keys[1] = 141; },
       {"kv.cu_seqlens[2] is 140", "141"}},
      {"CuKeysLong",
       ragged(),
       [](Problem& p) { p.cu_keys[2] = 141; },
       {"kv.cu_seqlens ends at 141", "kv.tokens is 140"}},
      {"TwoLayouts",
       ragged(),
       [](Problem& p) { p.params.problem.kv.lengths = p.lengths.data(); },
       {"kv.lengths is set", "kv.layout dense (0) or paged (2)"}},
      {"LengthNegative", all, [](Problem& p) { p.lengths[1] = -1; }, {"kv.lengths[1] is -1"}},
      {"LengthBeyondThePages",
       all,
       [](Problem& p) { p.lengths[1] = 1000; },
       {"kv.lengths[1] is 1000", "128"}},
      {"LengthBeyondTheCache",
       dense(),
       [](Problem& p) { p.lengths[0] = 101; },
       {"kv.lengths[0] is 101", "100"}},
      {"PageNegative",
       all,
       [](Problem& p) { p.page_table[1] = -1; },
       {"kv.page_table[0, 1] is -1", "kv.pages"}},
      {"PageBeyond",
       all,
       [](Problem& p) { p.page_table[1] = static_cast<int32_t>(p.params.problem.kv.pages); },
       {"kv.page_table[0, 1]", "kv.pages"}},
      {"PageSizeZero",
       all,
       [](Problem& p) { p.params.problem.kv.page_size = 0; },
       {"kv.page_size is 0", "1 to 256"}},
      {"PageSizeLarge",
       all,
       [](Problem& p) { p.params.problem.kv.page_size = 257; },
       {"kv.page_size is 257", "1 to 256"}},
      {"PageTableStride",
       all,
       [](Problem& p) { p.params.problem.kv.page_table_stride = -3; },
       {"kv.page_table_stride is -3"}},
      {"PagesBeyondTheBuffer",
       all,
       [](Problem& p) { p.params.problem.kv.pages += 1; },
       {"k reaches"}},

      // Masks.
      {"Causal", all, [](Problem& p) { p.params.problem.mask.causal = 2; }, {"mask.causal is 2"}},
      {"WindowLeft",
       all,
       [](Problem& p) { p.params.problem.mask.window_left = -2; },
       {"mask.window_left is -2"}},
      {"WindowRight",
       all,
       [](Problem& p) { p.params.problem.mask.window_right = kHuge; },
       {"mask.window_right", std::to_string(kHuge)}},
      {"BandBackwards",
       all,
       [](Problem& p) { p.bands[2] = 5, p.bands[3] = 4; },
       {"mask.bands", "5", "4"}},
      {"BlocksStrideTile",
       all,
       [](Problem& p) { p.params.problem.mask.blocks_stride_query_tile = 1; },
       {"mask.blocks_stride_query_tile is 1"}},
      {"BlockMaskTileStrideOverflow",
       all,
       [](Problem& p) { p.params.problem.mask.blocks_stride_query_tile = int64_t{1} << 47; },
       {"mask.blocks_stride_query_tile is 140737488355328"}},
      {"BlockMaskHeadStrideOverflow",
       all,
       [](Problem& p) { p.params.problem.mask.blocks_stride_head = int64_t{1} << 47; },
       {"mask.blocks_stride_head is 140737488355328"}},
      {"TileMaximaStrideOverflow",
       all,
       [](Problem& p) { p.params.report.tile_maxima_stride = int64_t{1} << 47; },
       {"report.tile_maxima_stride is 140737488355328"}},
      {"ThresholdStrideOverflow",
       all,
       [](Problem& p) { p.params.decision.test.stride_head = int64_t{1} << 47; },
       {"test.stride_head is 140737488355328"}},
      {"BlocksStrideHead",
       all,
       [](Problem& p) { p.params.problem.mask.blocks_stride_head = 2; },
       {"mask.blocks_stride_head is 2"}},

      // Thresholds.
      {"ThresholdNegative",
       all,
       [](Problem& p) { p.thresholds[5] = -0.1f; },
       {"threshold of request 1, head 1 is -0.1", "0 to 1"}},
      {"ThresholdAboveOne",
       all,
       [](Problem& p) { p.thresholds[5] = 1.5f; },
       {"request 1, head 1 is 1.5", "0 to 1"}},
      {"ThresholdNan",
       all,
       [](Problem& p) { p.thresholds[0] = NAN; },
       {"request 0, head 0 is nan", "0 to 1"}},
      {"ScaleFactorNegative",
       all,
       [](Problem& p) {
         p.params.decision.test.kind = BLASST_TEST_SCALE_FACTOR;
         p.thresholds[0] = -1;
       },
       {"scale factor", "is -1"}},
      {"ScaleFactorInf",
       all,
       [](Problem& p) {
         p.params.decision.test.kind = BLASST_TEST_SCALE_FACTOR;
         p.thresholds[0] = kInf;
       },
       {"scale factor", "is inf"}},
      {"AbsoluteNan",
       all,
       [](Problem& p) {
         p.params.decision.test.kind = BLASST_TEST_ABSOLUTE;
         p.thresholds[0] = NAN;
       },
       {"absolute threshold", "is nan"}},
      {"ThresholdStride",
       all,
       [](Problem& p) { p.params.decision.test.stride_head = -1; },
       {"test.stride_head is -1"}},
      {"ThresholdPlaces",
       all,
       [](Problem& p) { p.params.decision.test.places = 0; },
       {"test.places is 0", "1 to"}},
      {"ThresholdStridePlace",
       all,
       [](Problem& p) { p.params.decision.test.stride_place = kHuge; },
       {"test.stride_place is"}},
      {"ThresholdOfAPlace",
       all,
       [](Problem& p) {
         p.params.decision.test.stride_request = 0, p.params.decision.test.stride_head = 0;
         p.params.decision.test.stride_place = 1, p.params.decision.test.places = 3;
         p.thresholds[2] = 2;
       },
       {"request 0, head 0, place 2 is 2", "0 to 1"}},
      {"TileMaximaStride",
       all,
       [](Problem& p) { p.params.report.tile_maxima_stride = 1; },
       {"report.tile_maxima_stride is 1"}},

      // Workspace.
      {"WorkspaceNull",
       all,
       [](Problem& p) { p.params.execution.workspace_bytes = 64; },
       {"workspace is null", "64"}},
      {"WorkspaceSmall",
       all,
       [](Problem& p) {
         static char byte;
         p.params.execution.workspace = &byte;
         p.params.execution.workspace_bytes = 1;
       },
       {"workspace_bytes is 1", "needs"}},
  };
}

class Validation : public testing::TestWithParam<Bad> {
 protected:
  static void expect_rejection(const Bad& bad, const Case& start) {
    Problem problem(start);
    bad.spoil(problem);
    // run() clears the outputs first; what they hold now must still be there afterwards.
    try {
      problem.run();
      FAIL() << "accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.status(), bad.status) << error.what();
      for (const std::string& part : bad.message)
        EXPECT_NE(std::string(error.what()).find(part), std::string::npos)
            << "\"" << error.what() << "\" does not say \"" << part << "\"";
    }
    EXPECT_FALSE(problem.wrote_anything());
  }
};

TEST_P(Validation, IsRejectedAndNothingIsWritten) {
  expect_rejection(GetParam(), GetParam().start);
}

TEST_P(Validation, AndSoItIsInDecode) {
  Case c = GetParam().start;
  const std::string name = GetParam().name;
  if (name.starts_with("CuQueries") || name == "RowsDisagree")
    GTEST_SKIP() << "of prefill's lengths";
  c.decode = true;
  for (Lengths& r : c.requests) r.queries = 2;
  expect_rejection(GetParam(), c);
}

INSTANTIATE_TEST_SUITE_P(Bad, Validation, testing::ValuesIn(bad_inputs()),
                         [](const auto& param) { return param.param.name; });

TEST(ValidInput, WhatIsNotUsedIsNotChecked) {
  // Entries of the page table beyond a request's keys hold -1; empty tensors may be null.
  Problem paged(everything_set());
  EXPECT_NO_THROW(paged.run());
  Problem empty({.requests = {{0, 0}, {0, 0}}});
  empty.params.problem.q.data = empty.params.problem.out.data = empty.params.problem.kv.k.data =
      empty.params.problem.kv.v.data = nullptr;
  EXPECT_NO_THROW(empty.run());
}

TEST(ValidInput, ManyEmptyRequestsOfManyHeadsTakeNoTime) {
  Problem problem({.requests = {{0, 0}},
                   .test = BLASST_TEST_RELATIVE,
                   .threshold = 0.5f});  // one value for all
  problem.params.report = {};
  problem.params.problem.kv.lengths = nullptr;
  problem.params.problem.batch = problem.params.problem.heads = 1 << 20;
  EXPECT_NO_THROW(problem.run());
}

TEST(ValidInput, InputsMayOverlap) {
  // K and V in one buffer, and one head's queries for all: only out needs memory of its own.
  Case c{.requests = {{20, 50}}, .heads = 4, .kv_heads = 2};
  Problem problem(c);
  problem.params.problem.kv.v = problem.params.problem.kv.k;
  problem.params.problem.q.stride_head = 0;
  EXPECT_NO_THROW(problem.run());
}

TEST(InstructionSet, AnUnknownOneIsRejectedWithTheList) {
  try {
    set_cpu_isa("mmx");
    FAIL() << "accepted";
  } catch (const Error& error) {
    for (const std::string& isa : cpu_isas())
      EXPECT_NE(std::string(error.what()).find(isa), std::string::npos) << error.what();
  }
}

// In a process of its own, since the variable is read once.
TEST(InstructionSetDeathTest, AnUnknownOneInTheEnvironmentIsRejectedBeforeAnythingIsWritten) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto run_with_mmx = [] {
    setenv("BLASST_CPU_ISA", "mmx", 1);
    for (const Case& c : {dense(), decode()}) {
      Problem problem(c);
      try {
        problem.run();
        std::exit(1);
      } catch (const Error& error) {
        if (error.status() != BLASST_INVALID_ARGUMENT || problem.wrote_anything()) std::exit(2);
      }
    }
    std::exit(0);
  };
  EXPECT_EXIT(run_with_mmx(), testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace blasst::check
