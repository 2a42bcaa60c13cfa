# cmake -DNM=nm -DOBJECTS=a.o,b.o -P check_weak_symbols.cmake
#
# Objects compiled for one instruction set must not define weak symbols: the linker keeps one copy
# of each, and an AVX-512 one would then serve an older CPU.

string(REPLACE "," ";" _objects "${OBJECTS}")
execute_process(
  COMMAND "${NM}" --defined-only -C ${_objects}
  OUTPUT_VARIABLE _symbols
  COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]* [uvVwW] [^\n]*" _weak "${_symbols}")
if(_weak)
  string(REPLACE ";" "\n" _weak "${_weak}")
  message(FATAL_ERROR "weak symbols in files compiled for one instruction set:\n${_weak}")
endif()
