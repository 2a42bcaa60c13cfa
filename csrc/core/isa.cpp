#include "core/isa.h"

#include <cstdlib>
#include <cstring>

#include "core/check.h"

namespace memkernels {

const char* name(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return "baseline";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
  }
  return "?";
}

bool cpu_supports(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return isa == Isa::baseline;
#endif
}

namespace {

Isa choose() {
  const char* wanted = std::getenv("MEMKERNELS_CPU_ISA");
  Isa best = Isa::baseline;
  for (Isa isa : kAllIsas) {
    if (cpu_supports(isa)) best = isa;
  }
  if (wanted == nullptr || *wanted == '\0') return best;
  for (Isa isa : kAllIsas) {
    if (std::strcmp(wanted, name(isa)) != 0) continue;
    check(cpu_supports(isa), "memkernels", "MEMKERNELS_CPU_ISA=", wanted,
          " is not supported by this CPU; the best it has is ", name(best));
    return isa;
  }
  fail("memkernels", "MEMKERNELS_CPU_ISA must be baseline, avx2, avx512 or avx512_bf16, got ",
       wanted);
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose();
  return isa;
}

Isa isa_for(Dtype dtype) { return dtype == Dtype::f64 ? Isa::baseline : cpu_isa(); }

}  // namespace memkernels
