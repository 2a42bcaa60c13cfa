// c [m][n] = a [m][k] b [n][k]^T by CuTe's sm_80 atoms: cp.async, swizzled tiles, ldmatrix,
// mma.sync.
#include "ptx.h"

#include <cute/tensor.hpp>

namespace {

using namespace cute;
using T = cutlass::bfloat16_t;

constexpr int kStages = 3;
using TileM = Int<128>;
using TileN = Int<64>;
using TileK = Int<32>;
using Atom =
    decltype(composition(Swizzle<2, 3, 3>{}, Layout<cute::Shape<_8, _32>, Stride<_32, _1>>{}));
using LayoutA = decltype(tile_to_shape(Atom{}, cute::Shape<TileM, TileK, Int<kStages>>{}));
using LayoutB = decltype(tile_to_shape(Atom{}, cute::Shape<TileN, TileK, Int<kStages>>{}));
using Products = decltype(make_tiled_mma(SM80_16x8x16_F32BF16BF16F32_TN{},
                                         Layout<cute::Shape<_2, _2>>{}, Tile<_32, _32, _16>{}));
using ToShared = decltype(make_tiled_copy(Copy_Atom<SM80_CP_ASYNC_CACHEGLOBAL<uint128_t>, T>{},
                                          Layout<cute::Shape<_32, _4>, Stride<_4, _1>>{},
                                          Layout<cute::Shape<_1, _8>>{}));
using ToRegisters = Copy_Atom<SM75_U32x4_LDSM_N, T>;

void gemm(const T* a, const T* b, float* c, int m, int n, int k) {
  const auto tile = cute::Shape<TileM, TileN, TileK>{};
  const auto place = make_coord(int(blockIdx.x), int(blockIdx.y), _);
  const auto whole = [](auto pointer, int rows, int columns) {
    return make_tensor(make_gmem_ptr(pointer), make_shape(rows, columns),
                       make_stride(columns, _1{}));
  };
  const auto tile_a = local_tile(whole(a, m, k), tile, place, Step<_1, X, _1>{});
  const auto tile_b = local_tile(whole(b, n, k), tile, place, Step<X, _1, _1>{});
  auto tile_c = local_tile(whole(c, m, n), tile, place, Step<_1, _1, X>{});

  T* const memory = reinterpret_cast<T*>(simt::shared_memory());
  auto shared_a = make_tensor(make_smem_ptr(memory), LayoutA{});
  auto shared_b = make_tensor(make_smem_ptr(memory + cosize_v<LayoutA>), LayoutB{});
  const ToShared to_shared;
  const auto copier = to_shared.get_slice(threadIdx.x);
  const auto from_a = copier.partition_S(tile_a);
  const auto from_b = copier.partition_S(tile_b);
  auto to_a = copier.partition_D(shared_a);
  auto to_b = copier.partition_D(shared_b);

  const Products products;
  const auto multiplier = products.get_slice(threadIdx.x);
  auto thread_c = multiplier.partition_C(tile_c);
  auto sums = multiplier.make_fragment_C(thread_c);
  clear(sums);
  auto a_registers = multiplier.partition_fragment_A(shared_a(_, _, 0));
  auto b_registers = multiplier.partition_fragment_B(shared_b(_, _, 0));
  const auto load_a = make_tiled_copy_A(ToRegisters{}, products);
  const auto load_b = make_tiled_copy_B(ToRegisters{}, products);
  const auto source_a = load_a.get_slice(threadIdx.x).partition_S(shared_a);
  const auto source_b = load_b.get_slice(threadIdx.x).partition_S(shared_b);
  auto target_a = load_a.get_slice(threadIdx.x).retile_D(a_registers);
  auto target_b = load_b.get_slice(threadIdx.x).retile_D(b_registers);

  const int steps = size<2>(tile_a);
  const auto load = [&](int step) {
    if (step < steps) {
      copy(to_shared, from_a(_, _, _, step), to_a(_, _, _, step % kStages));
      copy(to_shared, from_b(_, _, _, step), to_b(_, _, _, step % kStages));
    }
    cp_async_fence();
  };
  for (int step = 0; step + 1 < kStages; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1);
    for (int block = 0; block < size<2>(a_registers); ++block) {
      copy(load_a, source_a(_, _, block, step % kStages), target_a(_, _, block));
      copy(load_b, source_b(_, _, block, step % kStages), target_b(_, _, block));
      cute::gemm(products, a_registers(_, _, block), b_registers(_, _, block), sums);
    }
  }
  copy(sums, thread_c);
}

}  // namespace

void gemm_sm80(const void* a, const void* b, float* c, int m, int n, int k) {
  const size_t shared = (cosize_v<LayoutA> + cosize_v<LayoutB>)*sizeof(T);
  simt::launch("gemm_sm80", {unsigned(m / TileM()), unsigned(n / TileN())}, {128}, shared,
               [=] { gemm(static_cast<const T*>(a), static_cast<const T*>(b), c, m, n, k); });
}
