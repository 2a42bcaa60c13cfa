# The CUTLASS and CuTe headers of the nvidia-cutlass package, or of CUTLASS_ROOT.
#
# Defines the target Cutlass::Cutlass.

execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0])"
  OUTPUT_VARIABLE _cutlass_root
  OUTPUT_STRIP_TRAILING_WHITESPACE
  ERROR_QUIET)
find_path(
  Cutlass_INCLUDE_DIR cute/tensor.hpp
  HINTS "${CUTLASS_ROOT}/include" "$ENV{CUTLASS_ROOT}/include" "${_cutlass_root}/source/include"
  NO_DEFAULT_PATH)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  Cutlass
  REQUIRED_VARS Cutlass_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "pip install --no-deps nvidia-cutlass==4.2.0.0, or set CUTLASS_ROOT")

if(Cutlass_FOUND AND NOT TARGET Cutlass::Cutlass)
  add_library(Cutlass::Cutlass INTERFACE IMPORTED)
  target_include_directories(Cutlass::Cutlass SYSTEM INTERFACE "${Cutlass_INCLUDE_DIR}")
endif()
