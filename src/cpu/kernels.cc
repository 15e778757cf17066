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

#if defined(BLASST_ISA_BF16_DOT)
#define BLASST_ISA_ATTRIBUTES HWY_TARGET_STR ",avx512bf16,avx512vnni"
#elif defined(BLASST_ISA_INT8_DOT) && HWY_TARGET == HWY_AVX3
#define BLASST_ISA_ATTRIBUTES HWY_TARGET_STR ",avx512vnni"
#elif defined(BLASST_ISA_INT8_DOT) && HWY_TARGET == HWY_AVX2
#define BLASST_ISA_ATTRIBUTES HWY_TARGET_STR ",avxvnni"
#elif defined(BLASST_ISA_INT8_DOT) && HWY_COMPILER_CLANG
#define BLASST_ISA_ATTRIBUTES HWY_TARGET_STR "+dotprod"
#elif defined(BLASST_ISA_INT8_DOT)  // GCC inlines the dot product into functions of this or later
#define BLASST_ISA_ATTRIBUTES "arch=armv8.2-a" HWY_TARGET_STR "+dotprod"
#endif
#ifdef BLASST_ISA_ATTRIBUTES
#define BLASST_BEFORE_NAMESPACE() HWY_PUSH_ATTRIBUTES(BLASST_ISA_ATTRIBUTES)
#else
#define BLASST_BEFORE_NAMESPACE() HWY_BEFORE_NAMESPACE()
#endif

#include "cpu/prefill/walk-inl.h"
#ifndef BLASST_ISA_EXTENDS
#include "cpu/backward/rows-inl.h"
#include "cpu/backward/walk-inl.h"
#include "cpu/chunks/rows-inl.h"
#include "cpu/decode/walk-inl.h"
#include "cpu/int8/quantize-inl.h"
#endif

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

#ifdef BLASST_ISA_EXTENDS
Kernels BLASST_ISA_KERNELS() {
  Kernels kernels = BLASST_ISA_EXTENDS::BLASST_ISA_KERNELS();
  kernels.int8.prefill = &PrefillInt8<Int8<BLASST_ISA_DTYPE>, Arithmetic<BLASST_ISA_DTYPE>>;
  return kernels;
}
#else
Kernels BLASST_ISA_KERNELS() {
  using A = Arithmetic<BLASST_ISA_DTYPE>;
  // Backward keeps probabilities and their gradients in float32.
  using Stored = Float32<BLASST_ISA_DTYPE>;
  return {&Prefill<A, A>,
          &DecodeSeeds<A, A>,
          &Decode<A, A>,
          &Combine,
          &BackwardRows<Stored>,
          &Backward<Stored>,
          &BackwardFinish<Stored>,
          AllChunkKernels<BLASST_ISA_DTYPE>(),
          {&MeanKey, &QuantizeKeys, &PrefillInt8<Int8<BLASST_ISA_DTYPE>, A>}};
}
#endif

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#endif
