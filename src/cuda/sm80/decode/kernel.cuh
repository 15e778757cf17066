// Decode attention for compute capability 8.0 and later. docs/kernels/sm80.md draws the schedule.
//
// A block of four warps walks over splits of the keys of one request and KV head. Of every tile of
// 64 keys each warp copies and scores 16; all meet to decide, and for a kept tile's maxima. Of the
// outputs each warp has a part of the elements, and adds the values of all keys to it.
#pragma once

#include <cstdint>

#include "cuda/core/decode/combine.cuh"
#include "cuda/core/decode/params.h"
#include "cuda/core/decode/rows.cuh"
#include "cuda/core/decode/splits.h"
#include "cuda/core/decode/steps.h"
#include "cuda/core/decode/work.cuh"
#include "cuda/core/keys.cuh"
#include "cuda/core/math.cuh"
#include "cuda/core/tiles.h"
#include "cuda/sm80/core/copies.cuh"
#include "cuda/sm80/core/ptx.cuh"
#include "cuda/sm80/decode/config.cuh"
#include "cuda/sm80/decode/shape.h"

namespace blasst::cuda::decode::sm80 {

template <typename C>
class Block {
  static constexpr int kRows = C::kRows;
  static constexpr int kEights = kRows / 8;                 // of eight query rows
  static constexpr int kPanels = (C::kValueDim + 63) / 64;  // of outputs: 16 elements a warp
  static constexpr int kColumns = Rows<C>::kColumns;
  static constexpr bool kFolds = folds(C::kValueDim, kRows);
  using Element = typename C::Element;
  using Stage = typename C::Stage;
  using Shared = typename C::Shared;
  using Scores = typename Rows<C>::Scores;
  using Columns = typename Rows<C>::Columns;
  using Softmax = typename Rows<C>::Softmax;
  using Outputs = float[kPanels][Rows<C>::kScores];

 public:
  __device__ __forceinline__ Block(const Params& p, const Plan& plan, const Sources& sources,
                                   Shared& shared)
      : p_(p),
        plan_(plan),
        sources_(sources),
        shared_(shared),
        behind_(sources.stages - 1),
        rows_(p, plan, shared.rows) {}

  // A block's first item has its number; later ones go to whoever comes first.
  __device__ __forceinline__ void run() {
    Items items(p_, plan_);
    Turn turn;
    for (int index = blockIdx.x; items.find(index, rows_.item);) {
      const bool takes = threadIdx.x == 0 && plan_.turns.signature;
      const int next = takes ? turn.take(plan_.turns) : 0;
      attend();
      if (!plan_.turns.signature) return;
      if (takes) shared_.next_item = gridDim.x + next;
      __syncthreads();
      index = ptx::warp_uniform(shared_.next_item);
      __syncthreads();
    }
  }

 private:
  // Of the tiles some steps ago, bit by bit: whether they were kept, some row's maximum grew, and
  // they were the last of their split.
  struct StepsAgo {
    unsigned kept = 0, grown = 0, last = 0;
    __device__ __forceinline__ void push(bool keeps, bool grows, bool ends) {
      kept = kept << 1 | keeps, grown = grown << 1 | grows, last = last << 1 | ends;
    }
  };

  // --- an item ----------------------------------------------------------------------------------

  // Keys are copied a ring of stages ahead; values are asked for when a tile is kept, and added
  // `behind_` tiles later, so that both have the time of the tiles in between to come; the outputs
  // of a split are as late, so that its end waits for nothing. A step's copies are one group.
  __device__ __forceinline__ void attend() {
    begin_item();
    Steps steps(rows_.item.begin, rows_.item.end, rows_.item.split_tiles);
    copy_queries();
    for (int i = 0; i <= behind_; ++i) {
      copy_keys(steps, i, shared_.stages[i]);
      ptx::commit_copies();
    }
    wait_for_copies(behind_);
    __syncthreads();
    Outputs o = {};
    int slot = rows_.item.slot;  // of the outputs
    StepsAgo steps_ago;
    int here = 0;  // its stage
#pragma unroll 1
    for (int i = 0; i < steps.count(); ++i) {
      const Step step = steps.next();
      const int tile = tile_of(step.position);
      Stage& stage = shared_.stages[here];
      // 1. The scores of this warp's keys, and their maxima; other keys take their place.
      wait_for_copies(behind_);
      __syncwarp();
      const int page = stage.pages[at_.warp];
      Scores s;
      score(stage, s);
      __syncwarp();
      copy_keys(steps, i + sources_.stages, stage);
      Columns maximum, largest;
      bool nan = rows_.finish_scores(s, tile, maximum, largest);
      bool keep = false;
      if (step.flags & kOnlySeed) {
        // 2. A seed of another item gives its maxima and no more.
        rows_.take_seed(maximum);
        if (step.flags & kLastSeed) rows_.share_maxima(rows_.seed, nan);
      } else {
        // 3. With the other warps, the decision: values and probabilities of `behind_` steps ago
        // are there for all. A kept tile's values are asked for.
        if (behind_ > 0) wait_for_copies(behind_ - 1);
        if (step.flags & kFirstOfSplit) rows_.begin_split();
        keep = rows_.decide(tile, step.flags & kSeed, maximum, largest, nan);
        if (keep) copy(sources_.v, stage.values[at_.warp], tile, page);
      }
      ptx::commit_copies();
      const bool grown = keep && weigh(s, maximum, stage);
      // 4. Values that have come are added; with them, a split that ended.
      steps_ago.push(keep, grown, step.flags & kLastOfSplit);
      if (behind_ == 0 && keep) meet_all_copies();
      if (step.flags & kLastOfSplit) end_split();
      add(steps_ago, behind_, here, o, slot);
      if (++here == sources_.stages) here = 0;
    }
    meet_all_copies();
    for (int i = behind_ - 1; i >= 0; --i) add(steps_ago, i, stage_before(here, 1), o, slot);
    if constexpr (kFolds) {
      if (folded_ > 0) write_total(slot);
    }
    __syncthreads();  // before the next item's queries
  }

  __device__ __forceinline__ void begin_item() {
    rows_.begin_item();
    const Item& item = rows_.item;
    seen_ = visible_keys(item.keys, item.positions, p_.distances);
    if constexpr (C::kTests) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int row = at_.row(c);
        const float threshold = row < plan_.rows ? threshold_of(p_, item, row) : 0;
        rows_.below[c] = skip_limit(p_, plan_, item, row, threshold);
      }
    }
  }

  // All tiles of a split are decided; the values of the last ones are yet to be added, which is
  // over before the next split ends.
  static_assert(kMostStages - 1 <= kMostJoining, "a split behind another has more tiles than that");
  __device__ __forceinline__ void end_split() {
    rows_.sum_over_keys();
    if constexpr (kFolds) {
      before_ = rows_.split;
      dropped_before_ = rows_.dropped;
      rows_.reports.end_split();
    } else {
      rows_.write_statistics(rows_.split, rows_.dropped,
                             [&](int column) { return rows_.reports.of_split(column); });
    }
  }

  // All values of a split are added: it is a result, or a part of one.
  __device__ __forceinline__ void finish_split(Outputs& o, int& slot) {
    if constexpr (kFolds) {
      if (rows_.item.result_splits > 1) {
        fold(o);
        if (++folded_ == rows_.item.result_splits) write_total(slot);
        return;
      }
      rows_.write_statistics(before_, dropped_before_,
                             [&](int column) { return rows_.reports.of_split_before(column); });
    }
    write(o, slot);
  }

  // The split's result joins those of the group's earlier splits.
  __device__ __forceinline__ void fold(Outputs& o) {
    const bool first = folded_ == 0;
    rows_.reports.fold(first);
    if (first) total_ = before_;
    total_dropped_ = first ? dropped_before_ : total_dropped_ + dropped_before_;
    rows_.fold(first, before_, o, total_, total_o_);
  }

  // The result of a group.
  __device__ __forceinline__ void write_total(int& slot) {
    rows_.write_statistics(total_, total_dropped_,
                           [&](int column) { return rows_.reports.of_group(column); });
    write(total_o_, slot);
    folded_ = 0;
  }

  // Outputs of a result, which become those of the next.
  __device__ __forceinline__ void write(Outputs& o, int& slot) const {
    float* partial = plan_.partial + int64_t{slot} * plan_.rows * C::kValueDim;
    slot += p_.kv_heads;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int row = at_.row(c);
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = o[i][at_.element(c, half)];
          if (row < rows_.rows() && has_panel(i))
            partial[row * C::kValueDim + i * 64 + at_.key(half)] = x;
          x = 0;
        }
      }
    }
  }

  // --- copies -----------------------------------------------------------------------------------

  __device__ __forceinline__ int tile_of(int position) const {
    return tile_at(p_.order, {rows_.item.tile_begin, rows_.item.tile_end}, position);
  }
  __device__ __forceinline__ int stage_before(int stage, int steps) const {
    return stage >= steps ? stage - steps : stage - steps + sources_.stages;
  }

  // All of this thread's groups but the `pending` newest, 0 to 2, have come.
  static __device__ __forceinline__ void wait_for_copies(int pending) {
    pending == 2   ? ptx::wait_copies<2>()
    : pending == 1 ? ptx::wait_copies<1>()
                   : ptx::wait_copies<0>();
  }
  static __device__ __forceinline__ void meet_all_copies() {
    ptx::wait_copies<0>();
    __syncthreads();
  }

  // This warp's keys of the i-th step, if there is one.
  __device__ __forceinline__ void copy_keys(const Steps& steps, int i, Stage& stage) {
    if (i >= steps.count()) return;
    const int tile = tile_of(steps.position(i)), page = page_of(tile);
    if (at_.lane == 0) stage.pages[at_.warp] = page;
    copy(sources_.k, stage.keys[at_.warp], tile, page);
  }

  // Of this warp's keys of a tile: a page has 16 tokens or more. -1: none.
  __device__ __forceinline__ int page_of(int tile) const {
    const int first = first_key(tile);
    if (!p_.keys.page_table) return 0;
    if (first >= seen_.end) return -1;
    const int page_bits = 31 - __clz(p_.keys.page_size);  // a power of two
    const int page =
        p_.keys.page_table[rows_.item.request * p_.keys.page_table_stride + (first >> page_bits)];
    return page < p_.keys.pages ? page : -1;
  }
  __device__ __forceinline__ int first_key(int tile) const {
    return tile * kTileKeys + kWarpKeys * at_.warp;
  }

  // This warp's 16 keys of a tile, or their values; zeros where no row sees them.
  template <int kBytes>
  __device__ __forceinline__ void copy(const Tensor& tensor, const uint8_t (&to)[kBytes], int tile,
                                       int page) const {
    using Tile = Panels32<kWarpKeys, kBytes / (2 * kWarpKeys)>;
    using Copies = ThreadCopies<Tile, 32>;
    const int first = first_key(tile);
    const bool paged = p_.keys.page_table;
    const int token = paged ? first & (p_.keys.page_size - 1) : rows_.item.first_key + first;
    const int outer = paged ? page : p_.keys.cu_seqlens ? 0 : rows_.item.request;
    const uint16_t* from = static_cast<const uint16_t*>(tensor.data) + outer * tensor.stride_outer +
                           token * tensor.stride_token + rows_.item.kv_head * tensor.stride_head;
    const uint32_t destination = ptx::shared_address(to);
    if (page >= 0 && first >= seen_.begin && first + kWarpKeys <= seen_.end)
      return Copies::start_whole(destination, from, tensor.stride_token);
    Copies::start(destination, [&](int pass) -> const uint16_t* {
      const int row = Copies::row() + pass * Copies::kPassRows, key = first + row;
      if (page < 0 || key < seen_.begin || key >= seen_.end) return nullptr;
      return from + row * tensor.stride_token + Copies::element();
    });
  }

  // All query rows of the item; zeros behind the last.
  __device__ __forceinline__ void copy_queries() const {
    using Tile = typename C::Queries;
    const Tensor& q = sources_.q;
    const Item& item = rows_.item;
    const TokenPlace first = first_query(p_, item.request);
    constexpr int kPieces = C::kQkDim / 8;
    for (int x = threadIdx.x; x < kRows * kPieces; x += kThreads) {
      const int row = x / kPieces, piece = x % kPieces;
      const auto* from = static_cast<const uint16_t*>(q.data) + first.outer * q.stride_outer +
                         (first.token + row / rows_.group) * q.stride_token +
                         (item.kv_head * rows_.group + row % rows_.group) * q.stride_head +
                         piece * 8;
      ptx::copy_16(ptx::shared_address(shared_.queries) + Tile::panel(piece / 4) +
                       Tile::offset(row, piece % 4),
                   from, row < rows_.rows());
    }
  }

  // --- products ---------------------------------------------------------------------------------

  // S^T = K Q^T of this warp's keys.
  __device__ __forceinline__ void score(const Stage& stage, Scores& s) const {
    using K = typename C::Keys;
    using Q = typename C::Queries;
    const uint32_t key = ptx::shared_address(stage.keys[at_.warp]);
    const uint32_t query = ptx::shared_address(shared_.queries);
    const uint32_t a_lane = K::offset(at_.lane % 16, at_.lane / 16);
    const uint32_t b_lane = Q::offset(at_.lane % 8, at_.lane / 8);
#pragma unroll
    for (float& x : s) x = 0;
#pragma unroll
    for (int panel = 0; panel < C::kQkDim / 32; ++panel) {
      uint32_t a[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        ptx::load_matrices(a[half], key + K::advance(a_lane, 2 * panel + half));
#pragma unroll
      for (int j = 0; j < kEights; ++j) {
        uint32_t b[4];
        ptx::load_matrices(b, query + b_lane + Q::panel(panel) + j * 8 * Q::kRowBytes);
#pragma unroll
        for (int half = 0; half < 2; ++half)
          ptx::multiply_add<Element>(&s[4 * j], a[half], b[2 * half], b[2 * half + 1]);
      }
    }
  }

  // Softmax of a kept tile: its probabilities and factors for all warps.
  __device__ __forceinline__ bool weigh(Scores& s, const Columns& maximum, Stage& stage) {
    Columns factor;
    const bool grown = rows_.weigh(s, maximum, factor);
    if (threadIdx.x < 4) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) stage.factors[at_.row(c)] = factor[c];
    }
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      const auto transposed = [&](int x) {
        return ptx::transpose_matrix(pack2<Element>(s[x], s[x + 1]));
      };
      stage.probabilities[at_.warp][j][at_.lane] =
          make_uint2(transposed(4 * j), transposed(4 * j + 2));
    }
    return grown;
  }

  // Whether this warp has elements of the panel.
  __device__ __forceinline__ bool has_panel(int i) const {
    return C::kValueDim % 64 == 0 || i * 64 + 16 * at_.warp < C::kValueDim;
  }

  // Adds the tile `steps` ago, if it was kept, and finishes what it is the last of.
  __device__ __forceinline__ void add(const StepsAgo& steps_ago, int steps, int here, Outputs& o,
                                      int& slot) {
    const Stage& stage = shared_.stages[stage_before(here, steps)];
    if (steps_ago.kept >> steps & 1) add_values(stage, steps_ago.grown >> steps & 1, o);
    if (steps_ago.last >> steps & 1) finish_split(o, slot);
  }

  // O^T += V^T P; of this warp's elements and all keys.
  __device__ __forceinline__ void add_values(const Stage& stage, bool grown, Outputs& o) const {
    using V = typename C::Values;
    if (grown) {
      Columns factor;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) factor[c] = stage.factors[at_.row(c)];
      rows_.rescale(o, factor);
    }
    const uint32_t lane = V::offset(at_.lane % 8 + at_.lane / 16 * 8, at_.lane / 8 % 2);
    const uint32_t first = ptx::shared_address(stage.values[0]) + V::advance(lane, at_.warp);
#pragma unroll
    for (int keys = 0; keys < kWarps; ++keys) {
      uint2 p[kEights];
#pragma unroll
      for (int j = 0; j < kEights; ++j) p[j] = stage.probabilities[keys][j][at_.lane];
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        if (!has_panel(i)) continue;
        uint32_t a[4];
        ptx::load_matrices_transposed(a, first + keys * V::kBytes + V::panel(2 * i));
#pragma unroll
        for (int j = 0; j < kEights; ++j)
          ptx::multiply_add<Element>(&o[i][4 * j], a, p[j].x, p[j].y);
      }
    }
  }

  const Params& p_;
  const Plan& plan_;
  const Sources& sources_;
  Shared& shared_;
  const ThreadPlace at_;
  const int behind_;  // steps from a tile's decision to where its values are added
  Rows<C> rows_;
  Range seen_;  // keys that some row sees

  // Where results of splits are added: of the split before the one at hand, until its last values
  // are added; of the splits of its group before that, `folded_` of them.
  Softmax before_, total_;
  int dropped_before_, total_dropped_;
  Outputs total_o_;
  int folded_ = 0;
};

template <typename C>
__global__ void __launch_bounds__(kThreads, 2)
    attend(const __grid_constant__ Params p, const __grid_constant__ Plan plan,
           const __grid_constant__ Sources sources) {
  extern __shared__ __align__(128) uint8_t memory[];
  Block<C>(p, plan, sources, *reinterpret_cast<typename C::Shared*>(memory)).run();
}

// A kernel of its own: that of the Hopper backend has the same source, but is compiled for other
// architectures.
template <typename T, int kValueDim>
__global__ void __launch_bounds__(kMostCombineThreads)
    add_splits(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  extern __shared__ float groups[];
  using Shared = typename Combine<T, kValueDim>::Shared;
  Combine<T, kValueDim>(p, plan, reinterpret_cast<Shared*>(groups)).run();
}

}  // namespace blasst::cuda::decode::sm80
