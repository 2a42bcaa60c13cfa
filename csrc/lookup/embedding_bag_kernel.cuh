// out[t] = sum over k of factor[t, k] * table[input[t, k]], and for the gradient of the factors
// out[t, k] = grad[t] . table[input[t, k]], where a row of bytes is its elements times the scales
// of their blocks.
//
// Groups of 4 to 32 lanes take a chunk of 16 bytes each of a row, eight rows of a bag at once,
// whose indices came while the rows before were on their way.
//
// Cost: every row of every bag is read once, entries * D elements, 2 flops each: bound by memory.
// 96 KB are on their way to each multiprocessor of an H200, 64 KB of rows of bytes, at least twice
// what its bandwidth asks for, so that 90 % of that of a copy is expected, from rows of 64 bytes
// on; of rows of bytes, whose 4 to 6 instructions an element come close to what it issues, 85 %.
// Rows that are not aligned to 16 bytes are read element by element, for half of that. A table in
// the host's memory is bound by the link.
#pragma once

#include <type_traits>

#include "core/cuda/device.cuh"
#include "lookup/embedding_bag_cuda.h"

namespace memkernels::lookup::cuda {

struct e4m3 {
  uint8_t bits;
};

template <class R>
constexpr bool kQuantised = sizeof(R) == 1;

// Blocks on a multiprocessor, as the registers for a chunk allow.
template <class R>
constexpr int kBlocksOf = kQuantised<R> ? 2 : 3;

// The dtype of sums of rows.
template <class R>
using Sum = std::conditional_t<kQuantised<R>, float, R>;

// ---- chunks of rows ----

template <int kBytes>
struct BitsOf {
  using Type = uint32_t;
};
template <>
struct BitsOf<2> {
  using Type = uint16_t;
};
template <>
struct BitsOf<1> {
  using Type = uint8_t;
};

// Neighbouring elements of a row: one, or as many as make 16 bytes.
template <class R, int kElements>
struct alignas(kElements > 1 ? 16 : 4) RowChunk {
  uint32_t words[kElements > 1 ? kElements * sizeof(R) / 4 : 1];
};

template <class R, int kElements>
__device__ __forceinline__ RowChunk<R, kElements> load_chunk(const R* from) {
  if constexpr (kElements > 1) {
    return *reinterpret_cast<const RowChunk<R, kElements>*>(from);
  } else {
    return {{*reinterpret_cast<const typename BitsOf<sizeof(R)>::Type*>(from)}};
  }
}

// Element i of a word.
__device__ __forceinline__ float element(float, uint32_t word, int) { return bits_to_float(word); }
__device__ __forceinline__ float element(bf16, uint32_t word, int i) {
  return bits_to_float(i == 0 ? word << 16 : word & 0xffff0000u);
}
__device__ __forceinline__ float element(f16, uint32_t word, int i) {
  return widen(f16{static_cast<uint16_t>(word >> 16 * i)});
}
// Conversions of integers are slow; these bits are of 2 ** 23 + 128 + x.
__device__ __forceinline__ float element(int8_t, uint32_t word, int i) {
  const uint32_t from_0 = (word ^ 0x80808080u) >> 8 * i & 0xff;
  return bits_to_float(from_0 | 0x4b000000u) - 8388736.f;
}
// Without NaN. The exponent's bias goes from 7 to 127.
__device__ __forceinline__ float element(e4m3, uint32_t word, int i) {
  const int32_t first = static_cast<int32_t>(word << (24 - 8 * i));
  return bits_to_float(static_cast<uint32_t>(first >> 4) & 0x87f00000u) * 0x1p120f;
}

template <class R, int kElements>
__device__ __forceinline__ void widen_chunk(const RowChunk<R, kElements>& chunk,
                                            float (&x)[kElements]) {
  constexpr int kOfWord = kElements > 1 ? 4 / sizeof(R) : 1;
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    x[e] = element(R(), chunk.words[e / kOfWord], e % kOfWord);
  }
  if constexpr (std::is_same_v<R, e4m3>) {
    // All seven bits set; the upper one of the sum tells.
    const auto nans = [](uint32_t word) { return (word & 0x7f7f7f7fu) + 0x01010101u; };
    uint32_t any = 0;
#pragma unroll
    for (int e = 0; e < kElements; e += kOfWord) any |= nans(chunk.words[e / kOfWord]);
    if (any & 0x80808080u) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        if (nans(chunk.words[e / kOfWord]) >> (e % kOfWord * 8 + 7) & 1) {
          x[e] = bits_to_float(0x7fc00000u);
        }
      }
    }
  }
}

template <class T, int kElements>
__device__ __forceinline__ void load_elements(const T* from, float (&x)[kElements]) {
  constexpr int kOfLoad = kElements > 1 ? 16 / sizeof(T) : 1;
#pragma unroll
  for (int first = 0; first < kElements; first += kOfLoad) {
    float some[kOfLoad];
    widen_chunk(load_chunk<T, kOfLoad>(from + first), some);
#pragma unroll
    for (int e = 0; e < kOfLoad; ++e) x[first + e] = some[e];
  }
}

template <class T, int kElements>
__device__ __forceinline__ void store_elements(T* to, const float (&x)[kElements]) {
  if constexpr (kElements == 1) {
    narrow(x[0], *to);
  } else {
    constexpr int kOfStore = 16 / sizeof(T);
#pragma unroll
    for (int first = 0; first < kElements; first += kOfStore) {
      RowChunk<T, kOfStore> chunk;
#pragma unroll
      for (int e = 0; e < kOfStore; e += 2) {
        store_pair(reinterpret_cast<T*>(&chunk) + e, x[first + e], x[first + e + 1]);
      }
      *reinterpret_cast<RowChunk<T, kOfStore>*>(to + first) = chunk;
    }
  }
}

// What the elements of a chunk are multiplied with, as it is stored.
__device__ __forceinline__ uint32_t load_scale(const BagParams& p, int64_t row, int block) {
  const int64_t at = row * p.scale_row_stride + block * p.scale_stride;
  return p.e8m0 ? static_cast<const uint8_t*>(p.scales)[at]
                : static_cast<const uint32_t*>(p.scales)[at];
}
__device__ __forceinline__ float scale_of(const BagParams& p, uint32_t stored) {
  const uint32_t bits = stored == 255 ? 0x7fc00000u : stored == 0 ? 0x400000u : stored << 23;
  return bits_to_float(p.e8m0 ? bits : stored);
}

// What a thread has asked for: its chunks of kRowsAtOnce rows. They are taken in the order in which
// they are asked for, and another is asked for in the place of one that was taken, or passed over.
template <class R, int kElements>
struct Rows {
  // Chunks of 16 bytes wait in shared memory, so that they take no registers.
  __host__ __device__ static __forceinline__ int shared_bytes(int threads) {
    return kElements > 1 ? kRowsAtOnce * threads * 16 : 0;
  }
  RowChunk<R, 1> chunks[kElements > 1 ? 1 : kRowsAtOnce];
  uint32_t scales[kQuantised<R> ? kRowsAtOnce : 1];

  static __device__ __forceinline__ RowChunk<R, kElements>* place(int i) {
    return reinterpret_cast<RowChunk<R, kElements>*>(shared_memory()) + i * blockDim.x +
           threadIdx.x;
  }

  // `row` is -1 where there is none: zeros.
  __device__ __forceinline__ void ask(const BagParams& p, int i, int64_t row, int column) {
    const bool used = row >= 0 && column < p.dim;
    const R* const from = static_cast<const R*>(p.table) + (used ? row * p.row_stride + column : 0);
    if constexpr (kElements > 1) {
      copy_async_16(place(i), from, used ? 16 : 0);
      commit_copies();
    } else {
      chunks[i] = {};
      if (used) chunks[i] = load_chunk<R, 1>(from);
    }
    if constexpr (kQuantised<R>) {
      scales[i] = 0;
      if (used) scales[i] = load_scale(p, row, column / p.scale_block);
    }
  }

  __device__ __forceinline__ void pass() {
    if constexpr (kElements > 1) commit_copies();
  }

  // Returns what the elements are to be multiplied with.
  __device__ __forceinline__ float take(const BagParams& p, int i, float (&x)[kElements]) {
    if constexpr (kElements > 1) {
      wait_copies<kRowsAtOnce - 1>();
      widen_chunk(*place(i), x);
    } else {
      widen_chunk(chunks[i], x);
    }
    if constexpr (kQuantised<R>) return scale_of(p, scales[i]);
    return 1.f;
  }
};

// ---- bags ----

// Neighbouring lanes that work on one row.
struct Group {
  int lanes, lane;
  unsigned mask;

  __device__ __forceinline__ explicit Group(int lanes)
      : lanes(lanes), lane(static_cast<int>(threadIdx.x) & (lanes - 1)) {
    const int first = static_cast<int>(threadIdx.x) % 32 & ~(lanes - 1);
    mask = (kWholeWarp >> (32 - lanes)) << first;
  }
};

// kRowsAtOnce entries, each kept by one lane of a group; four lanes keep two each.
template <class Entry>
struct Entries {
  Entry mine[2];

  // load(i, entry) is called for those that this lane keeps.
  template <class Load>
  __device__ __forceinline__ Entries(const Group& group, const Load& load) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = half * group.lanes + group.lane;
      mine[half] = Entry{};
      if (i < kRowsAtOnce) load(i, mine[half]);
    }
  }

  // Brings a member from the lane that keeps it to all of the group.
  template <class Member>
  __device__ __forceinline__ Member of(const Group& group, int i, Member Entry::* member) const {
    const bool second = i >= 4 && group.lanes == 4;
    const Member value = second ? mine[1].*member : mine[0].*member;
    return __shfl_sync(group.mask, value, i & (group.lanes - 1), group.lanes);
  }
};

struct Bag {
  int64_t input, factors;  // where it begins
  int64_t length;
};
__device__ __forceinline__ int64_t offset_at(const BagParams& p, int64_t t) {
  if (t == p.num_bags) return p.num_entries;
  const int64_t offset = at(p.offsets, t);
  return offset < 0 ? 0 : offset < p.num_entries ? offset : p.num_entries;
}
__device__ __forceinline__ Bag find_bag(const BagParams& p, int64_t t) {
  if (p.offsets.data == nullptr) {
    return {t * p.input_row_stride, t * p.factor_row_stride, p.bag_length};
  }
  const int64_t begin = offset_at(p, t), length = offset_at(p, t + 1) - begin;
  return {begin * p.input.stride, begin * p.factor_stride, length < 0 ? 0 : length};
}

// The row at an offset into input, or -1.
__device__ __forceinline__ int64_t row_at(const BagParams& p, int64_t offset) {
  const int64_t row = integer_at(p.input, offset);
  return row >= 0 && row < p.num_rows ? row : -1;
}

template <class R>
__device__ __forceinline__ float factor_at(const BagParams& p, int64_t offset) {
  if (p.factors == nullptr) return 1.f;
  if constexpr (!kQuantised<R>) {
    if (!p.wide_factors) return widen(static_cast<const R*>(p.factors)[offset]);
  }
  return static_cast<const float*>(p.factors)[offset];
}

// The sum of `count` entries of a bag from `begin` on, at a thread's columns: of the sums of its
// parts, `begin` being where one begins.
template <class R, int kElements>
__device__ __forceinline__ void sum_parts(const BagParams& p, const Bag& bag, const Group& group,
                                          int column, int64_t begin, int count, int part,
                                          float (&total)[kElements]) {
  struct Weighted {
    int64_t row = -1;
    float factor = 0.f;
  };
  const int64_t input = bag.input + begin * p.input.stride;
  const int64_t factors = bag.factors + begin * p.factor_stride;
  const auto load = [&](int first) {
    return Entries<Weighted>(group, [&](int i, Weighted& entry) {
      if (first + i >= count) return;
      entry.row = row_at(p, input + (first + i) * p.input.stride);
      const float factor = factor_at<R>(p, factors + (first + i) * p.factor_stride);
      entry.factor = entry.row < 0 ? 0.f : factor;
    });
  };
  Rows<R, kElements> rows;
  const auto ask = [&](const Entries<Weighted>& entries, int i) {
    rows.ask(p, i, entries.of(group, i, &Weighted::row), column);
  };
  float sums[kElements] = {};
  if (count == 0) return;  // what is asked for must be taken
  auto now = load(0), next = load(kRowsAtOnce);
#pragma unroll
  for (int i = 0; i < kRowsAtOnce; ++i) ask(now, i);
  for (int k = 0; k < count; k += kRowsAtOnce) {
    const auto later = load(k + 2 * kRowsAtOnce);
    const bool more = k + kRowsAtOnce < count;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      float x[kElements];
      const float factor = now.of(group, i, &Weighted::factor) * rows.take(p, i, x);
      // What is skipped adds 0 to sums that are never -0.
#pragma unroll
      for (int e = 0; e < kElements; ++e) sums[e] += factor * x[e];
      more ? ask(next, i) : rows.pass();
    }
    now = next, next = later;
    if (more && ((k + kRowsAtOnce) & (part - 1)) != 0) continue;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      total[e] += sums[e];
      sums[e] = 0.f;
    }
  }
}

// One bag at some columns, its parts shared out among the groups of a block.
template <class R, int kElements>
__device__ __forceinline__ void sum_by_block(const BagParams& p, int64_t t, int slice,
                                             float* partial) {
  const Bag bag = find_bag(p, t);
  const Group group(p.block_lanes);
  const int width = group.lanes * kElements, first = slice * width;
  const int part = part_length(bag.length);
  const int parts = static_cast<int>((bag.length + part - 1) / part);
  for (int i = threadIdx.x / group.lanes; i < parts;
       i += static_cast<int>(blockDim.x) / group.lanes) {
    const int64_t begin = int64_t{i} * part, left = bag.length - begin;
    float sums[kElements] = {};
    sum_parts<R, kElements>(p, bag, group, first + group.lane * kElements, begin,
                            left < part ? static_cast<int>(left) : part, part, sums);
#pragma unroll
    for (int e = 0; e < kElements; ++e) partial[i * width + group.lane * kElements + e] = sums[e];
  }
  __syncthreads();
  for (int c = threadIdx.x; c < width && first + c < p.dim; c += blockDim.x) {
    float total = 0.f;
    for (int i = 0; i < parts; ++i) total += partial[i * width + c];
    narrow(total, static_cast<Sum<R>*>(p.out)[t * p.dim + first + c]);
  }
}

template <class R, int kElements>
__global__ void __launch_bounds__(kBagThreads, kBlocksOf<R>) sum_bags(const BagParams p) {
  // Rows; partial sums [kMaxParts] of block_lanes * kElements columns; of groups, if their bag
  // waits.
  float* const partial =
      reinterpret_cast<float*>(shared_memory() + Rows<R, kElements>::shared_bytes(blockDim.x));
  if (p.by_block) {
    return sum_by_block<R, kElements>(p, blockIdx.x / p.block_slices, blockIdx.x % p.block_slices,
                                      partial);
  }
  // Blocks side by side take the slices of the same rows.
  const Group group(p.lanes);
  const int groups = kBagThreads / group.lanes, slice = blockIdx.x % p.slices;
  const int64_t first = int64_t{blockIdx.x / p.slices} * groups;
  const int64_t t = first + threadIdx.x / group.lanes;
  const Bag bag = t < p.num_bags ? find_bag(p, t) : Bag{};
  const bool too_long = p.offsets.data && bag.length > kLongBag;
  if (t < p.num_bags && !too_long) {
    const int column = (slice * group.lanes + group.lane) * kElements;
    float total[kElements] = {};
    sum_parts<R, kElements>(p, bag, group, column, 0, static_cast<int>(bag.length),
                            part_length(bag.length), total);
    if (column < p.dim) store_elements(static_cast<Sum<R>*>(p.out) + t * p.dim + column, total);
  }
  if (p.offsets.data == nullptr) return;
  int* const waiting = reinterpret_cast<int*>(partial + kMaxParts * p.block_lanes * kElements);
  if (group.lane == 0) waiting[threadIdx.x / group.lanes] = too_long;
  __syncthreads();
  const int slices = p.lanes / p.block_lanes;
  for (int i = 0; i < groups * slices; ++i) {
    const int block_slice = slice * slices + i % slices;
    if (!waiting[i / slices] || block_slice >= p.block_slices) continue;
    sum_by_block<R, kElements>(p, first + i / slices, block_slice, partial);
    __syncthreads();
  }
}

// ---- the gradient of factors ----

// The bag of an entry, or -1 before the first one.
__device__ __forceinline__ int64_t bag_of(const BagParams& p, int64_t entry) {
  if (p.offsets.data == nullptr) return entry / p.bag_length;
  int64_t t = -1, past = p.num_bags;
  while (past - t > 1) {
    const int64_t middle = (t + past) / 2;
    (offset_at(p, middle) <= entry ? t : past) = middle;
  }
  return t;
}

template <class R, int kElements>
__global__ void __launch_bounds__(kBagThreads, kBlocksOf<R>) multiply_rows(const BagParams p) {
  struct Place {
    int64_t row = -1, bag = -1;
  };
  const Group group(p.lanes);
  const int64_t first =
      (int64_t{blockIdx.x} * (kBagThreads / group.lanes) + threadIdx.x / group.lanes) * kRowsAtOnce;
  const int64_t left = p.num_entries - first;
  if (left <= 0) return;
  const Entries<Place> entries(group, [&](int i, Place& place) {
    if (i >= left) return;
    place.bag = bag_of(p, first + i);
    if (place.bag < 0) return;
    const bool flat = p.offsets.data;
    const int64_t k = flat ? first + i : first + i - place.bag * p.bag_length;
    place.row = row_at(p, (flat ? 0 : place.bag * p.input_row_stride) + k * p.input.stride);
  });
  // Of each entry whether it is of another bag than the one before.
  unsigned changes = 1;
  for (int i = 1; i < kRowsAtOnce; ++i) {
    const bool same = entries.of(group, i, &Place::bag) == entries.of(group, i - 1, &Place::bag);
    changes |= static_cast<unsigned>(!same) << i;
  }
  Rows<R, kElements> rows;
  const auto ask = [&](int i, int column) {
    rows.ask(p, i, entries.of(group, i, &Place::row), column);
  };
  const int step = group.lanes * kElements, end = p.slices * step;
  float sums[kRowsAtOnce] = {};
#pragma unroll
  for (int i = 0; i < kRowsAtOnce; ++i) ask(i, group.lane * kElements);
  for (int column = group.lane * kElements; column < end; column += step) {
    float grad[kElements] = {};
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (changes >> i & 1) {
        const int64_t bag = entries.of(group, i, &Place::bag);
        if (bag >= 0 && column < p.dim) {
          load_elements(static_cast<const Sum<R>*>(p.grad) + bag * p.grad_stride + column, grad);
        }
      }
      float x[kElements], sum = 0.f;
      const float scale = rows.take(p, i, x);
#pragma unroll
      for (int e = 0; e < kElements; ++e) sum += grad[e] * x[e];
      sums[i] += scale * sum;
      column + step < end ? ask(i, column + step) : rows.pass();
    }
  }
#pragma unroll
  for (int i = 0; i < kRowsAtOnce; ++i) {
    for (int lanes = group.lanes / 2; lanes > 0; lanes /= 2) {
      sums[i] += __shfl_xor_sync(group.mask, sums[i], lanes, group.lanes);
    }
    const int64_t row = entries.of(group, i, &Place::row);
    if (group.lane == 0 && i < left) {
      static_cast<float*>(p.out)[first + i] = row < 0 ? 0.f : sums[i];
    }
  }
}

}  // namespace memkernels::lookup::cuda
