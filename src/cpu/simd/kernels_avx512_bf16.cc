// The bfloat16 kernels for processors with a bfloat16 dot product (AVX512_BF16).
#include <cstdint>

#include "cpu/isa.h"

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX2 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/simd/kernels_avx512_bf16.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

// The baseline target is compiled too; it has nothing to add.
#if HWY_TARGET == HWY_AVX3
#undef BLASST_ISA
#undef BLASST_BEFORE_NAMESPACE
#define BLASST_ISA N_AVX512_BF16
#define BLASST_ISA_BF16_DOT 1
#define BLASST_BEFORE_NAMESPACE() HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512bf16")
#include "cpu/simd/backward-inl.h"
#include "cpu/simd/chunks-inl.h"
#include "cpu/simd/decode-inl.h"
#include "cpu/simd/prefill-inl.h"

BLASST_BEFORE_NAMESPACE();
namespace blasst::cpu {

Kernels avx512_bf16_kernels() {
  using namespace N_AVX512_BF16;
  // Backward keeps probabilities and their gradients in float32.
  using Stored = Float32<BLASST_BFLOAT16>;
  return {&Prefill<BFloat16Dot>,   &DecodeSeeds<BFloat16Dot>,
          &Decode<BFloat16Dot>,    &Combine,
          &BackwardDelta<Stored>,  &Backward<Stored>,
          &BackwardFinish<Stored>, AllChunkKernels<BLASST_BFLOAT16>()};
}

}  // namespace blasst::cpu
HWY_AFTER_NAMESPACE();
#endif
