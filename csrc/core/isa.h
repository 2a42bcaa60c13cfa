// The instruction sets CPU kernels are compiled for, and the choice made at load.
#pragma once

#include "core/tensor.h"

namespace memkernels {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

inline constexpr Isa kAllIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

const char* name(Isa isa);
bool cpu_supports(Isa isa);
// The best supported one, or the one named by MEMKERNELS_CPU_ISA (read once); raises Error if
// that names none, or one this CPU cannot run.
Isa cpu_isa();
// What kernels of a dtype are compiled for: float64 has none but those of the baseline.
Isa isa_for(Dtype dtype);

}  // namespace memkernels

// Declares `result name args` once per instruction set, each in a namespace of its own.
#if defined(__x86_64__)
#define MEMKERNELS_DECLARE_CPU(result, name, args) \
  namespace cpu::baseline {                        \
  result name args;                                \
  }                                                \
  namespace cpu::avx2 {                            \
  result name args;                                \
  }                                                \
  namespace cpu::avx512 {                          \
  result name args;                                \
  }                                                \
  namespace cpu::avx512_bf16 {                     \
  result name args;                                \
  }
// The function of that name for the given instruction set.
#define MEMKERNELS_CPU(isa, name)                     \
  ((isa) == Isa::avx512_bf16 ? cpu::avx512_bf16::name \
   : (isa) == Isa::avx512    ? cpu::avx512::name      \
   : (isa) == Isa::avx2      ? cpu::avx2::name        \
                             : cpu::baseline::name)
#else
#define MEMKERNELS_DECLARE_CPU(result, name, args) \
  namespace cpu::baseline {                        \
  result name args;                                \
  }
#define MEMKERNELS_CPU(isa, name) ((void)(isa), cpu::baseline::name)
#endif
