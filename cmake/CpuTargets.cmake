# The instruction sets that the CPU kernels are built for, and an object for each of them and each
# storage type: two cores share the work, and a change to one kernel's header rebuilds in small pieces.

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  set(BLASST_ALL_CPU_TARGETS avx512_bf16 avx512_vnni avx512 avx2_vnni avx2 sse4)  # best first
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  # No SVE: kernels keep arrays of vectors, which those without a fixed size cannot be in.
  set(BLASST_ALL_CPU_TARGETS neon_dot neon)
else()
  message(FATAL_ERROR "There are no CPU kernels for ${CMAKE_SYSTEM_PROCESSOR}, only for x86_64 and aarch64")
endif()
set(BLASST_CPU_TARGETS all CACHE STRING
  "Instruction sets to build the CPU kernels for: all, native (the best that this machine runs), baseline (one that every machine runs), or a list of: ${BLASST_ALL_CPU_TARGETS}")

# Each one's target in Highway, what the kernels are told about it, and its storage types; for the
# others it has the kernels of its base. One that extends its base has the base's kernels but for what
# the difference matters to.
set(target_avx512_bf16 HWY_AVX3)
set(definition_avx512_bf16 BLASST_ISA_BF16_DOT BLASST_ISA_INT8_DOT)
set(types_avx512_bf16 bfloat16)
set(base_avx512_bf16 avx512_vnni)
set(target_avx512_vnni HWY_AVX3)
set(definition_avx512_vnni BLASST_ISA_INT8_DOT "BLASST_ISA_EXTENDS avx512")
set(types_avx512_vnni float32 float16 bfloat16)
set(base_avx512_vnni avx512)
set(target_avx512 HWY_AVX3)
set(target_avx2_vnni HWY_AVX2)
set(definition_avx2_vnni BLASST_ISA_INT8_DOT "BLASST_ISA_EXTENDS avx2")
set(types_avx2_vnni float32 float16 bfloat16)
set(base_avx2_vnni avx2)
set(target_avx2 HWY_AVX2)
set(target_sse4 HWY_SSE4)
set(target_neon_dot HWY_NEON)
set(definition_neon_dot BLASST_ISA_INT8_DOT "BLASST_ISA_EXTENDS neon")
set(types_neon_dot float32 float16 bfloat16)
set(base_neon_dot neon)
set(target_neon HWY_NEON_WITHOUT_AES)  # the kernels need no more
if(hwy_VERSION AND hwy_VERSION VERSION_LESS 1.0.5)
  set(target_neon HWY_NEON)  # there was one only
endif()

# The best instruction set of this machine, by the kernel's names for what processors have.
function(find_native_target result)
  set(needs_avx512_bf16 avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16)
  set(needs_avx512_vnni avx512f avx512bw avx512dq avx512vl avx512_vnni)
  set(needs_avx512 avx512f avx512bw avx512dq avx512vl)
  set(needs_avx2_vnni avx2 fma f16c bmi2 avx_vnni)
  set(needs_avx2 avx2 fma f16c bmi2)
  set(needs_sse4 sse4_1)
  set(needs_neon_dot asimd asimddp)
  set(needs_neon asimd)
  file(STRINGS /proc/cpuinfo flags REGEX "^(flags|Features)" LIMIT_COUNT 1)
  string(REPLACE " " ";" flags "${flags}")
  foreach(name ${BLASST_ALL_CPU_TARGETS})
    set(missing ${needs_${name}})
    list(REMOVE_ITEM missing ${flags})
    if(NOT missing)
      set(found ${name})
      while(base_${name})
        set(name ${base_${name}})
        list(APPEND found ${name})
      endwhile()
      set(${result} ${found} PARENT_SCOPE)
      return()
    endif()
  endforeach()
  message(FATAL_ERROR "BLASST_CPU_TARGETS is native, but this machine runs none of: ${BLASST_ALL_CPU_TARGETS}")
endfunction()

set(cpu_targets ${BLASST_CPU_TARGETS})
if(cpu_targets STREQUAL "all")
  set(cpu_targets ${BLASST_ALL_CPU_TARGETS})
elseif(cpu_targets STREQUAL "native")
  find_native_target(cpu_targets)
elseif(cpu_targets STREQUAL "baseline")
  list(GET BLASST_ALL_CPU_TARGETS -1 cpu_targets)
endif()
if(NOT cpu_targets)
  message(FATAL_ERROR "BLASST_CPU_TARGETS is empty; name at least one of: ${BLASST_ALL_CPU_TARGETS}")
endif()
foreach(name ${cpu_targets})
  if(NOT name IN_LIST BLASST_ALL_CPU_TARGETS)
    message(FATAL_ERROR "BLASST_CPU_TARGETS has '${name}'; on ${CMAKE_SYSTEM_PROCESSOR} it takes: "
      "all, native, baseline, ${BLASST_ALL_CPU_TARGETS}")
  endif()
  if(base_${name} AND NOT base_${name} IN_LIST cpu_targets)
    message(FATAL_ERROR "BLASST_CPU_TARGETS has ${name}, which needs ${base_${name}} beside it")
  endif()
endforeach()

set(cpu_kernel_sources "")
set(cpu_target_list "")
foreach(name ${BLASST_ALL_CPU_TARGETS})
  if(NOT name IN_LIST cpu_targets)
    continue()
  endif()
  string(APPEND cpu_target_list " \\\n  X(${name}, ${target_${name}}")
  foreach(type float32 float16 bfloat16)
    if(base_${name} AND NOT type IN_LIST types_${name})
      string(APPEND cpu_target_list ", ${base_${name}}::kernels_${type}")
      continue()
    endif()
    string(APPEND cpu_target_list ", ${name}::kernels_${type}")
    string(TOUPPER ${type} dtype)
    set(definitions ${definition_${name}}
      "BLASST_ISA ${name}" "BLASST_ISA_TARGET ${target_${name}}"
      "BLASST_ISA_DTYPE BLASST_${dtype}" "BLASST_ISA_KERNELS kernels_${type}")
    list(TRANSFORM definitions PREPEND "#define ")
    list(JOIN definitions "\n" definitions)
    set(source ${PROJECT_BINARY_DIR}/src/cpu/kernels_${name}_${type}.cc)
    file(CONFIGURE OUTPUT ${source} CONTENT "${definitions}\n#include \"cpu/kernels.cc\"\n")
    list(APPEND cpu_kernel_sources ${source})
  endforeach()
  string(APPEND cpu_target_list ")")
endforeach()
# Each has macros of its own.
set_source_files_properties(${cpu_kernel_sources} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/src/cpu/targets.h CONTENT
"// X(name, its target in Highway, its kernels for float32, float16, bfloat16) for each instruction
// set of this build, best first.
#define BLASST_CPU_TARGETS(X)${cpu_target_list}
")
