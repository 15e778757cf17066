// The statistics of a call, counted by units on any thread. Integers, so the order of adding never
// shows.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "problem/problem.h"
#include "problem/tiles.h"

namespace blasst::cpu {

class Totals {
 public:
  Totals(const problem::Problem& p, const problem::Geometry& geometry)
      : report_(p.report),
        heads_(p.heads),
        query_tiles_(geometry.query_tiles),
        words_(geometry.tile_words),
        group_(p.group()),
        pack_heads_(p.pack_heads) {}

  bool wants_gaps() const { return report_.gap_histogram != nullptr; }
  bool wants_maxima() const { return report_.tile_maxima != nullptr; }

  void count(const problem::QueryTile& tile, int64_t key_tile, bool kept, double gap) {
    for (int64_t h = tile.head; h < tile.head + tile.heads; ++h) {
      const int64_t cell = tile.request * heads_ + h;
      if (report_.tiles_visitable) add(report_.tiles_visitable[cell], 1);
      if (report_.tiles_skipped && !kept) add(report_.tiles_skipped[cell], 1);
      if (report_.gap_histogram)
        add(report_.gap_histogram[h * BLASST_GAP_BINS + problem::gap_bin(gap)], 1);
    }
    if (report_.tile_bits && kept) {
      const int64_t head = pack_heads_ ? tile.head / group_ : tile.head;
      uint32_t& word =
          report_.tile_bits[(head * query_tiles_ + tile.index) * words_ + key_tile / 32];
      std::atomic_ref(word).fetch_or(uint32_t{1} << (key_tile % 32), std::memory_order_relaxed);
    }
  }

  // A visited tile's largest score.
  void record(const problem::QueryTile& tile, int64_t key_tile, float maximum) {
    const int64_t head = pack_heads_ ? tile.head / group_ : tile.head;
    report_
        .tile_maxima[(head * query_tiles_ + tile.index) * report_.tile_maxima_stride + key_tile] =
        maximum;
  }

 private:
  template <typename T>
  static void add(T& cell, std::type_identity_t<T> value) {
    std::atomic_ref(cell).fetch_add(value, std::memory_order_relaxed);
  }

  const Report& report_;
  int64_t heads_, query_tiles_, words_, group_;
  bool pack_heads_;
};

}  // namespace blasst::cpu
