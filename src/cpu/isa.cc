#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <string_view>
#include <utility>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "blasst/blasst.hpp"
#include "hwy/targets.h"
#include "problem/text.h"

namespace blasst::cpu {
namespace {

struct Isa {
  std::string name;
  KernelTable table;
};

#if defined(__x86_64__)
// Clang 14 compiles for AVX-VNNI, but does not know its name in __builtin_cpu_supports.
bool has_avx_vnni() {
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
}
#endif

bool runs_here(std::string_view name, int64_t target) {
  if (!(hwy::SupportedTargets() & target)) return false;
#if defined(__x86_64__)
  if (name == "avx512_bf16")
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (name == "avx512_vnni") return __builtin_cpu_supports("avx512vnni");
  if (name == "avx2_vnni") return has_avx_vnni();
#elif defined(__aarch64__)
  if (name == "neon_dot") return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
  return true;
}

// What this build has and this machine can run, best first.
std::vector<Isa> find_isas() {
  std::vector<Isa> isas;
  std::string built;
#define BLASST_ADD(name, target, float32, float16, bfloat16) \
  built += built.empty() ? #name : ", " #name;               \
  if (runs_here(#name, target)) isas.push_back({#name, {float32(), float16(), bfloat16()}});
  BLASST_CPU_TARGETS(BLASST_ADD)
#undef BLASST_ADD
  if (isas.empty())
    throw Error(
        BLASST_UNSUPPORTED,
        formatted("this machine runs none of the instruction sets of this build: {}", built));
#if defined(__x86_64__)
  // Intel's processors take longer for bfloat16 dot products than for float32's multiply-adds.
  if (isas.front().name == "avx512_bf16" && __builtin_cpu_is("intel")) std::swap(isas[0], isas[1]);
#endif
  return isas;
}

// Found at the first use, without a lock, which a fork might leave locked in the child.
const std::vector<Isa>& isas() {
  static constinit std::atomic<const std::vector<Isa>*> all = nullptr;
  if (const auto* found = all.load()) return *found;
  auto found = std::make_unique<const std::vector<Isa>>(find_isas());
  const std::vector<Isa>* first = nullptr;
  if (all.compare_exchange_strong(first, found.get())) return *found.release();
  return *first;
}

const Isa* find(const std::string& name) {
  for (const Isa& isa : isas()) {
    if (isa.name == name) return &isa;
  }
  throw Error(BLASST_INVALID_ARGUMENT,
              formatted("instruction set '{}' is not available; this machine and build have: {}",
                        name, join(isa_names(), ", ")));
}

constinit std::atomic<const Isa*> chosen = nullptr;

const Isa& isa_in_use() {
  if (const Isa* isa = chosen) return *isa;
  const char* name = std::getenv("BLASST_CPU_ISA");
  const Isa* isa = name && *name ? find(name) : &isas().front();
  const Isa* first = nullptr;
  return chosen.compare_exchange_strong(first, isa) ? *isa : *first;
}

}  // namespace

const Kernels& kernels(DType dtype) { return isa_in_use().table[dtype]; }

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.push_back(isa.name);
  return names;
}

const std::string& isa_name() { return isa_in_use().name; }

void set_isa(const std::string& name) { chosen = find(name); }

}  // namespace blasst::cpu
