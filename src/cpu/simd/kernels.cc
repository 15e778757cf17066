// The float32 kernels, compiled once for each instruction set, and the choice among them at run
// time.
#include <cstdint>
#include <vector>

#include "cpu/isa.h"

// On x86-64 SSE4.1 is the least.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/simd/kernels.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#undef BLASST_ISA
#undef BLASST_BEFORE_NAMESPACE
#define BLASST_ISA HWY_NAMESPACE
#define BLASST_BEFORE_NAMESPACE() HWY_BEFORE_NAMESPACE()
#if HWY_TARGET != HWY_SCALAR
#include "cpu/simd/backward-inl.h"
#include "cpu/simd/chunks-inl.h"
#include "cpu/simd/decode-inl.h"
#include "cpu/simd/prefill-inl.h"
#endif

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu::BLASST_ISA {

#if HWY_TARGET != HWY_SCALAR
template <typename A>
Kernels AllKernels() {
  return {&Prefill<A>,       &DecodeSeeds<A>, &Decode<A>,         &Combine,
          &BackwardDelta<A>, &Backward<A>,    &BackwardFinish<A>, AllChunkKernels<A::kDType>()};
}
#endif

KernelTable Table() {
#if HWY_TARGET == HWY_SCALAR
  return {};  // Highway's fall-back on x86-64; compiled_targets leaves it out
#else
  return {AllKernels<Float32<BLASST_FLOAT32>>(), AllKernels<Float32<BLASST_FLOAT16>>(),
          AllKernels<Float32<BLASST_BFLOAT16>>()};
#endif
}

}  // namespace blasst::cpu::BLASST_ISA
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace blasst::cpu {

HWY_EXPORT(Table);

KernelTable kernels_for(int64_t target) {
  hwy::SetSupportedTargetsForTest(target);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  const KernelTable table = HWY_DYNAMIC_DISPATCH(Table)();
  hwy::SetSupportedTargetsForTest(0);
  return table;
}

std::vector<int64_t> compiled_targets() {
  std::vector<int64_t> targets;
  for (int64_t bit = 1; bit > 0 && bit <= HWY_TARGETS; bit <<= 1) {
    if (HWY_TARGETS & ~HWY_SCALAR & bit)
      targets.push_back(bit);  // Highway numbers better targets lower
  }
  return targets;
}

}  // namespace blasst::cpu
#endif
