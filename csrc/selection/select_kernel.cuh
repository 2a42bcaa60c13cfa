// The k largest scores of a row, as indices in rising order; of equal ones the first.
//
// Scores become integers of the same order, and a radix select finds the k-th largest, 8 or 11 bits
// a pass: a histogram of the digit, and the digit in which the k-th lies. A last walk in the order
// of the row writes the indices of what lies above it, and of the first that equal it. Nothing is
// sorted, and there is no limit on k.
//
// Cost: one read of a row that fits into shared memory, else five, which for up to 50 MB hit the L2
// of an H200. A row of 8192 is bound by some ten block-wide barriers; about 10 us are expected.
#pragma once

#include "core/cuda/device.cuh"
#include "selection/select_cuda.h"

namespace memkernels::selection::cuda {

// In the order of the scores; -0 is 0, NaN comes before -inf.
__device__ __forceinline__ uint32_t key_of(float x) { return x != x ? 0 : ordered(x + 0.f); }

__device__ __forceinline__ int64_t offset_of(const SelectParams& p, int64_t row,
                                             const int64_t* strides) {
  int64_t offset = 0;
  for (int i = p.leading - 1; i >= 0; --i) {
    offset += row % p.sizes[i] * strides[i];
    row /= p.sizes[i];
  }
  return offset;
}

// A row: its first and last entries are kept whatever their scores, `want` of those between them
// are to be chosen.
struct Row {
  int64_t index;
  const void* scores;  // of the entries between
  int first, count, last, want;
  uint32_t floor;  // the least key that may be chosen
  int32_t* out;
};

template <class T>
__device__ __forceinline__ Row find_row(const SelectParams& p, int64_t index) {
  int length = p.n, k = p.room;
  if (p.lengths.data) {
    length = static_cast<int>(
        clamp(integer_at(p.lengths, offset_of(p, index, p.length_strides)), 0, p.n));
  }
  if (p.budgets.data) {
    k = static_cast<int>(
        clamp(integer_at(p.budgets, offset_of(p, index, p.budget_strides)), 0, p.room));
  }
  Row row;
  row.index = index;
  row.first = static_cast<int>(clamp(p.keep_first, 0, length < k ? length : k));
  row.last = static_cast<int>(clamp(p.keep_last, 0, (length < k ? length : k) - row.first));
  row.count = length - row.first - row.last;
  row.want = k - row.first - row.last;
  row.scores = static_cast<const T*>(p.scores) + offset_of(p, index, p.strides) + row.first;
  row.floor = 0;
  if (!p.any) {
    const uint32_t above_none = key_of(-kInfinity) + 1, lowest = key_of(p.lowest);
    row.floor = lowest > above_none ? lowest : above_none;
  }
  row.out = p.out + index * p.room;
  return row;
}

// Keys above `least` are chosen, and the first `ties` that equal it.
struct Cut {
  uint32_t least;
  int ties;
};

// A radix select in progress: of the keys that begin with `prefix`, `want` are still to be chosen.
struct Search {
  uint32_t floor, prefix;
  int shift;  // bits behind the prefix
  int want;
  bool done;  // all of them
  int bits;   // of a digit

  __device__ __forceinline__ explicit Search(const Row& row)
      : floor(row.floor),
        prefix(0),
        shift(32),
        want(row.want),
        done(row.want == 0 || row.count <= row.want),
        bits(blockDim.x == kShortThreads ? kShortDigitBits : kDigitBits) {}

  // Counts the next digit of keys key(begin), ..., key(end - 1).
  template <class Key>
  __device__ __forceinline__ void count_digits(const Key& key, int begin, int end,
                                               int* digits) const {
    const int next = shift > bits ? shift - bits : 0;
    const uint32_t mask = (1u << (shift - next)) - 1;
#pragma unroll 4
    for (int i = begin + threadIdx.x; i < end; i += blockDim.x) {
      const uint32_t k = key(i);
      const bool counts = k >= floor && (shift == 32 || k >> shift == prefix);
      if (counts) atomicAdd(&digits[k >> next & mask], 1);
    }
  }

  // Takes the digit in which the last key to be chosen lies. By the whole block; `digits` may be
  // changed afterwards.
  __device__ __forceinline__ void take_digit(const int* digits, int* scratch) {
    const int tid = threadIdx.x, lane = tid % 32, each = (1 << bits) / static_cast<int>(blockDim.x);
    const int from = (1 << bits) - 1 - tid * each;  // downwards
    int mine = 0;
    for (int i = 0; i < each; ++i) mine += digits[from - i];
    int sum = mine;  // of this warp's threads up to this one
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int other = __shfl_up_sync(kWholeWarp, sum, lanes);
      if (lane >= lanes) sum += other;
    }
    int* const warp_sums = scratch + 3;
    if (lane == 31) warp_sums[tid / 32] = sum;
    if (tid == 0) scratch[0] = -1;
    __syncthreads();
    int above = sum - mine;
    for (int warp = 0; warp < tid / 32; ++warp) above += warp_sums[warp];
    if (above < want && above + mine >= want) {
      int digit = from;
      while (above + digits[digit] < want) above += digits[digit--];
      scratch[0] = digit, scratch[1] = above, scratch[2] = digits[digit];
    }
    __syncthreads();
    const int digit = scratch[0];
    done = digit < 0;  // there are no more than are wanted
    if (!done) {
      const int taken = shift < bits ? shift : bits;
      prefix = prefix << taken | static_cast<uint32_t>(digit);
      shift -= taken;
      want -= scratch[1];
      done = want == scratch[2];
    }
    __syncthreads();
  }

  __device__ __forceinline__ Cut cut() const {
    if (!done) return {prefix, want};
    if (want == 0) return {0xffffffffu, 0};
    const uint32_t least = shift == 32 ? 0 : prefix << shift;
    return {least > floor ? least : floor, 0x7fffffff};
  }
};

// The entries of this warp, a part of [begin, end).
struct Part {
  int begin, end;
};
__device__ __forceinline__ Part part_of_warp(int begin, int end) {
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int length = ((end - begin + warps - 1) / warps + 31) & ~31;
  const int from = begin + warp * length;
  return {from < end ? from : end, from + length < end ? from + length : end};
}

// Counts those of a block's entries; the sums over the warps before this one, and of all.
struct Counts {
  Count before, all;
};
template <class Key>
__device__ __forceinline__ Counts count_chosen(const Key& key, int begin, int end, const Cut& cut,
                                               int* scratch) {
  const Part part = part_of_warp(begin, end);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int above = 0, equal = 0;
  for (int i = part.begin; i < part.end; i += 32) {
    const bool inside = i + lane < part.end;
    const uint32_t k = inside ? key(i + lane) : 0;
    above += __popc(__ballot_sync(kWholeWarp, inside && k > cut.least));
    equal += __popc(__ballot_sync(kWholeWarp, inside && k == cut.least));
  }
  Count* const of_warps = reinterpret_cast<Count*>(scratch);
  if (lane == 0) of_warps[warp] = {above, equal};
  __syncthreads();
  Counts counts{};
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
    const Count c = of_warps[w];
    if (w == warp) counts.before = counts.all;
    counts.all.above += c.above, counts.all.equal += c.equal;
  }
  return counts;
}

__device__ __forceinline__ int chosen(const Count& count, const Cut& cut) {
  return count.above + (count.equal < cut.ties ? count.equal : cut.ties);
}

// Writes the indices of what is chosen of a warp's entries, before which there are `before`.
template <class Key>
__device__ __forceinline__ void write_chosen(const Key& key, int begin, int end, const Cut& cut,
                                             Count before, const Row& row) {
  const Part part = part_of_warp(begin, end);
  const int lane = threadIdx.x % 32;
  const uint32_t lower = (1u << lane) - 1;
  int32_t* out = row.out + row.first + chosen(before, cut);
  int equal = before.equal;
  for (int i = part.begin; i < part.end; i += 32) {
    const bool inside = i + lane < part.end;
    const uint32_t k = inside ? key(i + lane) : 0;
    const uint32_t ties = __ballot_sync(kWholeWarp, inside && k == cut.least);
    const bool tie = ties >> lane & 1;
    const bool take = inside && (tie ? equal + __popc(ties & lower) < cut.ties : k > cut.least);
    const uint32_t taken = __ballot_sync(kWholeWarp, take);
    if (take) out[__popc(taken & lower)] = row.first + i + lane;
    out += __popc(taken);
    equal += __popc(ties);
  }
}

// What is kept at both ends, behind `num_chosen`, and what is left.
__device__ __forceinline__ void write_ends(const SelectParams& p, const Row& row, int num_chosen) {
  for (int i = threadIdx.x; i < row.first; i += blockDim.x) row.out[i] = i;
  const int begin = row.first + num_chosen;
  for (int i = begin + threadIdx.x; i < p.room; i += blockDim.x) {
    row.out[i] = i < begin + row.last ? row.first + row.count + i - begin : -1;
  }
}

// A block a row. `cached`: keys are kept in shared memory.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) select(const SelectParams p, bool cached) {
  int* const digits = reinterpret_cast<int*>(shared_memory());
  int* const scratch = digits + kDigits;
  uint32_t* const keys = reinterpret_cast<uint32_t*>(digits + kFixedInts);
  const Row row = find_row<T>(p, blockIdx.x);
  const T* const scores = static_cast<const T*>(row.scores);
  if (cached) {
#pragma unroll 4
    for (int i = threadIdx.x; i < row.count; i += blockDim.x) keys[i] = key_of(widen(scores[i]));
  }
  const auto key = [&](int i) { return cached ? keys[i] : key_of(widen(scores[i])); };
  Search search(row);
  while (!search.done && search.shift > 0) {
    for (int i = threadIdx.x; i < 1 << search.bits; i += blockDim.x) digits[i] = 0;
    __syncthreads();
    search.count_digits(key, 0, row.count, digits);
    __syncthreads();
    search.take_digit(digits, scratch);
  }
  const Cut cut = search.cut();
  __syncthreads();
  const Counts counts = count_chosen(key, 0, row.count, cut, scratch);
  write_chosen(key, 0, row.count, cut, counts.before, row);
  write_ends(p, row, chosen(counts.all, cut));
}

// ---- several blocks a row ----

struct Share {
  Row row;
  int begin, end;  // of its entries
};
template <class T>
__device__ __forceinline__ Share find_share(const SelectParams& p) {
  Share share{find_row<T>(p, blockIdx.x / p.parts), 0, 0};
  const int64_t begin = int64_t{blockIdx.x % p.parts} * kPartLength;
  share.begin = static_cast<int>(clamp(begin, 0, share.row.count));
  share.end = static_cast<int>(clamp(begin + kPartLength, 0, share.row.count));
  return share;
}

__device__ __forceinline__ int* digits_of(const SelectParams& p, int pass, int64_t row) {
  return p.digits + (pass * p.rows + row) * kDigits;
}

// What the passes before this one have found.
__device__ __forceinline__ Search resume(const SelectParams& p, const Row& row, int passes,
                                         int* scratch) {
  Search search(row);
  for (int pass = 0; pass < passes && !search.done; ++pass) {
    search.take_digit(digits_of(p, pass, row.index), scratch);
  }
  return search;
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) count_digits(const SelectParams p, int pass) {
  int* const digits = reinterpret_cast<int*>(shared_memory());
  const Share share = find_share<T>(p);
  const T* const scores = static_cast<const T*>(share.row.scores);
  for (int i = threadIdx.x; i < kDigits; i += blockDim.x) digits[i] = 0;
  const Search search = resume(p, share.row, pass, digits + kDigits);
  if (search.done) return;
  __syncthreads();
  const auto key = [&](int i) { return key_of(widen(scores[i])); };
  search.count_digits(key, share.begin, share.end, digits);
  __syncthreads();
  int* const all = digits_of(p, pass, share.row.index);
  for (int i = threadIdx.x; i < kDigits; i += blockDim.x) {
    if (digits[i] > 0) atomicAdd(&all[i], digits[i]);
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) count_parts(const SelectParams p) {
  int* const scratch = reinterpret_cast<int*>(shared_memory()) + kDigits;
  const Share share = find_share<T>(p);
  const T* const scores = static_cast<const T*>(share.row.scores);
  const auto key = [&](int i) { return key_of(widen(scores[i])); };
  const Cut cut = resume(p, share.row, kPasses, scratch).cut();
  const Counts counts = count_chosen(key, share.begin, share.end, cut, scratch);
  if (threadIdx.x == 0) p.counts[blockIdx.x] = counts.all;
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) write_parts(const SelectParams p) {
  int* const scratch = reinterpret_cast<int*>(shared_memory()) + kDigits;
  const Share share = find_share<T>(p);
  const T* const scores = static_cast<const T*>(share.row.scores);
  const auto key = [&](int i) { return key_of(widen(scores[i])); };
  const Cut cut = resume(p, share.row, kPasses, scratch).cut();
  const Counts counts = count_chosen(key, share.begin, share.end, cut, scratch);
  Count before = counts.before, all = counts.all;
  const int part = blockIdx.x % p.parts;
  for (int i = 0; i < part; ++i) {
    const Count other = p.counts[blockIdx.x - part + i];
    before.above += other.above, before.equal += other.equal;
    all.above += other.above, all.equal += other.equal;
  }
  write_chosen(key, share.begin, share.end, cut, before, share.row);
  if (part == p.parts - 1) write_ends(p, share.row, chosen(all, cut));
}

}  // namespace memkernels::selection::cuda
