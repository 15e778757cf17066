// A problem in memory: tensors, index arrays, masks, thresholds and room for every output.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "blasst/blasst.hpp"
#include "testing/case.h"
#include "testing/reference/reference.h"

namespace blasst::check {

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// What outputs hold before a call. No call writes it.
inline constexpr std::byte kUnused{0xff};  // NaN in every type
inline constexpr int kMark = 12345;

void call(const AttentionParams& params, bool decode);
Plan plan(const AttentionParams& params, bool decode);
reference::Result refer(const AttentionParams& params, bool decode, TileShape shape,
                        const std::vector<bool>* kept = nullptr);

// Where a call's numbers are and which keys a row sees: the header's rules, written a second time,
// so that a slip in the library's own addressing shows.
class Access {
 public:
  struct Request {
    int64_t first_row, rows, first_key, keys;
  };

  explicit Access(const AttentionParams& params);

  const std::vector<Request>& requests() const { return requests_; }
  int64_t rows() const { return rows_; }  // of all requests, those that are padding included
  int64_t max_keys() const { return max_keys_; }  // of any request

  // In any view laid out as q, or as k and v.
  std::byte* query_row(const View& view, int64_t request, int64_t position, int64_t head) const;
  std::byte* key_row(const View& view, int64_t request, int64_t token, int64_t kv_head) const;

  // The row of a view laid out as q, among those of all requests.
  std::byte* row_at(const View& view, int64_t row, int64_t head) const;

  std::byte* query(int64_t request, int64_t position, int64_t head) const;
  std::byte* output(int64_t request, int64_t position, int64_t head) const;
  std::byte* key(int64_t request, int64_t token, int64_t kv_head) const;
  std::byte* value(int64_t request, int64_t token, int64_t kv_head) const;

  // What the elements of keys and values in 8 bits are multiples of; 1 of others.
  float key_scale(int64_t request, int64_t kv_head) const;
  float value_scale(int64_t request, int64_t kv_head) const;

  // By everything but the block mask.
  bool sees(int64_t request, int64_t position, int64_t head, int64_t key) const;

  // Of a view [outer, tokens, heads, dim].
  std::byte* row_of(const View& view, int64_t outer, int64_t token, int64_t head) const;

 private:
  blasst_problem problem_;
  std::vector<Request> requests_;
  int64_t rows_ = 0;
  int64_t max_keys_ = 0;
};

// Elements that belong to no row are NaN, in int8 -128: what a kernel reads beyond its rows shows
// in its output.
class Problem {
 public:
  explicit Problem(const Case& c);
  Problem(Problem&&) = default;

  Case description;
  AttentionParams params;  // points into the buffers below; a test may change what it wants

  // Fills the outputs with marks and calls the library.
  void run();
  void mark_outputs();

  // Whether the call wrote outside the rows of out, or any output at all.
  bool wrote_elsewhere() const;
  bool wrote_anything() const;

  std::vector<float> out() const;           // [rows, heads, value_dim]
  std::vector<std::byte> out_bits() const;  // the same as stored

  std::vector<float> lse, dropped_mass_bound;
  std::vector<int64_t> tiles_visitable, tiles_skipped;
  std::vector<uint32_t> tile_bits;
  std::vector<uint64_t> gap_histogram;
  std::vector<float> tile_maxima;

  // Input buffers, for tests that bend them.
  std::vector<int32_t> lengths, starts, query_lengths, cu_keys, cu_queries, page_table;
  std::vector<float> thresholds, sinks, k_scales, v_scales;
  std::vector<int64_t> bands;
  std::vector<uint8_t> blocks;

 private:
  // A tensor [outer, tokens, heads, dim] of NaN; `paddings` unused elements after every row.
  View allocate(std::vector<std::byte>& buffer, DType dtype, int64_t outer, int64_t tokens,
                int64_t heads, int64_t dim);
  void lay_out_queries();
  void lay_out_keys();
  Scales make_scales(std::vector<float>& values, DType dtype, uint64_t part) const;
  void fill();
  void set_mask();
  void set_thresholds();
  void set_report();

  std::vector<std::byte> q_, k_, v_, out_;
};

}  // namespace blasst::check
