#include "cpu/isa.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <atomic>
#include <cstdlib>
#include <mutex>

#include "blasst/blasst.hpp"
#include "hwy/targets.h"

namespace blasst {
namespace cpu {
namespace {

struct Isa {
  std::string name;
  KernelTable table;
};

std::string target_name(int64_t target) {
  if (target == HWY_AVX3) return "avx512";
  if (target == HWY_AVX2) return "avx2";
  if (target == HWY_SSE4) return "sse4";
  std::string name = hwy::TargetName(target);
  for (char& c : name) c = static_cast<char>(std::tolower(c));
  return name;
}

// What this build has and this machine can run, best first.
std::vector<Isa> find_isas() {
  std::vector<Isa> isas;
  const int64_t supported = hwy::SupportedTargets();
  for (const int64_t target : compiled_targets()) {
    if (!(supported & target)) continue;
    isas.push_back({target_name(target), kernels_for(target)});
#if defined(__x86_64__)
    if (target == HWY_AVX3 && __builtin_cpu_supports("avx512bf16")) {
      Isa bf16{"avx512_bf16", isas.back().table};
      bf16.table[BLASST_BFLOAT16] = avx512_bf16_kernels();
      // Intel's processors take longer for these dot products than for float32's multiply-adds.
      isas.insert(isas.end() - !__builtin_cpu_is("intel"), bf16);
    }
#endif
  }
  return isas;
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = find_isas();
  return all;
}

const Isa* find(const std::string& name) {
  for (const Isa& isa : isas()) {
    if (isa.name == name) return &isa;
  }
  throw Error(BLASST_INVALID_ARGUMENT,
              fmt::format("instruction set '{}' is not available; this machine and build have: {}",
                          name, fmt::join(cpu_isas(), ", ")));
}

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa = [] {
    const char* name = std::getenv("BLASST_CPU_ISA");
    return name && *name ? find(name) : &isas().front();
  }();
  return isa;
}

}  // namespace

const Kernels& kernels(DType dtype) { return chosen().load()->table[dtype]; }

}  // namespace cpu

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const auto& isa : cpu::isas()) names.push_back(isa.name);
  return names;
}

std::string cpu_isa() { return cpu::chosen().load()->name; }

void set_cpu_isa(const std::string& name) { cpu::chosen() = cpu::find(name); }

}  // namespace blasst
