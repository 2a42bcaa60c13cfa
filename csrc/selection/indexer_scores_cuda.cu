// From the arguments of the indexer's scores to the kernel and its grid.
#include "selection/indexer_scores_cuda.h"

#include <algorithm>

#include "attention/plan.h"
#include "selection/indexer_scores_kernel.cuh"

namespace memkernels::selection::cuda {

namespace {

template <class T, int kTiles, int kColumns>
bool launch_scores(const char* op, IndexerParams& p, const Limits& limits, int blocks_wanted,
                   const Context& ctx) {
  constexpr int kKeys = 64 * kTiles;
  constexpr int64_t kReserved = 1024;  // of each block, by the system
  p.key_tiles = static_cast<int>(ceil_div(p.num_tokens, kKeys));
  as_int(op, "tokens of k", int64_t{p.key_tiles} * kKeys);
  if (p.run != 0) {
    // Keys are loaded once a run: long ones, but enough of them to fill the GPU some times over.
    const int64_t pairs = int64_t{p.key_tiles} * p.a.total_q;
    p.run = static_cast<int>(std::clamp<int64_t>(pairs / (8 * limits.multiprocessors), 1, 64));
  }
  const int64_t columns = int64_t{8} * p.head_blocks * std::max(p.run, 1);
  p.stages = columns > kColumns ? 2 : 1;
  const int64_t bytes = indexer_bytes(p, sizeof(T), kKeys, kColumns);
  if (blocks_wanted * (bytes + kReserved) > limits.of_multiprocessor || bytes > limits.of_block) {
    return false;
  }
  const int64_t slots =
      p.run == 0 ? p.a.num_sequences : int64_t{p.a.total_q} / p.run + p.a.num_sequences;
  launch(op, ctx, score_keys<T, kTiles, kColumns>, slots * p.key_tiles, kIndexerThreads, bytes, p);
  return true;
}

// Blocks of many keys for many queries, else of fewer; of as many as fit, where rows are long. Sums
// are the same in all.
template <class T>
void run(const char* op, IndexerParams& p, const Context& ctx) {
  constexpr int kColumns = sizeof(T) == 2 ? 64 : 32;
  const Limits limits = limits_of(op, ctx.device);
  if constexpr (sizeof(T) == 2) {
    const bool many = p.a.total_q >= 16 * int64_t{p.a.num_sequences};
    if (many && launch_scores<T, 4, kColumns>(op, p, limits, 2, ctx)) return;
  }
  if (launch_scores<T, 2, kColumns>(op, p, limits, 1, ctx)) return;
  const bool fits = launch_scores<T, 1, 16>(op, p, limits, 1, ctx);
  check(fits, op, "head dim ", p.a.dim, " needs more than the ", limits.of_block,
        " bytes of shared memory of a block on this GPU");
}

}  // namespace

IndexerParams indexer_params(const char* op, const IndexerArgs& args,
                             const attention::Shapes& shapes, const Context& ctx) {
  IndexerParams p{};
  p.a = attention::cuda::params_of(op, args.attention, shapes);
  p.run = given(args.attention.cu_seqlens_q) ? 1 : 0;
  if (args.one_sequence && p.a.total_q == 1) {
    p.a.cu_seqlens_q = {};
    p.run = 0;
  } else if (args.one_sequence) {
    auto* const offsets = static_cast<int64_t*>(ctx.allocate(ctx, 2 * sizeof(int64_t)));
    launch(op, ctx, write_offsets, 1, 1, 0, p.a.total_q, offsets);
    p.a.cu_seqlens_q = {offsets, 1, true};
  }
  p.w = args.w.data;
  p.w_stride = args.w.stride[0];
  p.w_head_stride = args.w.stride[1];
  p.w_is_float = args.w.dtype == Dtype::f32;
  p.head_blocks = static_cast<int>(ceil_div(p.a.num_heads, 8));
  // Two tiles ahead of the last they are counted, too.
  as_int(op, "queries times heads", int64_t{8} * p.head_blocks * p.a.total_q + 128);
  p.num_tokens = as_int(op, "tokens of k", args.scores.shape[1]);
  p.scores = static_cast<float*>(args.scores.data);
  return p;
}

int64_t indexer_bytes(const IndexerParams& p, int64_t item_size, int keys, int columns) {
  return (keys + int64_t{p.stages} * columns) * pitch_of(p.a.dim * item_size) + 2 * columns * 4 +
         keys * int64_t{sizeof(Place)};
}

void indexer_scores(const char* op, const IndexerArgs& args, const attention::Shapes& shapes,
                    const Context& ctx) {
  if (shapes.total_q == 0 || args.scores.shape[1] == 0) return;
  const DeviceGuard guard(op, ctx.device);
  IndexerParams p = indexer_params(op, args, shapes, ctx);
  with_type(args.attention.q.dtype, [&](auto type) { run<decltype(type)>(op, p, ctx); });
}

}  // namespace memkernels::selection::cuda
