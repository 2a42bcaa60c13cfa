# The ABI-stable part of PyTorch: headers, and the C shim in libtorch_cpu, of the torch package that
# Python imports. No path to torch goes into the binary: importing torch first is what resolves it.
#
# Defines the target StableTorch::StableTorch.

execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
  OUTPUT_VARIABLE _torch_root
  OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE _torch_missing
  ERROR_QUIET)
if(NOT _torch_missing)
  find_path(
    StableTorch_INCLUDE_DIR torch/csrc/stable/library.h
    HINTS "${_torch_root}/include"
    NO_DEFAULT_PATH)
  find_library(
    StableTorch_LIBRARY torch_cpu
    HINTS "${_torch_root}/lib"
    NO_DEFAULT_PATH)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  StableTorch
  REQUIRED_VARS StableTorch_INCLUDE_DIR StableTorch_LIBRARY
  REASON_FAILURE_MESSAGE "no torch package with torch/csrc/stable/library.h (2.10 or newer)")

if(StableTorch_FOUND AND NOT TARGET StableTorch::StableTorch)
  add_library(StableTorch::StableTorch SHARED IMPORTED)
  set_target_properties(StableTorch::StableTorch PROPERTIES IMPORTED_LOCATION
                                                            "${StableTorch_LIBRARY}")
  target_include_directories(StableTorch::StableTorch SYSTEM INTERFACE "${StableTorch_INCLUDE_DIR}")
  # Only what torch 2.10 has; newer releases keep it.
  target_compile_definitions(StableTorch::StableTorch
                             INTERFACE TORCH_TARGET_VERSION=0x020a000000000000ULL)
endif()
