// From the arguments of the indexer's backward to the kernels and their grids.
#include <algorithm>

#include "attention/paged_attention_backward_cuda.h"
#include "attention/plan.h"
#include "selection/indexer_scores_backward_kernel.cuh"

namespace memkernels::selection::cuda {

namespace {

template <class T, int kTiles, int kKeys>
bool launch_dq(const char* op, const IndexerArgs& args, IndexerBackwardParams p,
               const Limits& limits, const Context& ctx) {
  constexpr int kRows = 64 * kTiles;
  AttentionParams& a = p.s.a;
  a.stages = 2;
  const int64_t bytes = (kRows + a.stages * kKeys) * int64_t{pitch_of(int64_t{a.dim} * sizeof(T))} +
                        (a.stages + 1) * (kKeys + 1) * int64_t{sizeof(attention::cuda::Key)};
  if (bytes > limits.of_block) return false;
  const int64_t slices = p.dq ? ceil_div(a.dim, kIndexerSlice) : 1;
  const int64_t blocks = attention::cuda::plan_rows(a, args.attention, kRows) * slices;
  launch(op, ctx, find_dq<T, kTiles, kKeys>, blocks, kIndexerThreads, bytes, p);
  return true;
}

template <class T, int kTiles, int kColumns>
bool launch_dk(const char* op, IndexerBackwardParams p, const Limits& limits, const Context& ctx) {
  constexpr int kKeys = 64 * kTiles;
  const AttentionParams& a = p.s.a;
  p.s.stages = 2;
  const int64_t bytes = indexer_bytes(p.s, sizeof(T), kKeys, kColumns);
  if (bytes > limits.of_block) return false;
  p.parts_of_unit = static_cast<int>(ceil_div(a.page_size, kKeys));
  const int64_t blocks = int64_t{a.num_pages} * p.parts_of_unit * ceil_div(a.dim, kIndexerSlice);
  const int64_t elements = int64_t{a.num_pages} * a.page_size * a.dim;
  if (blocks == 0) return true;
  const int64_t queries = ceil_div(a.total_q, std::max(a.num_sequences, 1));
  p.parts = static_cast<int>(
      std::clamp<int64_t>(std::min(4 * limits.multiprocessors / blocks, queries / 64), 1, 16));
  if (p.parts > 1) {
    p.partial_dk = static_cast<float*>(ctx.allocate(ctx, p.parts * elements * 4));
  }
  launch(op, ctx, find_dk<T, kTiles, kColumns>, blocks * p.parts, kIndexerThreads, bytes, p);
  if (p.parts > 1) {
    launch(op, ctx, add_parts<T>, ceil_div(elements, 256), 256, 0, p.partial_dk, p.parts, elements,
           static_cast<T*>(p.dk));
  }
  return true;
}

// Large blocks where they fit into shared memory, else small ones.
template <class T>
void run(const char* op, const IndexerArgs& args, const IndexerBackwardParams& p,
         const Context& ctx) {
  constexpr int kTiles = sizeof(T) == 2 ? 2 : 1;
  const Limits limits = limits_of(op, ctx.device);
  bool fits = true;
  if (p.dq || p.dw) {
    fits = launch_dq<T, kTiles, 32>(op, args, p, limits, ctx) ||
           launch_dq<T, 1, 16>(op, args, p, limits, ctx);
  }
  if (p.dk) {
    fits = fits && (launch_dk<T, kTiles, 32>(op, p, limits, ctx) ||
                    launch_dk<T, 1, 16>(op, p, limits, ctx));
  }
  check(fits, op, "head dim ", p.s.a.dim, " needs more than the ", limits.of_block,
        " bytes of shared memory of a block on this GPU");
}

}  // namespace

void indexer_scores_backward(const char* op, const IndexerArgs& args, const IndexerGrads& grads,
                             const attention::Shapes& shapes, const Context& ctx) {
  const DeviceGuard guard(op, ctx.device);
  IndexerBackwardParams p{};
  p.s = indexer_params(op, args, shapes, ctx);
  p.dq = grads.dq.data;
  p.dw = grads.dw.data;
  p.dk = grads.dk.data;
  if (p.dk && given(args.attention.page_table)) {
    attention::cuda::BackwardParams units{};
    units.a = p.s.a;
    attention::cuda::find_units(op, units, ctx);
    p.entries = units.entries;
    p.run_begin = units.run_begin;
    p.columns = static_cast<int>(args.attention.page_table.shape[1]);
  }
  with_type(args.attention.q.dtype, [&](auto type) { run<decltype(type)>(op, args, p, ctx); });
}

}  // namespace memkernels::selection::cuda
