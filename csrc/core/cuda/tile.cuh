// Tiles in shared memory, and their products on tensor cores.
//
// Fragments are those of mma.sync m16n8: of sums [16][8], a thread has c[0], c[1] in row lane / 4
// at columns 2 (lane % 4) and one further, c[2], c[3] eight rows below.
#pragma once

#include "core/cuda/device.cuh"

namespace memkernels::cuda {

// Bytes from row to row, for rows of that many.
__host__ __device__ __forceinline__ constexpr int pitch_of(int64_t row_bytes) {
  return static_cast<int>(row_bytes + 127) & ~127;
}

// Rows of shared memory, whose 16-byte chunks are permuted so that eight rows of one column lie in
// different banks.
struct Tile {
  char* data;
  int pitch;  // bytes, a multiple of 128

  __device__ __forceinline__ char* chunk(int row, int column) const {
    return data + row * pitch + ((column ^ (row & 7)) << 4);
  }
  template <class T>
  __device__ __forceinline__ T* element(int row, int column) const {
    constexpr int kChunk = 16 / sizeof(T);
    return reinterpret_cast<T*>(chunk(row, column / kChunk)) + column % kChunk;
  }
};

// Starts copying a row, by kLanes neighbouring threads of which this is the `lane`-th; or fills it
// with zeros. `aligned`: to 16 bytes, with a whole number of chunks; the copy is asynchronous then.
template <class T, int kLanes>
__device__ __forceinline__ void copy_row(const Tile& tile, int i, const T* row, int dim, int lane,
                                         bool aligned, bool used) {
  constexpr int kChunk = 16 / sizeof(T);
  if (aligned) {
    for (int c = lane; c < dim / kChunk; c += kLanes) {
      copy_async_16(tile.chunk(i, c), row + c * kChunk, used ? 16 : 0);
    }
  } else {
    for (int c = lane; c < dim; c += kLanes) *tile.element<T>(i, c) = used ? row[c] : T{};
  }
}

template <int kThreads>
__device__ __forceinline__ void fill_zeros(char* data, int bytes) {
  for (int i = threadIdx.x; i < bytes / 4; i += kThreads) reinterpret_cast<uint32_t*>(data)[i] = 0;
}

__device__ __forceinline__ void multiply_add(bf16, float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  multiply_bf16(c, a, b);
}
__device__ __forceinline__ void multiply_add(f16, float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  multiply_f16(c, a, b);
}

// x = high + low to some 22 bits, each a tf32; finite is high, or 0 where x is infinite.
struct Halves {
  uint32_t high, low, finite;
};
__device__ __forceinline__ Halves halve(uint32_t x) {
  const uint32_t high = round_tf32(bits_to_float(x));
  const float rest = bits_to_float(x) - bits_to_float(high);
  const bool infinite = fabsf(bits_to_float(high)) == kInfinity;
  return {high, infinite ? 0 : round_tf32(rest), infinite ? 0 : high};
}

// float32 as three products of tf32; what is dropped is below its rounding. An infinite element
// meets only high parts, which are zero where the other element is. Tensor cores cut off what does
// not fit into their sums, always towards zero; so they do not keep the long ones.
__device__ __forceinline__ void multiply_add(float, float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  uint32_t a_high[4], a_low[4], a_finite[4], b_high[2], b_low[2], b_finite[2];
  for (int i = 0; i < 4; ++i) {
    const Halves x = halve(a[i]);
    a_high[i] = x.high, a_low[i] = x.low, a_finite[i] = x.finite;
  }
  for (int i = 0; i < 2; ++i) {
    const Halves x = halve(b[i]);
    b_high[i] = x.high, b_low[i] = x.low, b_finite[i] = x.finite;
  }
  float sums[4] = {};
  multiply_tf32(sums, a_low, b_finite);
  multiply_tf32(sums, a_finite, b_low);
  multiply_tf32(sums, a_high, b_high);
  for (int i = 0; i < 4; ++i) c[i] += sums[i];
}

// Likewise to some 20 bits, for what is finite, with a third of the instructions; an infinity makes
// NaN.
struct Finite {
  float x;
};
__device__ __forceinline__ void multiply_add(Finite, float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  constexpr uint32_t kHigh = 0xffffe000u;
  uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
  for (int i = 0; i < 4; ++i) {
    a_high[i] = a[i] & kHigh;
    a_low[i] = float_to_bits(bits_to_float(a[i]) - bits_to_float(a_high[i]));
  }
  for (int i = 0; i < 2; ++i) {
    b_high[i] = b[i] & kHigh;
    b_low[i] = float_to_bits(bits_to_float(b[i]) - bits_to_float(b_high[i]));
  }
  float sums[4] = {};
  multiply_tf32(sums, a_low, b_high);
  multiply_tf32(sums, a_high, b_low);
  multiply_tf32(sums, a_high, b_high);
  for (int i = 0; i < 4; ++i) c[i] += sums[i];
}

// Sums of kTiles times 16 rows and kBlocks times 8 columns.
template <int kTiles, int kBlocks>
struct Sums {
  float c[kTiles][kBlocks][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c[tile][block][e] = 0.f;
      }
    }
  }
};

// sums += A B^T for rows of two tiles, from a_row and b_row on, `steps` times 32 bytes of each.
template <class T, int kTiles, int kBlocks>
__device__ __forceinline__ void multiply_rows(Sums<kTiles, kBlocks>& sums, const Tile& a, int a_row,
                                              const Tile& b, int b_row, int steps) {
  const int lane = threadIdx.x % 32;
  for (int step = 0; step < steps; ++step) {
    uint32_t left[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      load_matrices_4(left[tile], a.chunk(a_row + 16 * tile + lane % 16, 2 * step + lane / 16));
    }
    if constexpr (kBlocks % 2 == 0) {
#pragma unroll
      for (int block = 0; block < kBlocks; block += 2) {
        uint32_t right[4];
        const int row = b_row + 8 * block + lane % 8 + lane / 16 * 8;
        load_matrices_4(right, b.chunk(row, 2 * step + lane / 8 % 2));
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
          multiply_add(T(), sums.c[tile][block], left[tile], first);
          multiply_add(T(), sums.c[tile][block + 1], left[tile], second);
        }
      }
    } else {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        uint32_t right[2];
        load_matrices_2(right, b.chunk(b_row + 8 * block + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          multiply_add(T(), sums.c[tile][block], left[tile], right);
        }
      }
    }
  }
}

// Sums as the left operand of a product over their columns, 32 / sizeof(T) of which make a step.
// For float32 the columns of a step are taken in another order (even ones first), as
// load_two_blocks takes its rows.
template <int kBlocks>
__device__ __forceinline__ void to_operand(float, uint32_t (&a)[4], const float (&c)[kBlocks][4],
                                           int step) {
  a[0] = float_to_bits(c[step][0]);
  a[1] = float_to_bits(c[step][2]);
  a[2] = float_to_bits(c[step][1]);
  a[3] = float_to_bits(c[step][3]);
}
template <int kBlocks>
__device__ __forceinline__ void to_operand(Finite, uint32_t (&a)[4], const float (&c)[kBlocks][4],
                                           int step) {
  to_operand(0.f, a, c, step);
}
template <class T, int kBlocks>
__device__ __forceinline__ void to_operand(T, uint32_t (&a)[4], const float (&c)[kBlocks][4],
                                           int step) {
  a[0] = pack(T(), c[2 * step][0], c[2 * step][1]);
  a[1] = pack(T(), c[2 * step][2], c[2 * step][3]);
  a[2] = pack(T(), c[2 * step + 1][0], c[2 * step + 1][1]);
  a[3] = pack(T(), c[2 * step + 1][2], c[2 * step + 1][3]);
}

// Rows of a step from `row` on, at columns [8 block, 8 block + 16): right operands of two blocks.
template <class T>
__device__ __forceinline__ void load_two_blocks(T, uint32_t (&b)[2][2], const Tile& tile, int row,
                                                int block) {
  const int lane = threadIdx.x % 32;
  uint32_t r[4];
  load_matrices_4_transposed(r, tile.chunk(row + lane % 16, block + lane / 16));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}
__device__ __forceinline__ void load_two_blocks(float, uint32_t (&b)[2][2], const Tile& tile,
                                                int row, int block) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      b[i][k] = *tile.element<uint32_t>(row + lane % 4 * 2 + k, 8 * (block + i) + lane / 4);
    }
  }
}

__device__ __forceinline__ void load_two_blocks(Finite, uint32_t (&b)[2][2], const Tile& tile,
                                                int row, int block) {
  load_two_blocks(0.f, b, tile, row, block);
}

// Left operands of the same order: 16 rows of a tile, at the columns of a step;
template <class T>
__device__ __forceinline__ void load_left(T, uint32_t (&a)[4], const Tile& tile, int row,
                                          int step) {
  const int lane = threadIdx.x % 32;
  load_matrices_4(a, tile.chunk(row + lane % 16, 2 * step + lane / 16));
}
__device__ __forceinline__ void load_left(float, uint32_t (&a)[4], const Tile& tile, int row,
                                          int step) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t* const pair =
        tile.element<uint32_t>(row + 8 * half + lane / 4, 8 * step + lane % 4 * 2);
    a[half] = pair[0], a[2 + half] = pair[1];
  }
}
// or 16 columns from `column` on, at the rows of a step from `row` on.
template <class T>
__device__ __forceinline__ void load_left_transposed(T, uint32_t (&a)[4], const Tile& tile, int row,
                                                     int column) {
  const int lane = threadIdx.x % 32;
  load_matrices_4_transposed(a,
                             tile.chunk(row + lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2));
}
__device__ __forceinline__ void load_left_transposed(float, uint32_t (&a)[4], const Tile& tile,
                                                     int row, int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i] = *tile.element<uint32_t>(row + lane % 4 * 2 + i / 2, column + lane / 4 + i % 2 * 8);
  }
}

// sums += X B: X the sums of another product, over its columns; B the rows of a tile from `row` on,
// at kBlocks times 8 columns from block `first` on, of which those before `dim` count. Steps before
// `begin` add nothing.
template <class T, int kTiles, int kDepthBlocks, int kBlocks>
__device__ __forceinline__ void multiply_columns(Sums<kTiles, kBlocks>& sums,
                                                 const Sums<kTiles, kDepthBlocks>& x, const Tile& b,
                                                 int row, int first, int dim, int begin = 0) {
  static_assert(kBlocks % 2 == 0, "blocks of columns come in pairs");
  constexpr int kDepth = 32 / sizeof(T);
#pragma unroll
  for (int step = 0; step < kDepthBlocks * 8 / kDepth; ++step) {
    if (step < begin) continue;
    uint32_t left[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) to_operand(T(), left[tile], x.c[tile], step);
#pragma unroll
    for (int block = 0; block < kBlocks; block += 2) {
      if (8 * (first + block) >= dim) break;
      uint32_t right[2][2];
      load_two_blocks(T(), right, b, row + step * kDepth, first + block);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_add(T(), sums.c[tile][block], left[tile], right[0]);
        multiply_add(T(), sums.c[tile][block + 1], left[tile], right[1]);
      }
    }
  }
}

// Right operands of two blocks, rows [row, row + 16) of a tile, for the columns of a step.
template <class T>
__device__ __forceinline__ void load_two_rows(T, uint32_t (&b)[2][2], const Tile& tile, int row,
                                              int step) {
  const int lane = threadIdx.x % 32;
  uint32_t r[4];
  load_matrices_4(r, tile.chunk(row + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}
__device__ __forceinline__ void load_two_rows(float, uint32_t (&b)[2][2], const Tile& tile, int row,
                                              int step) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t* const pair =
        tile.element<uint32_t>(row + 8 * i + lane / 4, 8 * step + lane % 4 * 2);
    b[i][0] = pair[0], b[i][1] = pair[1];
  }
}

__device__ __forceinline__ void load_two_rows(Finite, uint32_t (&b)[2][2], const Tile& tile,
                                              int row, int step) {
  load_two_rows(0.f, b, tile, row, step);
}

// sums += X B^T: X the sums of another product, over its columns, of which the first `steps` times
// 32 bytes of T count; B the rows of a tile from `row` on, and from step `first` on. kLower: B is
// a lower triangle.
template <class T, bool kLower = false, int kTiles, int kDepthBlocks, int kBlocks>
__device__ __forceinline__ void multiply_transposed(Sums<kTiles, kBlocks>& sums,
                                                    const Sums<kTiles, kDepthBlocks>& x,
                                                    const Tile& b, int steps, int row = 0,
                                                    int first = 0) {
  static_assert(kBlocks % 2 == 0, "blocks of rows come in pairs");
  constexpr int kDepth = 32 / sizeof(T);
#pragma unroll
  for (int step = 0; step < kDepthBlocks * 8 / kDepth; ++step) {
    if (step >= steps) break;
    uint32_t left[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) to_operand(T(), left[tile], x.c[tile], step);
#pragma unroll
    for (int block = 0; block < kBlocks; block += 2) {
      if (kLower && 8 * (block + 2) <= step * kDepth) continue;
      uint32_t right[2][2];
      load_two_rows(T(), right, b, row + 8 * block, first + step);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_add(T(), sums.c[tile][block], left[tile], right[0]);
        multiply_add(T(), sums.c[tile][block + 1], left[tile], right[1]);
      }
    }
  }
}

// Stores a thread's columns of one of its rows; `first` is the first column of the blocks.
template <class T, int kBlocks>
__device__ __forceinline__ void store_row(T* row, const float (&c)[kBlocks][4], int half,
                                          float factor, int first, int dim) {
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const int column = first + 8 * block + static_cast<int>(threadIdx.x) % 4 * 2;
    const float x = c[block][2 * half] * factor, y = c[block][2 * half + 1] * factor;
    if (column + 1 < dim && dim % 2 == 0) {
      store_pair(row + column, x, y);
    } else {
      if (column < dim) narrow(x, row[column]);
      if (column + 1 < dim) narrow(y, row[column + 1]);
    }
  }
}

}  // namespace memkernels::cuda
