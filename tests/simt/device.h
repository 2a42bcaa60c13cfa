// CUDA C++ for the host: what kernels, and csrc/core/cuda/device.cuh for them, call.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define threadIdx ::simt::thread_index
#define blockIdx ::simt::block_index
#define blockDim ::simt::block_size
#define gridDim ::simt::grid_size

#define SIMT_UNWATCHED __attribute__((no_sanitize("thread")))

namespace simt {

template <class T>
struct Shuffle {
  T value;
  int source;
  T result;
};

// What comes from a lane that takes no part is undefined: all bits set, a NaN.
template <class T>
inline T shuffle(const char* what, uint32_t mask, T value, int source, Site site) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "");
  Shuffle<T> mine{value, source, value};
  meet(
      what, mask, &mine,
      [](void* const* arguments, uint32_t lanes) {
        for (int l = 0; l < 32; ++l) {
          if (!(lanes >> l & 1)) continue;
          auto& to = *static_cast<Shuffle<T>*>(arguments[l]);
          if (lanes >> to.source & 1) {
            to.result = static_cast<Shuffle<T>*>(arguments[to.source])->value;
          } else {
            std::memset(&to.result, 0xff, sizeof(T));
          }
        }
      },
      false, site);
  return mine.result;
}

struct Vote {
  bool predicate;
  uint32_t ballot;
};

inline uint32_t vote(const char* what, uint32_t mask, bool predicate, Site site) {
  Vote mine{predicate, 0};
  meet(
      what, mask, &mine,
      [](void* const* arguments, uint32_t lanes) {
        uint32_t ballot = 0;
        for (int l = 0; l < 32; ++l) {
          if (lanes >> l & 1) ballot |= uint32_t{static_cast<Vote*>(arguments[l])->predicate} << l;
        }
        for (int l = 0; l < 32; ++l) {
          if (lanes >> l & 1) static_cast<Vote*>(arguments[l])->ballot = ballot;
        }
      },
      false, site);
  return mine.ballot;
}

struct Sum {
  unsigned operator()(unsigned x, unsigned y) const { return x + y; }
};
struct Least {
  unsigned operator()(unsigned x, unsigned y) const { return x < y ? x : y; }
};
struct Greatest {
  unsigned operator()(unsigned x, unsigned y) const { return x > y ? x : y; }
};

template <class Join>
inline unsigned reduce(const char* what, uint32_t mask, unsigned value, Site site) {
  meet(
      what, mask, &value,
      [](void* const* arguments, uint32_t lanes) {
        const int first = __builtin_ctz(lanes);
        unsigned result = *static_cast<unsigned*>(arguments[first]);
        for (int l = first + 1; l < 32; ++l) {
          if (lanes >> l & 1) result = Join()(result, *static_cast<unsigned*>(arguments[l]));
        }
        for (int l = 0; l < 32; ++l) {
          if (lanes >> l & 1) *static_cast<unsigned*>(arguments[l]) = result;
        }
      },
      false, site);
  return value;
}

template <class To, class From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

struct WidenBf16 {
  float operator()(uint32_t bits) const { return bits_as<float>(bits << 16); }
};
struct WidenF16 {
  float operator()(uint32_t bits) const {
    return static_cast<float>(bits_as<_Float16>(static_cast<uint16_t>(bits)));
  }
};
struct WidenTf32 {  // the last 13 bits are not read
  float operator()(uint32_t bits) const { return bits_as<float>(bits & ~0x1fffu); }
};

inline uint32_t round_bf16(float x) {
  const auto bits = bits_as<uint32_t>(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t round_f16(float x) { return bits_as<uint16_t>(static_cast<_Float16>(x)); }

template <int kMatrices, bool kTransposed>
inline void load_matrices(uint32_t* result, const void* row, Site site) {
  constexpr auto what = kTransposed ? "ldmatrix.trans" : "ldmatrix";
  if (lane() < 8 * kMatrices) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
      fail("%s at %s:%d: a row is not aligned to 16 bytes", what, site.file, site.line);
    }
    if (!in_shared(row, 16)) {
      fail("%s at %s:%d: a row outside shared memory", what, site.file, site.line);
    }
    if (simt_race_access) simt_race_access(row, 16, 0, what);
  }
  struct Load {
    const void* row;
    uint32_t* result;
  } mine{row, result};
  meet(
      what, ~0u, &mine,
      [](void* const* arguments, uint32_t) {
        for (int matrix = 0; matrix < kMatrices; ++matrix) {
          uint16_t rows[8][8];
          for (int i = 0; i < 8; ++i) {
            std::memcpy(rows[i], static_cast<Load*>(arguments[matrix * 8 + i])->row, 16);
          }
          for (int l = 0; l < 32; ++l) {
            const int i = l / 4, j = l % 4 * 2;
            const uint32_t low = kTransposed ? rows[j][i] : rows[i][j];
            const uint32_t high = kTransposed ? rows[j + 1][i] : rows[i][j + 1];
            static_cast<Load*>(arguments[l])->result[matrix] = low | high << 16;
          }
        }
      },
      true, site);
}

// c[16][8] += a[16][K] * b[K][8], in fragments of mma.sync; two elements a register, or one.
template <int kDepth, int kPerRegister, class Widen>
inline void multiply(const char* what, float* c, const uint32_t* a, const uint32_t* b, Widen,
                     Site site) {
  struct Operands {
    float* c;
    const uint32_t *a, *b;
  } mine{c, a, b};
  meet(
      what, ~0u, &mine,
      [](void* const* arguments, uint32_t) {
        float left[16][kDepth], right[kDepth][8];
        const auto element = [](uint32_t word, int e) {
          return Widen()(kPerRegister == 2 ? word >> 16 * e & 0xffff : word);
        };
        for (int l = 0; l < 32; ++l) {
          const auto& lane = *static_cast<Operands*>(arguments[l]);
          const int row = l / 4, first = l % 4 * kPerRegister;
          for (int e = 0; e < kPerRegister; ++e) {
            for (int i = 0; i < 4; ++i) {
              left[row + i % 2 * 8][first + i / 2 * 4 * kPerRegister + e] = element(lane.a[i], e);
            }
            for (int i = 0; i < 2; ++i) {
              right[first + i * 4 * kPerRegister + e][row] = element(lane.b[i], e);
            }
          }
        }
        float sums[16][8] = {};
        for (int row = 0; row < 16; ++row) {
          for (int k = 0; k < kDepth; ++k) {
            for (int column = 0; column < 8; ++column) {
              sums[row][column] += left[row][k] * right[k][column];
            }
          }
        }
        for (int l = 0; l < 32; ++l) {
          const auto& lane = *static_cast<Operands*>(arguments[l]);
          for (int i = 0; i < 4; ++i) lane.c[i] += sums[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
        }
      },
      true, site);
}

}  // namespace simt

inline void __syncthreads(SIMT_SITE) {
  simt::barrier(simt::kBlockBarrier, simt::kAllThreads, "__syncthreads", SIMT_HERE);
}
inline void __syncwarp(unsigned mask = ~0u, SIMT_SITE) {
  simt::meet("__syncwarp", mask, nullptr, [](void* const*, uint32_t) {}, false, SIMT_HERE);
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_SITE) {
  const int first = simt::lane() & ~(width - 1);
  return simt::shuffle("__shfl_sync", mask, value, first | (source & (width - 1)), SIMT_HERE);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const int l = simt::lane(), source = l - static_cast<int>(delta);
  return simt::shuffle("__shfl_up_sync", mask, value, source < (l & ~(width - 1)) ? l : source,
                       SIMT_HERE);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const int l = simt::lane(), source = l + static_cast<int>(delta);
  return simt::shuffle("__shfl_down_sync", mask, value, source > (l | (width - 1)) ? l : source,
                       SIMT_HERE);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_SITE) {
  const int l = simt::lane(), source = l ^ lanes;
  return simt::shuffle("__shfl_xor_sync", mask, value, source > (l | (width - 1)) ? l : source,
                       SIMT_HERE);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
  return simt::vote("__ballot_sync", mask, predicate != 0, SIMT_HERE);
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
  return simt::vote("__any_sync", mask, predicate != 0, SIMT_HERE) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
  return simt::vote("__all_sync", mask, predicate == 0, SIMT_HERE) == 0;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, SIMT_SITE) {
  return simt::reduce<simt::Sum>("__reduce_add_sync", mask, value, SIMT_HERE);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, SIMT_SITE) {
  return simt::reduce<simt::Least>("__reduce_min_sync", mask, value, SIMT_HERE);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, SIMT_SITE) {
  return simt::reduce<simt::Greatest>("__reduce_max_sync", mask, value, SIMT_HERE);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(x) * y >> 64);
}
template <class T>
SIMT_UNWATCHED inline T atomicAdd(T* p, T value) {
  const T old = *p;
  *p = old + value;
  return old;
}
template <class T>
SIMT_UNWATCHED inline T atomicMax(T* p, T value) {
  const T old = *p;
  if (old < value) *p = value;
  return old;
}
inline void __threadfence() {}
