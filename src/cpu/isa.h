// The instruction sets that kernels are compiled for, and the choice among them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace blasst::cpu {

// The float32 kernels of one Highway target, and the targets they were compiled for, best first.
KernelTable kernels_for(int64_t target);
std::vector<int64_t> compiled_targets();

// Bfloat16 by AVX512_BF16; only in builds for x86-64.
Kernels avx512_bf16_kernels();

// Kernels of the instruction set in use.
const Kernels& kernels(DType dtype);

}  // namespace blasst::cpu
