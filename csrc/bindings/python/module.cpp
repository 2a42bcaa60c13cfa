// The module `_C`: what was built and what this CPU can run. Needs no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/isa.h"

namespace memkernels {

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build and CPU information of memkernels.";
  m.attr("__version__") = MEMKERNELS_VERSION;
  m.def(
      "cpu_isa", [] { return std::string(name(cpu_isa())); },
      "The instruction set CPU kernels run with: the best one, or MEMKERNELS_CPU_ISA.");
  m.def(
      "cpu_isas",
      [] {
        std::vector<std::string> names;
        for (Isa isa : kAllIsas) {
          if (cpu_supports(isa)) names.emplace_back(name(isa));
        }
        return names;
      },
      "The instruction sets this CPU can run, from the baseline to the best.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = "GCC-compatible " __VERSION__;
        info["build_type"] = MEMKERNELS_BUILD_TYPE;
        const std::string cuda = MEMKERNELS_CUDA_VERSION;
        info["cuda"] = cuda.empty() ? py::object(py::none()) : py::str(cuda);
        info["cuda_reason"] = MEMKERNELS_CUDA_REASON;
        return info;
      },
      "Compiler, build type and CUDA version of this build; None: built without, for cuda_reason.");
}

}  // namespace memkernels
