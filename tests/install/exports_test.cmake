# The library shows the C interface and nothing of what is linked into it.
execute_process(COMMAND ${NM} --dynamic --defined-only --format=posix ${LIBRARY}
  OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]+" symbols "${symbols}")
list(FILTER symbols EXCLUDE REGEX "^blasst_[a-z0-9_]+ T ")
if(symbols)
  list(JOIN symbols "\n  " symbols)
  message(FATAL_ERROR "${LIBRARY} also shows:\n  ${symbols}")
endif()
