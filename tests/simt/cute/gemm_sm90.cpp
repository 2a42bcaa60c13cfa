// c [m][n] = a [m][k] b [n][k]^T by CuTe's sm_90 atoms: TMA, mbarriers, wgmma; with planted bugs.
#include "ptx.h"

#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>
#include <cutlass/pipeline/sm90_pipeline.hpp>

namespace {

using namespace cute;
using T = cutlass::bfloat16_t;
using Full = cutlass::arch::ClusterTransactionBarrier;
using Empty = cutlass::arch::ClusterBarrier;

enum Bug { kNone, kEarlyRelease, kShortExpectation, kWrongPhase, kMissingArrival };

constexpr int kStages = 3, kThreads = 128;
using TileMNK = cute::Shape<_128, _64, _64>;
using LayoutA =
    decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<T>{}, cute::Shape<_128, _64, Int<kStages>>{}));
using LayoutB =
    decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<T>{}, cute::Shape<_64, _64, Int<kStages>>{}));

struct Memory {
  alignas(1024) T a[cosize_v<LayoutA>];
  alignas(1024) T b[cosize_v<LayoutB>];
  uint64_t full[kStages], empty[kStages];
};

template <class LoadA, class LoadB, class Products>
void gemm(Bug bug, const LoadA& load_a, const LoadB& load_b, float* c, int m, int n, int k,
          Products products) {
  const auto place = make_coord(int(blockIdx.x), int(blockIdx.y), _);
  const auto tile_a =
      local_tile(load_a.get_tma_tensor(make_shape(m, k)), TileMNK{}, place, Step<_1, X, _1>{});
  const auto tile_b =
      local_tile(load_b.get_tma_tensor(make_shape(n, k)), TileMNK{}, place, Step<X, _1, _1>{});
  auto tile_c = local_tile(make_tensor(make_gmem_ptr(c), make_shape(m, n), make_stride(n, _1{})),
                           TileMNK{}, place, Step<_1, _1, X>{});
  Memory& memory = *reinterpret_cast<Memory*>(simt::shared_memory());
  auto shared_a = make_tensor(make_smem_ptr(memory.a), LayoutA{});
  auto shared_b = make_tensor(make_smem_ptr(memory.b), LayoutB{});
  auto [from_a, to_a] = tma_partition(load_a, Int<0>{}, Layout<_1>{}, group_modes<0, 2>(shared_a),
                                      group_modes<0, 2>(tile_a));
  auto [from_b, to_b] = tma_partition(load_b, Int<0>{}, Layout<_1>{}, group_modes<0, 2>(shared_b),
                                      group_modes<0, 2>(tile_b));
  const int bytes = (cosize_v<LayoutA> + cosize_v<LayoutB>) / kStages * sizeof(T);
  const bool producer = cutlass::canonical_warp_idx_sync() == 0 && cute::elect_one_sync();
  if (producer) {
    for (int stage = 0; stage < kStages; ++stage) {
      Full::init(&memory.full[stage], 1);
      Empty::init(&memory.empty[stage], kThreads);
    }
  }
  cutlass::arch::fence_barrier_init();
  __syncthreads();

  const int steps = size<1>(from_a);
  const auto load = [&](int step) {
    uint64_t& full = memory.full[step % kStages];
    Full::arrive_and_expect_tx(&full, bug == kShortExpectation ? bytes / 2 : bytes);
    copy(load_a.with(full), from_a(_, step), to_a(_, step % kStages));
    copy(load_b.with(full), from_b(_, step), to_b(_, step % kStages));
  };
  for (int step = 0; step < kStages && step < steps; ++step) {
    if (producer) load(step);
  }
  const auto multiplier = products.get_thread_slice(threadIdx.x);
  auto thread_c = multiplier.partition_C(tile_c);
  auto sums = multiplier.make_fragment_C(thread_c);
  clear(sums);
  const auto a = multiplier.make_fragment_A(multiplier.partition_A(shared_a));
  const auto b = multiplier.make_fragment_B(multiplier.partition_B(shared_b));
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages, phase = step / kStages & 1;
    Full::wait(&memory.full[stage], bug == kWrongPhase ? phase ^ 1 : phase);
    warpgroup_arrive();
    cute::gemm(products, a(_, _, _, stage), b(_, _, _, stage), sums);
    warpgroup_commit_batch();
    if (bug == kEarlyRelease) {  // products of the step before are still being computed
      warpgroup_wait<1>();
    } else {
      warpgroup_wait<0>();
    }
    if (bug != kMissingArrival || threadIdx.x != 5) Empty::arrive(&memory.empty[stage]);
    if (producer && step + kStages < steps) {
      Empty::wait(&memory.empty[stage], phase);
      load(step + kStages);
    }
  }
  warpgroup_wait<0>();
  copy(sums, thread_c);
}

}  // namespace

void gemm_sm90(int bug, const void* a, const void* b, float* c, int m, int n, int k) {
  const auto whole = [&](const void* p, int rows) {
    return make_tensor(static_cast<const T*>(p), make_shape(rows, k), make_stride(k, _1{}));
  };
  const auto load_a =
      make_tma_atom(SM90_TMA_LOAD{}, whole(a, m), LayoutA{}(_, _, 0), cute::Shape<_128, _64>{});
  const auto load_b =
      make_tma_atom(SM90_TMA_LOAD{}, whole(b, n), LayoutB{}(_, _, 0), cute::Shape<_64, _64>{});
  const auto products =
      make_tiled_mma(SM90_64x64x16_F32BF16BF16_SS<GMMA::Major::K, GMMA::Major::K>{});
  simt::launch("gemm_sm90", {unsigned(m / 128), unsigned(n / 64)}, {kThreads}, sizeof(Memory),
               [=] { gemm(static_cast<Bug>(bug), load_a, load_b, c, m, n, k, products); });
}
