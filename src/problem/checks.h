// Checks of parameters that read no array, so that they hold for arrays on any device, too. All
// throw Error.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>
#include <utility>

#include "blasst/blasst.hpp"
#include "problem/geometry.h"
#include "problem/text.h"

namespace blasst::problem {

constexpr int64_t kMaxCount =
    std::numeric_limits<int32_t>::max();            // tokens, heads, requests, pages
constexpr int64_t kMaxElements = int64_t{1} << 47;  // a tensor; keeps byte offsets in int64
constexpr int64_t kMaxThreads = 4096;
constexpr int64_t kMaxDecodeRows = 16;

template <typename... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, const Args&... args) {
  throw Error(BLASST_INVALID_ARGUMENT, formatted(format, args...));
}

// The largest stride with which `count` steps stay below an offset of kMaxElements.
constexpr int64_t most_stride(int64_t count) { return kMaxElements / std::max<int64_t>(1, count); }

void check_range(std::string_view name, int64_t value, int64_t least, int64_t most);

// The caller's struct is one that this library knows.
void check_struct_size(std::string_view name, std::size_t given, std::size_t known);

// Struct sizes, shapes, options: what is known before there are tensors.
void check_scalars(const AttentionParams& params, Phase phase);
void check_scalars(const BackwardParams& params);

void check_keys(const KeysValues& kv);
void check_execution(const Execution& execution);

// Every array that the layout and the options need is there.
void check_arrays(const AttentionParams& params);

// The caller's tiles, if it names any, are the ones that the backend decides on. Unsupported
// otherwise.
void check_tiles(std::string_view backend, const Decision& decision, TileShape shape);

// The caller wants exact scores, which are all that the backend has of `what`. Unsupported
// otherwise.
void check_exact_scores(std::string_view backend, std::string_view what, const Decision& decision);

// What a backend takes as keys and values in `what`.
enum class Caches { kOfQueries, kInt8Keys, kOfQueriesOr8Bits };

// Queries, keys, values and output are of one type, but for caches in 8 bits. Unsupported
// otherwise.
void check_types(std::string_view backend, std::string_view what, Caches caches,
                 const blasst_problem& problem);

// The strides of the block mask cover so many tiles: those that requests have, for the mask is read
// there only.
void check_block_mask(const Mask& mask, int64_t heads, int64_t query_tiles, int64_t key_tiles);

// The stride of the tile maxima covers their array.
void check_tile_maxima(const Report& report, const Geometry& geometry);

// The view's last element, [outer - 1, tokens - 1, heads - 1, dim - 1], lies inside its buffer.
void check_view(std::string_view name, const View& view, int64_t outer, int64_t tokens,
                int64_t heads, int64_t dim);

// No two elements of the view share an address.
void check_no_overlap(std::string_view name, const View& view, int64_t outer, int64_t tokens,
                      int64_t heads, int64_t dim);

void check_not_shared(std::string_view out_name, const View& out, std::string_view name,
                      const View& input);

// What backward has beside the forward's problem: LSE, and views in which no gradient shares
// memory.
void check_gradients(const BackwardParams& params);

// Everything about a merge.
void check_merge(const MergeParams& params);

}  // namespace blasst::problem
