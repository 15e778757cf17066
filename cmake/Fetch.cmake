# Sources of libraries, fetched with pip; cmake/fetch.py pins them. Their licences go into a wheel.
set(BLASST_FETCHED ${PROJECT_BINARY_DIR} CACHE PATH
  "Where fetched libraries are kept: the build folder, or one that several share")
function(fetch_library name result)
  set(folder ${BLASST_FETCHED}/${name})
  if(NOT EXISTS ${folder}/.complete OR NOT EXISTS ${folder}/LICENSE)
    if(NOT Python_EXECUTABLE AND EXISTS ${PROJECT_SOURCE_DIR}/.venv/bin/python)
      set(Python_EXECUTABLE ${PROJECT_SOURCE_DIR}/.venv/bin/python)
    endif()
    find_package(Python 3.11 REQUIRED COMPONENTS Interpreter)
    message(STATUS "Fetching ${name}")
    execute_process(
      COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/fetch.py ${name} ${folder}
      RESULT_VARIABLE failed ERROR_VARIABLE said)
    if(failed)
      message(FATAL_ERROR "${name} could not be fetched with ${Python_EXECUTABLE} -m pip. ${ARGN}\n${said}")
    endif()
    file(TOUCH ${folder}/.complete)
  endif()
  set(${result} ${folder} PARENT_SCOPE)
  install(FILES ${folder}/LICENSE RENAME ${name}.txt
    DESTINATION blasst/licenses COMPONENT python EXCLUDE_FROM_ALL)
endfunction()

# A library of headers as a target: the system's where CMake finds it, else what is fetched.
function(use_headers package version target)
  find_package(${package} QUIET)
  if(NOT TARGET ${target})
    fetch_library(${package}-${version} headers
      "Or install its development files, and say where with ${package}_DIR.")
    add_library(${target} INTERFACE IMPORTED)
    target_include_directories(${target} SYSTEM INTERFACE ${headers})
  endif()
endfunction()
