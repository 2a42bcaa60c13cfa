#include <algorithm>

#include "lookup/product_key_topk_kernel.cuh"

namespace memkernels::lookup::cuda {

namespace {

// Of lists, a multiprocessor; more tokens than that take several launches.
constexpr int64_t kListBytes = 256 << 10;

int64_t num_pairs(int64_t k) {  // of ranks r1 r2 <= k
  int64_t pairs = 0;
  for (int64_t rank = 1; rank <= k; ++rank) pairs += k / rank;
  return pairs;
}

// Decides what is in shared memory, for as many blocks as there should be if that can be; returns
// the bytes of one.
int64_t fit(ProductKeyParams& p, const Limits& limits) {
  constexpr int64_t kRowBytes = kRows * kSliceBytes, kTileBytes = kTileKeys * kSliceBytes;
  constexpr int64_t kReserved = 1024;  // by the system, a block
  const int64_t fixed =
      kRows * (kTileKeys * sizeof(float) + p.room * sizeof(Key) + sizeof(float) + sizeof(int));
  int64_t bytes = 0;
  for (const int64_t budget :
       {limits.of_multiprocessor / kSearchBlocks - kReserved, limits.of_block}) {
    for (p.stages = kMostStages; p.stages >= 2; --p.stages) {
      for (const bool stays : {true, false}) {
        p.q_stays = stays;
        bytes = fixed + p.stages * kTileBytes + (stays ? p.slices : p.stages) * kRowBytes;
        if (bytes <= std::min(budget, limits.of_block)) return bytes;
      }
    }
  }
  return bytes;
}

}  // namespace

void product_key_topk(const ProductKeyArgs& a, const Context& ctx) {
  constexpr char op[] = "product_key_topk";
  check_supported(op, "query", a.query);
  const int64_t tokens = a.query.shape[0], size = item_size(a.query.dtype);
  ProductKeyParams p{};
  p.query_stride = a.query.stride[0];
  p.query_head_stride = a.query.stride[1];
  p.query_half_stride = a.query.stride[2];
  p.keys = a.keys.data;
  p.key_head_stride = a.keys.stride[0];
  p.key_half_stride = a.keys.stride[1];
  p.key_stride = a.keys.stride[2];
  p.heads = as_int(op, "heads", a.query.shape[1]);
  p.size = as_int(op, "keys", a.keys.shape[2]);
  p.dim = as_int(op, "elements of half a key", a.query.shape[3]);
  p.k = as_int(op, "results", a.scores.shape[2]);
  const auto address =
      reinterpret_cast<uintptr_t>(a.query.data) | reinterpret_cast<uintptr_t>(a.keys.data);
  const int64_t numbers = p.query_stride | p.query_head_stride | p.query_half_stride |
                          p.key_head_stride | p.key_half_stride | p.key_stride | p.dim;
  p.aligned = address % 16 == 0 && numbers * size % 16 == 0;
  if (tokens == 0 || p.heads == 0) return;
  const DeviceGuard guard(op, ctx.device);
  const Limits limits = limits_of(op, ctx.device);

  p.slices = static_cast<int>(ceil_div(p.dim * size, kSliceBytes));
  p.room = std::max(96, p.k + kSpareKeys);
  const int64_t search_bytes = fit(p, limits);
  check(search_bytes <= limits.of_block, op, "needs ", search_bytes,
        " bytes of shared memory of a block, this GPU has ", limits.of_block);

  // Blocks for the whole device, but no more lists than a warp can go through.
  const int64_t tiles = ceil_div(p.size, kTileKeys);
  const int64_t blocks = ceil_div(tokens, kRows) * p.heads * 2;
  const int64_t slots = int64_t{limits.multiprocessors} * kSearchBlocks;
  p.stretches = static_cast<int>(
      std::clamp<int64_t>(slots / blocks, 1, std::min<int64_t>(tiles, 4096 / p.k)));
  p.merge_room = static_cast<int>(std::max<int64_t>(num_pairs(p.k), p.k + kSpareKeys));
  const int64_t merge_bytes = kMergeThreads / 32 * (2 * p.k + p.merge_room) * sizeof(Key);

  const int64_t token_keys = int64_t{p.heads} * 2 * p.stretches * p.k;
  const int64_t tiles_at_once =
      limits.multiprocessors * kListBytes / (token_keys * int64_t{sizeof(Key)} * kRows);
  const int64_t at_once = std::min(tokens, std::max<int64_t>(1, tiles_at_once) * kRows);
  p.lists = static_cast<Key*>(ctx.allocate(ctx, at_once * token_keys * sizeof(Key)));
  for (int64_t first = 0; first < tokens; first += at_once) {
    p.tokens = as_int(op, "tokens", std::min(at_once, tokens - first));
    p.query = static_cast<const char*>(a.query.data) + first * p.query_stride * size;
    p.scores = static_cast<float*>(a.scores.data) + first * p.heads * p.k;
    p.indices = static_cast<int64_t*>(a.indices.data) + first * p.heads * p.k;
    const int64_t search_blocks = ceil_div(p.tokens, kRows) * p.stretches * 2 * p.heads;
    with_type(a.query.dtype, [&](auto type) {
      launch(op, ctx, search_half<decltype(type)>, search_blocks, kSearchThreads, search_bytes, p);
    });
    const int64_t rows = int64_t{p.tokens} * p.heads;
    launch(op, ctx, merge_halves, ceil_div(rows, kMergeThreads / 32), kMergeThreads, merge_bytes,
           p);
  }
}

}  // namespace memkernels::lookup::cuda
