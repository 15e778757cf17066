# Highway, as the target `highway`. What is fetched is linked statically, so that nothing but the
# library itself is needed to run.
set(BLASST_HIGHWAY fetch CACHE STRING
  "Highway: fetch (pinned, with pip, into the build folder), system (by pkg-config), or the path of its sources")

if(BLASST_HIGHWAY STREQUAL "system")
  find_package(PkgConfig REQUIRED)
  pkg_check_modules(hwy REQUIRED IMPORTED_TARGET libhwy>=1.0.3)
  add_library(highway INTERFACE)
  target_link_libraries(highway INTERFACE PkgConfig::hwy)
  return()
endif()

set(highway_source ${BLASST_HIGHWAY})
if(BLASST_HIGHWAY STREQUAL "fetch")
  fetch_library(highway-1.3.0 highway_source
    "BLASST_HIGHWAY may be 'system' (needs libhwy's development files), or the path of Highway's sources.")
endif()
get_filename_component(highway_source ${highway_source} ABSOLUTE BASE_DIR ${PROJECT_SOURCE_DIR})
if(NOT EXISTS ${highway_source}/hwy/targets.cc)
  message(FATAL_ERROR "BLASST_HIGHWAY is '${BLASST_HIGHWAY}': neither fetch nor system, and "
    "${highway_source}/hwy/targets.cc does not exist")
endif()

# Only what finds out which instruction sets the processor has, and what reports a failed check.
set(highway_sources ${highway_source}/hwy/targets.cc)
if(EXISTS ${highway_source}/hwy/abort.cc)
  list(APPEND highway_sources ${highway_source}/hwy/abort.cc)
endif()
add_library(highway STATIC EXCLUDE_FROM_ALL ${highway_sources})
target_include_directories(highway SYSTEM PUBLIC ${highway_source})
target_compile_definitions(highway PUBLIC HWY_STATIC_DEFINE)
set_target_properties(highway PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
