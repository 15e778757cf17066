# Machine codes of kernels that have instructions of compute capability 8.0 alone: all come from one
# run of the compiler's front, which takes twice as long as the assembler does for one of them.

# Options of nvcc for a list as CMAKE_CUDA_ARCHITECTURES takes it, of numbers.
function(cuda_codes_of_80 architectures result)
  set(of_80)
  set(options)
  foreach(architecture ${architectures})
    if(NOT architecture MATCHES "^([0-9]+)(-real|-virtual)?$" OR CMAKE_MATCH_1 LESS 80)
      message(FATAL_ERROR "BLASST_CUDA_ARCHITECTURES has ${architecture}; it must be a list of numbers "
        "from 80 on, each with or without -real or -virtual (80-real;90-real;80-virtual)")
    endif()
    if(NOT CMAKE_MATCH_2 STREQUAL "-virtual")
      list(APPEND of_80 sm_${CMAKE_MATCH_1})
    endif()
    if(NOT CMAKE_MATCH_2 STREQUAL "-real")
      if(CMAKE_MATCH_1 EQUAL 80)
        list(APPEND of_80 compute_80)
      else()
        list(APPEND options
          "--generate-code=arch=compute_${CMAKE_MATCH_1},code=[compute_${CMAKE_MATCH_1}]")
      endif()
    endif()
  endforeach()
  if(of_80)
    list(JOIN of_80 "," of_80)
    list(PREPEND options "--generate-code=arch=compute_80,code=[${of_80}]")
  endif()
  set(${result} "${options}" PARENT_SCOPE)
endfunction()

# The numbers of a list that machine code is made for.
function(cuda_machine_codes architectures result)
  list(FILTER architectures EXCLUDE REGEX "-virtual$")
  list(TRANSFORM architectures REPLACE "-real$" "")
  list(REMOVE_DUPLICATES architectures)
  set(${result} "${architectures}" PARENT_SCOPE)
endfunction()
