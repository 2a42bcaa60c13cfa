#include "lookup/ngram_hash.h"

#include <algorithm>

#include "lookup/ngram_hash_kernel.cuh"

namespace memkernels::lookup::cuda {

void ngram_hash(const NgramHashArgs& a, const Context& ctx) {
  constexpr char op[] = "ngram_hash";
  NgramHashParams p{};
  p.ids = integers(a.token_ids, 1);
  p.ids_row_stride = a.token_ids.stride[0];
  p.length = a.token_ids.shape[1];
  p.tokens = numel(a.token_ids);
  p.past_ids = integers(a.past_ids, 1);
  p.past_row_stride = a.past_ids.stride[0];
  p.reach = a.multipliers.shape[0] - 1;
  p.pad_id = a.pad_id;
  p.cu_seqlens = integers(a.cu_seqlens);
  p.num_sequences = given(a.cu_seqlens) ? a.cu_seqlens.shape[0] - 1 : a.token_ids.shape[0];
  p.multipliers = integers(a.multipliers);
  p.moduli = integers(a.moduli);
  p.offsets = integers(a.offsets);
  p.eos_id = a.eos_id;
  p.width = a.moduli.shape[0];
  p.heads = as_int(op, "heads of all orders", p.width) / static_cast<int>(a.num_orders);
  p.rows = static_cast<int64_t*>(a.rows.data);

  const DeviceGuard guard(op, ctx.device);
  const int64_t tiles = ceil_div(p.tokens, kHashTokens);
  const int64_t most = kHashBlocks * limits_of(op, ctx.device).multiprocessors;
  for (int64_t order = 0; order < a.num_orders; order += p.num_orders) {
    p.first = order * p.heads;
    p.num_orders = static_cast<int>(std::min<int64_t>(kHashOrders, a.num_orders - order));
    std::copy_n(a.orders + order, p.num_orders, p.orders);
    p.chunks = static_cast<int>(ceil_div(p.num_orders * int64_t{p.heads}, kHashThreads));
    const int64_t blocks = p.chunks * std::min(tiles, ceil_div(most, p.chunks));
    launch(op, ctx, hash_ngrams, blocks, kHashThreads,
           p.num_orders * kHashTokens * (sizeof(uint64_t) + sizeof(int)), p);
  }
}

}  // namespace memkernels::lookup::cuda
