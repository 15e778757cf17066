// The right warpgroup: it adds the right half of the values of the tiles that the left one keeps.
#pragma once

#include "cuda/sm90/decode/latent/half.cuh"

namespace blasst::cuda::decode::latent {

template <typename C>
class Right {
 public:
  __device__ __forceinline__ Right(const Plan& plan, Shared& shared)
      : plan_(plan), shared_(shared) {}

  // A loop for splits and one for tiles: in one for both the assembler moves all outputs to other
  // registers and to memory at every tile.
  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (;;) {
      Outputs o;
      clear(o);
      Message m = next_message();
#pragma unroll 1
      for (; m.kind == Message::kAdd; m = next_message()) add(m, o);
      if (m.kind == Message::kStop) return;
      answer();
      write_outputs<kRight>(plan_, m.slot, m.rows, at_, o);
    }
  }

 private:
  __device__ __forceinline__ Message next_message() {
    ptx::mbarrier_wait(address(shared_.message_full), phase_);
    phase_ ^= 1;
    Message m = shared_.message;
    m.kind = ptx::warp_uniform(m.kind);
    return m;
  }

  __device__ __forceinline__ void add(const Message& m, Outputs& o) {
    // 1. The tile's probabilities; the message may be overwritten.
    PackedTile p;
    load_probabilities(shared_, at_, p);
    const float factor[2] = {shared_.factors[at_.row(0)], shared_.factors[at_.row(1)]};
    answer();
    // 2. Outputs follow the maxima, and the values are added.
    if (__any_sync(kAllLanes, factor[0] != 1 || factor[1] != 1)) scale_rows(o, factor);
    const int stage = ptx::warp_uniform(m.stage);
    ptx::mbarrier_wait(address(shared_.full[stage][kRight]), m.parity);
    const Range valid{ptx::warp_uniform(m.valid_begin), ptx::warp_uniform(m.valid_end)};
    clear_unseen<kRight>(shared_, stage, valid);
    start_values<typename C::Element, kRight, 0>(shared_, stage, p, o);
    start_values<typename C::Element, kRight, 1>(shared_, stage, p, o);
    finish_values<kRight>(shared_, stage, at_, o);
  }

  __device__ __forceinline__ void answer() const {
    __syncwarp();
    ptx::mbarrier_arrive_if(address(shared_.message_empty), at_.lane == 0);
  }

  const Plan& plan_;
  Shared& shared_;
  const ThreadPlace at_;
  uint32_t phase_ = 0;  // of messages
};

}  // namespace blasst::cuda::decode::latent
