// The kernels of one instruction set, BLASST_ISA, for one storage type, BLASST_ISA_DTYPE: compiled
// once for each pair, which cmake/CpuTargets.cmake lists.
#include "cpu/isa.h"

// Highway also goes through this file for the least that every processor of the kind has; there is
// nothing here for it.
#define HWY_DISABLED_TARGETS ~(BLASST_ISA_TARGET | HWY_SCALAR | HWY_EMU128)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/kernels.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#if HWY_TARGET == BLASST_ISA_TARGET

#ifdef BLASST_ISA_BF16_DOT
#define BLASST_BEFORE_NAMESPACE() HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512bf16")
#else
#define BLASST_BEFORE_NAMESPACE() HWY_BEFORE_NAMESPACE()
#endif

#include "cpu/backward/rows-inl.h"
#include "cpu/backward/walk-inl.h"
#include "cpu/chunks/rows-inl.h"
#include "cpu/decode/walk-inl.h"
#include "cpu/prefill/walk-inl.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

Kernels BLASST_ISA_KERNELS() {
  using A = Arithmetic<BLASST_ISA_DTYPE>;
  // Backward keeps probabilities and their gradients in float32.
  using Stored = Float32<BLASST_ISA_DTYPE>;
  return {&Prefill<A, A>,          &DecodeSeeds<A, A>,
          &Decode<A, A>,           &Combine,
          &BackwardRows<Stored>,   &Backward<Stored>,
          &BackwardFinish<Stored>, AllChunkKernels<BLASST_ISA_DTYPE>()};
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
