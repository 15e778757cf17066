// A warpgroup that multiplies: scores, their weights and gradients, and the sums of 64 rows or
// keys.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/core/fragment.cuh"
#include "cuda/core/math.cuh"
#include "cuda/sm90/backward/work.cuh"
#include "cuda/sm90/core/ring.cuh"
#include "cuda/sm90/core/wgmma.cuh"

namespace blasst::cuda::backward {

// A block that passes by, where it is and how it is seen.
struct Visit {
  int first_stage, second_stage;
  bool masked;  // some of its scores may not be seen
};

template <typename L, typename T>
class Consumer {
  using First = typename L::First;
  using Second = typename L::Second;
  using Shared = typename L::Shared;
  static constexpr bool kKeys = L::kSide == Side::kKeys;
  static constexpr int kPassing = L::kPassing;
  using Scores = float[kPassing / 2];      // a thread's share of 64 x kPassing
  using Weights = uint32_t[kPassing / 4];  // the same, in the element type
  using FirstSums = float[L::kQkDim / 2];
  using SecondSums = float[L::kValueDim / 2];
  // LSE or delta of the rows of a thread's scores: those that pass by, or its two.
  using RowValues = float[kKeys ? kPassing / 4 : 2];
  // Whether registers hold the next block's scores beside this one's weights.
  static constexpr bool kAhead = L::kQkDim == 64;
  static constexpr int kFirstSums = L::kTileKeys * L::kQkDim;  // of a tile, of one query head

 public:
  __device__ Consumer(const Params& b, Shared& s)
      : b_(b),
        p_(b.forward),
        s_(s),
        w_(s.work),
        base_(ptx::opaque(ptx::shared_address(&s))),
        warpgroup_(ptx::warp_uniform(threadIdx.x / 128) - 1),
        thread_(ptx::opaque(threadIdx.x % 128)) {
    first_ = ptx::warp_uniform(first_fixed<L>(w_, warpgroup_));
    count_ = kKeys ? w_.spans.keys.count : w_.spans.rows.count + w_.spans.offset;
    count_ = ptx::warp_uniform(count_ - first_);
  }

  __device__ void run() {
    ptx::mbarrier_wait(address(s_.barriers.fixed_full), 0);
    if constexpr (kAhead)
      find_all_ahead();
    else if constexpr (!L::kByGradient)
      find_all();
    else if (warpgroup_ == 0)
      find_values_gradient();
    else
      find_keys_gradient();
  }

 private:
  // --- the loops --------------------------------------------------------------------------------

  // dk and dv, or dq. Products of the tensor cores are started in this order and end in it:
  // scores and weights' gradients of a block, dv of it, scores of the next, dk or dq of it,
  // weights' gradients of the next. What threads compute meanwhile stands between.
  __device__ __forceinline__ void find_all() {
    if constexpr (!kKeys) load_rows(lse_, delta_);
    FirstSums dk;  // or dq
    SecondSums dv;
    clear(dk);
    if constexpr (kKeys) clear(dv);
    Scores s, dp;
    Weights p, ds;
    Visit at, next;
    // Blocks that follow each other; those in between are another warpgroup's.
#pragma unroll 1
    while (take(at)) {
      int before = 0;  // the first operand's stage
      start_scores(s, at);
      ptx::wgmma_commit();  // where a later block has sums
      start_dweights(dp, at);
#pragma unroll 1
      for (bool is_first = true;; is_first = false) {
        // 1. Weights, under the sums of the block before and this one's gradients of weights.
        ptx::wgmma_wait<2>();
        ptx::fence_registers(s);
        weigh(s, s, p, at, lse_of(at));
        if constexpr (kKeys) {
          start_dv(dv, p, at);
          // 2. Gradients of scores, and which block is next, under dv.
          ptx::wgmma_wait<1>();
        } else {
          ptx::wgmma_wait<0>();
        }
        ptx::fence_registers(dp);
        if (!is_first) release_first(before);
        if constexpr (!kKeys) release_second(at.second_stage);
        const bool any_next = take_next(next);
        differentiate(s, dp, at, delta_of(at));
        if constexpr (kKeys) {
          ptx::wgmma_wait<0>();  // p's registers are needed
          ptx::fence_registers(dv);
          ptx::fence_registers(s);
          release_second(at.second_stage);
        }
        pack(s, ds);
        if (!any_next) break;
        // 3. The next scores come before the sums that nobody waits for.
        start_scores(s, next);
        start_sums(dk, ds, at);
        start_dweights(dp, next);
        before = at.first_stage, at = next;
      }
      start_sums(dk, ds, at);
      ptx::wgmma_wait<0>();
      ptx::fence_registers(dk);
      // Who waits for a later block must not hold this one: the blocks between need its room.
      release_first(at.first_stage);
    }
    finish_all(dk, dv);
  }

  // The same where registers allow: scores of the next block come before dv of this one, under its
  // gradients of scores, and what rows that pass by have is loaded ahead of its use.
  __device__ __forceinline__ void find_all_ahead() {
    RowValues lse, delta;
    if constexpr (!kKeys) load_rows(lse, delta);
    FirstSums dk;  // or dq
    SecondSums dv;
    clear(dk);
    if constexpr (kKeys) clear(dv);
    Visit at;
#pragma unroll 1
    while (take(at)) follow_ahead(dk, dv, lse, delta, at);
    finish_all(dk, dv);
  }
  // Blocks that follow each other from `at` on; those in between are another warpgroup's.
  __device__ __forceinline__ void follow_ahead(FirstSums& dk, SecondSums& dv, RowValues& lse,
                                               RowValues& delta, Visit& at) {
    Scores s, w, dp;
    Weights p, ds;
    Visit before, next;
    bool any_before = false;
    start_scores(s, at);
    if constexpr (kKeys) load(lse, lse_of(at));
    ptx::wgmma_commit();  // where a later block has sums
    start_dweights(dp, at);
#pragma unroll 1
    for (;;) {
      const bool any_next = take_next(next);
      // 1. Weights, under the sums of the block before and this one's gradients of weights.
      ptx::wgmma_wait<2>();
      ptx::fence_registers(s);
      weigh(s, w, p, at, lse);
      if constexpr (kKeys) load(delta, delta_of(at));
      hold(w);
      ptx::wgmma_wait<0>();
      ptx::fence_registers(dp);
      if constexpr (kKeys) ptx::fence_registers(dv);
      if constexpr (!kKeys) release_second(at.second_stage);
      if (any_before) release_summed(before);
      if (!any_next) break;
      // 2. Gradients of scores, under the next block's scores and dv of this one.
      start_scores(s, next);
      if constexpr (kKeys) load(lse, lse_of(next));
      if constexpr (kKeys) start_dv(dv, p, at);
      differentiate(w, dp, at, delta);
      pack(w, ds);
      // 3. The sums that nobody waits for.
      start_sums(dk, ds, at);
      start_dweights(dp, next);
      before = at, at = next;
      any_before = true;
    }
    if constexpr (kKeys) start_dv(dv, p, at);
    differentiate(w, dp, at, delta);
    pack(w, ds);
    start_sums(dk, ds, at);
    ptx::wgmma_wait<0>();
    ptx::fence_registers(dk);
    if constexpr (kKeys) ptx::fence_registers(dv);
    // Who waits for a later block must not hold this one: the blocks between need its room.
    release_summed(at);
  }
  // Of a block of which all sums are done.
  __device__ __forceinline__ void release_summed(const Visit& at) const {
    release_first(at.first_stage);
    if constexpr (kKeys) release_second(at.second_stage);
  }

  // dv, where the other warpgroup finds dk.
  __device__ __forceinline__ void find_values_gradient() {
    SecondSums dv;
    clear(dv);
    Visit at;
    if (take(at)) {
      Scores s;
      Weights p;
      Ring<L::kHandovers> handover;
      start_scores(s, at);
      Visit before = at;
      bool any_before = false;
#pragma unroll 1
      for (;;) {
        // 1. Weights, under the other warpgroup's products. Those in registers are read until the
        // product is waited for.
        ptx::wgmma_wait<0>();
        ptx::fence_registers(s);
        ptx::fence_registers(dv);
        if (any_before) release_second(before.second_stage);
        weigh(s, s, p, at, lse_of(at));
        release_first(at.first_stage);
        // 2. The other warpgroup goes on with them.
        ptx::mbarrier_wait(address(s_.barriers.weights_empty[handover.stage]), handover.phase ^ 1);
#pragma unroll
        for (int i = 0; i < kPassing / 2; ++i) s_.weights[handover.stage][i][thread_] = s[i];
        arrive(address(s_.barriers.weights_full[handover.stage]));
        handover.next();
        wait_second(at);  // for dv
        before = at;
        any_before = true;
        if (!take(at)) break;
        start_scores(s, at);
        start_dv(dv, p, before);
      }
      start_dv(dv, p, before);
      ptx::wgmma_wait<0>();
      ptx::fence_registers(dv);
    }
    finish(dv, 1, b_.dv, kFirstSums);
  }

  // dk, from the other warpgroup's weights.
  __device__ __forceinline__ void find_keys_gradient() {
    FirstSums dk;
    clear(dk);
    Visit at;
    if (take(at)) {
      Scores dp;
      Weights ds;
      Ring<L::kHandovers> handover;
      start_dweights(dp, at);
      ptx::wgmma_commit();
      Visit before = at;
      bool any_before = false;
#pragma unroll 1
      for (;;) {
        ptx::wgmma_wait<1>();
        ptx::fence_registers(dp);
        release_second(at.second_stage);
        Scores s;
        ptx::mbarrier_wait(address(s_.barriers.weights_full[handover.stage]), handover.phase);
#pragma unroll
        for (int i = 0; i < kPassing / 2; ++i) s[i] = s_.weights[handover.stage][i][thread_];
        arrive(address(s_.barriers.weights_empty[handover.stage]));
        handover.next();
        differentiate(s, dp, at, delta_of(at));
        ptx::wgmma_wait<0>();
        ptx::fence_registers(dk);
        ptx::fence_registers(s);
        if (any_before) release_first(before.first_stage);
        pack(s, ds);
        before = at;
        any_before = true;
        if (!take(at)) break;
        start_dweights(dp, at);
        start_sums(dk, ds, before);
      }
      start_sums(dk, ds, before);
      ptx::wgmma_wait<0>();
      ptx::fence_registers(dk);
    }
    finish(dk, b_.scale, b_.dk, 0);
  }

  // --- blocks that pass by ----------------------------------------------------------------------

  // The next block that this warpgroup wants; false: there is none.
  __device__ __forceinline__ bool take(Visit& at) {
#pragma unroll 1
    while (!take_next(at)) {
      if (s_.step[first_ring_.stage].wanted == 0) return false;
      advance(at);
      // The barriers of its second operand must be in this phase, too.
      wait_second(at);
      release_first(at.first_stage);
      release_second(at.second_stage);
    }
    return true;
  }

  // The very next block; false: there is none, or it is the other warpgroup's.
  __device__ __forceinline__ bool take_next(Visit& at) {
    ptx::mbarrier_wait(base_ + offsetof(Shared, barriers.first_full) + 8 * first_ring_.stage,
                       first_ring_.phase);
    const Step& step = s_.step[first_ring_.stage];
    const unsigned wanted = ptx::warp_uniform(step.wanted) >> warpgroup_;
    if (!(wanted & 1)) return false;
    advance(at);
    at.masked = wanted >> kWarpgroups & 1;
    if (at.masked && step.count < kPassing) [[unlikely]]
      clear(at, step.count);
    return true;
  }
  __device__ __forceinline__ void advance(Visit& at) {
    at.first_stage = first_ring_.stage, at.second_stage = second_ring_.stage;
    second_phase_ = second_ring_.phase;
    first_ring_.next();
    second_ring_.next();
  }

  // What is behind the last row or key may be anything, NaN too, and 0 * NaN is not 0.
  __device__ __forceinline__ void clear(const Visit& at, int valid) {
    wait_second(at);
    clear_rows<First>(first_block(at), valid);
    clear_rows<Second>(second_block(at), valid);
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(1 + warpgroup_, 128);
  }
  template <typename Block>
  __device__ __forceinline__ void clear_rows(uint32_t block, int valid) const {
    const int vectors = (kPassing - valid) * (kPanelRowBytes / 16);
#pragma unroll 1
    for (int panel = 0; panel < Block::kCount; ++panel) {
      const uint32_t from = block + panel * Block::kPanelBytes + valid * kPanelRowBytes;
#pragma unroll 1
      for (int i = thread_; i < vectors; i += 128)
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(from + 16 * i), "r"(0)
                     : "memory");
    }
  }

  __device__ __forceinline__ uint32_t first_block(const Visit& at) const {
    return base_ + offsetof(Shared, first) + at.first_stage * First::kBytes;
  }
  __device__ __forceinline__ uint32_t second_block(const Visit& at) const {
    return base_ + offsetof(Shared, second) + at.second_stage * Second::kBytes;
  }
  __device__ __forceinline__ void wait_second(const Visit& at) const {
    ptx::mbarrier_wait(base_ + offsetof(Shared, barriers.second_full) + 8 * at.second_stage,
                       second_phase_);
  }
  __device__ __forceinline__ void release_first(int stage) const {
    arrive(base_ + offsetof(Shared, barriers.first_empty) + 8 * stage);
  }
  __device__ __forceinline__ void release_second(int stage) const {
    arrive(base_ + offsetof(Shared, barriers.second_empty) + 8 * stage);
  }
  // For all of the warp, when all of it is done.
  __device__ __forceinline__ void arrive(uint32_t barrier) const {
    __syncwarp();
    ptx::mbarrier_arrive_if(barrier, thread_ % 32 == 0);
  }

  // --- products ---------------------------------------------------------------------------------

  // 64 x kPassing: what stays, blocks at `fixed` of the shared memory, times what passes by.
  template <typename Fixed, typename Passing>
  __device__ __forceinline__ void multiply(Scores& t, uint32_t fixed, uint32_t passing) const {
    using Multiply = ptx::Wgmma<T, kPassing>;
    const int block = L::kByGradient ? 0 : warpgroup_;
    // Beside sums that fill the registers, no descriptors are kept from one product to the next.
    constexpr bool kFull = kPassing < kBlock || L::kQkDim == 256;
    const uint32_t base = kFull ? ptx::opaque(base_) : base_;
    const uint64_t a = ptx::advance(ptx::wgmma_descriptor(base + fixed), block * Fixed::kBytes);
    const uint64_t b = ptx::wgmma_descriptor(passing);
    ptx::fence_registers(t);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4 * Fixed::kCount; ++step) {
      const int panel = step / 4, within = step % 4 * 32;
      const uint64_t x = ptx::advance(a, panel * Fixed::kPanelBytes + within);
      const uint64_t y = ptx::advance(b, panel * Passing::kPanelBytes + within);
      step == 0 ? Multiply::first(t, x, y) : Multiply::add(t, x, y);
    }
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void start_scores(Scores& s, const Visit& at) const {
    multiply<typename L::FirstFixed, First>(s, offsetof(Shared, first_fixed), first_block(at));
  }
  __device__ __forceinline__ void start_dweights(Scores& dp, const Visit& at) const {
    wait_second(at);
    multiply<typename L::SecondFixed, Second>(dp, offsetof(Shared, second_fixed), second_block(at));
  }

  // Here, not later: the assembler serialises products among which sums are first written.
  template <int kCount>
  __device__ __forceinline__ static void clear(float (&sums)[kCount]) {
#pragma unroll
    for (float& x : sums) x = 0;
    ptx::fence_registers(sums);
  }

  // sums += weights * block.
  template <typename Block, int kCount>
  __device__ __forceinline__ void add(float (&sums)[kCount], const Weights& weights,
                                      uint32_t block) const {
    const uint64_t rows = ptx::wgmma_descriptor(block, Block::kPanelBytes);
    ptx::fence_registers(sums);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kPassing / 16; ++step) {
      ptx::Wgmma<T, 2 * kCount>::add_registers_by_columns(
          sums, weights + 4 * step, ptx::advance(rows, 16 * step * kPanelRowBytes));
    }
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void start_dv(SecondSums& dv, const Weights& p,
                                           const Visit& at) const {
    add<Second>(dv, p, second_block(at));
  }
  __device__ __forceinline__ void start_sums(FirstSums& sums, const Weights& ds,
                                             const Visit& at) const {
    add<First>(sums, ds, first_block(at));
  }

  // --- weights ----------------------------------------------------------------------------------

  // The thread's rows of its fragment, and its columns of every 8 (core/fragment.cuh).
  __device__ __forceinline__ int fragment_row(int r) const {
    return thread_ / 32 * 16 + thread_ % 32 / 4 + 8 * r;
  }
  __device__ __forceinline__ int fragment_column() const { return 2 * (thread_ % 4); }

  // Of the rows whose gradients these are.
  __device__ __forceinline__ void load_rows(float (&lse)[2], float (&delta)[2]) const {
    const RowBlock& rows =
        b_.rows[int64_t{w_.head} * b_.query_tiles + first_query_tile(p_, w_.request) + w_.tile +
                (count_ > 0 ? warpgroup_ : 0)];
#pragma unroll
    for (int r = 0; r < 2; ++r)
      lse[r] = rows.lse[fragment_row(r)], delta[r] = rows.delta[fragment_row(r)];
  }

  // What weights and gradients need of rows: of those that pass by, in shared memory, or of the
  // thread's own.
  __device__ __forceinline__ const float* lse_of(const Visit& at) const {
    return kKeys ? s_.rows[at.first_stage].lse : lse_;
  }
  __device__ __forceinline__ const float* delta_of(const Visit& at) const {
    return kKeys ? s_.rows[at.first_stage].delta : delta_;
  }
  __device__ __forceinline__ float2 pair_of(const float* passing, int j) const {
    return *reinterpret_cast<const float2*>(passing + 8 * j + fragment_column());
  }
  // Shared memory is slow while products read it: well before they are needed.
  __device__ __forceinline__ void load(RowValues& values, const float* passing) const {
#pragma unroll
    for (int j = 0; j < kPassing / 8; ++j) {
      const float2 pair = pair_of(passing, j);
      values[2 * j] = pair.x, values[2 * j + 1] = pair.y;
    }
  }

  // each(i, row) of the fragment's elements i and i + 1; row: what theirs has, in shared memory, in
  // RowValues, or of the thread's own.
  template <typename Values, typename Each>
  __device__ __forceinline__ void for_pairs(const Values& values, const Each& each) const {
#pragma unroll
    for (int j = 0; j < kPassing / 8; ++j) {
      float2 passing = {};
      if constexpr (kKeys && std::is_pointer_v<Values>)
        passing = pair_of(values, j);
      else if constexpr (kKeys)
        passing = make_float2(values[2 * j], values[2 * j + 1]);
#pragma unroll
      for (int r = 0; r < 2; ++r)
        each(4 * j + 2 * r, kKeys ? passing : make_float2(values[r], values[r]));
    }
  }

  // Scores become weights w, p the same in the element type. With a soft cap, w is d weight / d
  // (scale * q.k), which has the cap's slope.
  template <typename Values>
  __device__ __forceinline__ void weigh(Scores& s, Scores& w, Weights& p, const Visit& at,
                                        const Values& lse) const {
    if (at.masked) [[unlikely]]
      mask(s, at, -INFINITY);
    if constexpr (L::kCapped) {
      for_pairs(lse, [&](int i, float2 row) {
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          // tanh and its slope, both without cancellation.
          const float raw = s[i + e];
          const float u = exp2_approx(-2 * kLog2e * fabsf(raw * p_.softcap_scale));
          const float part = __fdividef(1, 1 + u);
          const float tanh = copysignf((1 - u) * part, raw);
          const float log2 = fmaf(tanh, p_.score_to_log2, e == 0 ? -row.x : -row.y);
          x[e] = raw == -INFINITY ? 0 : exp2_approx(log2);
          w[i + e] = x[e] * (4 * u * part * part);
        }
        p[i / 2] = pack2<T>(x[0], x[1]);
      });
    } else {
      for_pairs(lse, [&](int i, float2 row) {
        w[i] = exp2_approx(fmaf(s[i], p_.score_to_log2, -row.x));
        w[i + 1] = exp2_approx(fmaf(s[i + 1], p_.score_to_log2, -row.y));
        p[i / 2] = pack2<T>(w[i], w[i + 1]);
      });
    }
  }

  // Weights are there before what follows: the assembler would move exponentials below the wait for
  // products that they are to stand under. No weight has all bits set.
  __device__ __forceinline__ static void hold(const Scores& weights) {
    uint32_t all = ~0u;
#pragma unroll
    for (const float x : weights) all &= __float_as_uint(x);
    asm volatile("{ .reg .pred p; setp.eq.u32 p, %0, 0xffffffff; @p trap; }" ::"r"(all));
  }

  // Weights and their gradients become gradients of scores.
  template <typename Values>
  __device__ __forceinline__ void differentiate(Scores& s, const Scores& dp, const Visit& at,
                                                const Values& delta) const {
    for_pairs(delta, [&](int i, float2 row) {
      s[i] *= dp[i] - row.x;
      s[i + 1] *= dp[i + 1] - row.y;
    });
    // A gradient may be NaN or infinite where the row does not see the key.
    if (at.masked) [[unlikely]]
      mask(s, at, 0);
  }

  __device__ __forceinline__ static void pack(const Scores& s, Weights& p) {
#pragma unroll
    for (int i = 0; i < kPassing / 4; ++i) p[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
  }

  __device__ __forceinline__ void mask(Scores& s, const Visit& at, float masked) const {
    const Step& step = s_.step[at.first_stage];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Rows that see a key, or keys that a row sees, among those that pass by.
      const int i = first_ + fragment_row(r);
      const int begin = kKeys ? i + step.least : i - step.most;
      const int end = (kKeys ? i + step.most : i - step.least) + 1;
      const Range seen = {max(begin, step.first), min(end, step.first + step.count)};
      mask_row(s, r, seen, step.first + fragment_column(), masked);
    }
  }

  // --- gradients --------------------------------------------------------------------------------

  __device__ __forceinline__ void finish_all(const FirstSums& dk, const SecondSums& dv) const {
    if constexpr (kKeys) {
      finish(dk, b_.scale, b_.dk, 0);
      finish(dv, 1, b_.dv, kFirstSums);
    } else {
      store(dk, b_.scale, b_.dq);
    }
  }

  // Writes the gradients of 64 keys, or leaves them for add_parts(), `place` floats on.
  template <int kCount>
  __device__ __forceinline__ void finish(const float (&sums)[kCount], float factor,
                                         const OutputRows& to, int place) const {
    constexpr int kDim = 2 * kCount;
    if (!w_.sums) return store(sums, factor, to);
    float* first = w_.sums + place + first_ * kDim + fragment_column();
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j)
        *reinterpret_cast<float2*>(first + fragment_row(r) * kDim + 8 * j) =
            make_float2(sums[4 * j + 2 * r], sums[4 * j + 2 * r + 1]);
  }

  // Writes the 64 rows or keys.
  template <int kCount>
  __device__ __forceinline__ void store(const float (&sums)[kCount], float factor,
                                        const OutputRows& to) const {
    T* first;
    if constexpr (kKeys) {
      first = key_row<T>(to, p_, w_.request, w_.kv_head, w_.spans.keys.first + first_);
    } else {
      first = static_cast<T*>(to.data);
      const int row = w_.spans.rows.first + first_ - w_.spans.offset;
      first +=
          w_.head * to.stride_head + prefill::row_in_tensor(p_, w_.request, row) * to.stride_token;
      if (!p_.cu_seqlens_q) first += w_.request * to.stride_request;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = fragment_row(r);
      T* at = first + row * to.stride_token + 8 * (thread_ % 4);
      // The four threads of a row trade pairs, so that each has eight elements side by side.
#pragma unroll
      for (int j = 0; j < kCount / 16; ++j) {
        uint32_t x[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* pair = &sums[16 * j + 4 * e + 2 * r];
          x[e] = pack2<T>(pair[0] * factor, pair[1] * factor);
        }
        transpose_in_quad(x);
        if (row < count_)
          *reinterpret_cast<uint4*>(at + 32 * j) = make_uint4(x[0], x[1], x[2], x[3]);
      }
    }
  }

  const Params& b_;
  const prefill::Params& p_;
  Shared& s_;
  const Work& w_;
  const uint32_t base_;  // address of s_
  const int warpgroup_;
  const uint32_t thread_;  // of the warpgroup; in a register, not read anew at every block
  int first_,
      count_;  // what stays: position of its first row, or its first key; how many there are
  Ring<L::kFirstStages> first_ring_;  // the next to take
  Ring<L::kSecondStages> second_ring_;
  uint32_t second_phase_ = 0;          // of the block taken last
  float lse_[2] = {}, delta_[2] = {};  // kQueries: of the thread's rows
};

}  // namespace blasst::cuda::backward
