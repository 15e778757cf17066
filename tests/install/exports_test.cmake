# The library shows its interface and nothing of what is linked into it.
execute_process(COMMAND ${NM} --dynamic --defined-only --format=posix ${LIBRARY}
  OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]+" symbols "${symbols}")
list(FILTER symbols EXCLUDE REGEX "^(blasst_|_ZNK?6blasst)")
if(symbols)
  list(JOIN symbols "\n  " symbols)
  message(FATAL_ERROR "${LIBRARY} also shows:\n  ${symbols}")
endif()
