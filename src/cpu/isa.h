// The instruction sets that kernels are compiled for, and the choice among them.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/targets.h"

namespace blasst::cpu {

// The kernels of each, in objects of their own.
#define BLASST_DECLARE_KERNELS(name, target, float32, float16, bfloat16) \
  namespace name {                                                       \
  Kernels kernels_float32();                                             \
  Kernels kernels_float16();                                             \
  Kernels kernels_bfloat16();                                            \
  }
BLASST_CPU_TARGETS(BLASST_DECLARE_KERNELS)
#undef BLASST_DECLARE_KERNELS

// Instruction sets with kernels that this machine has, best first, and the one in use: the first,
// unless the environment variable BLASST_CPU_ISA or set_isa names another.
std::vector<std::string> isa_names();
const std::string& isa_name();
void set_isa(const std::string& name);  // Error if it is not in isa_names()

// Kernels of the instruction set in use.
const Kernels& kernels(DType dtype);

}  // namespace blasst::cpu
