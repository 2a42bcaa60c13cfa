#include "attention/cache_cuda.h"

#include "attention/cache.h"
#include "attention/cache_kernel.cuh"

namespace memkernels::attention::cuda {

namespace {

// The largest word, up to 16 bytes, of which all these numbers are multiples.
int word_of(std::initializer_list<int64_t> numbers) {
  int64_t all = 16;
  for (const int64_t n : numbers) all |= n;
  return static_cast<int>(all & -all);
}

int64_t address(const TensorView& t) { return reinterpret_cast<intptr_t>(t.data); }

int word_of_cache(const TensorView& cache) {
  const int64_t size = item_size(cache.dtype);
  return word_of({address(cache), cache.stride[0] * size, cache.stride[1] * size,
                  cache.stride[2] * size, cache.shape[3] * size});
}

CacheBytes bytes_of(const TensorView& cache, int word, int slices = 1) {
  const int64_t size = item_size(cache.dtype);
  CacheBytes b{static_cast<char*>(cache.data),
               cache.stride[0] * size,
               cache.stride[1] * size,
               cache.stride[2] * size,
               static_cast<int>(cache.shape[3] * size / word),
               0};
  while (b.log_lanes < 5 && slices << b.log_lanes < b.words) ++b.log_lanes;
  return b;
}

// Calls run with a word of that many bytes.
template <class Run>
void with_word(int bytes, const Run& run) {
  switch (bytes) {
    case 16:
      return run(Word<uint32_t, 4>());
    case 8:
      return run(Word<uint32_t, 2>());
    case 4:
      return run(Word<uint32_t, 1>());
    default:
      return run(Word<uint16_t, 1>());
  }
}

}  // namespace

void append_kv(const AppendKvArgs& a, const Context& ctx) {
  constexpr char op[] = "append_kv";
  const DeviceGuard guard(op, ctx.device);
  const int64_t size = item_size(a.k.dtype);
  int word = word_of({word_of_cache(a.k_cache), word_of_cache(a.v_cache)});
  AppendParams p{};
  for (int side = 0; side < 2; ++side) {
    const TensorView& t = side == 0 ? a.k : a.v;
    p.tokens[side] = {static_cast<const char*>(t.data), t.stride[0] * size, t.stride[1] * size};
    word = word_of({word, address(t), t.stride[0] * size, t.stride[1] * size});
  }
  p.caches[0] = bytes_of(a.k_cache, word);
  p.caches[1] = bytes_of(a.v_cache, word);
  p.slots = integers(a.slot_mapping);
  p.page_size = a.k_cache.shape[1];
  p.num_slots = a.k_cache.shape[0] * a.k_cache.shape[1];
  p.heads = static_cast<int>(a.k_cache.shape[2]);
  with_word(word, [&](auto w) {
    launch(op, ctx, append<decltype(w)>, 2 * a.k.shape[0], kCopyThreads, 0, p);
  });
}

void copy_pages(const CopyPagesArgs& a, const Context& ctx) {
  constexpr char op[] = "copy_pages";
  const DeviceGuard guard(op, ctx.device);
  const int word = word_of({word_of_cache(a.k_cache), word_of_cache(a.v_cache)});
  CopyParams p{};
  p.caches[0] = bytes_of(a.k_cache, word);
  p.caches[1] = bytes_of(a.v_cache, word);
  p.pairs = integers(a.pairs);
  p.side_stride = a.pairs.stride[1];
  p.num_pages = a.k_cache.shape[0];
  p.page_size = a.k_cache.shape[1];
  p.heads = static_cast<int>(a.k_cache.shape[2]);
  const int64_t blocks = 2 * a.pairs.shape[0] * ceil_div(p.page_size, kTokensOfBlock);
  with_word(word, [&](auto w) { launch(op, ctx, copy<decltype(w)>, blocks, kCopyThreads, 0, p); });
}

void compact_kv(const CompactKvArgs& a, const Context& ctx) {
  constexpr char op[] = "compact_kv";
  const DeviceGuard guard(op, ctx.device);
  const DistinctCaches caches = distinct_caches(op, a.k_cache, a.v_cache);
  int word = 16;
  for (int i = 0; i < caches.count; ++i) word = word_of({word, word_of_cache(*caches.cache[i])});
  CompactParams p{};
  p.num_caches = caches.count;
  p.heads = static_cast<int>(a.k_cache.shape[2]);
  const int64_t batch = a.seq_lens.shape[0];
  // Slices of 64 bytes or more, until the blocks fill a large GPU.
  p.slices = 1;
  const int64_t row = a.k_cache.shape[3] * item_size(a.k_cache.dtype);
  while (row / (2 * p.slices) >= 64 && batch * p.num_caches * p.heads * p.slices < 512) {
    p.slices *= 2;
  }
  for (int i = 0; i < caches.count; ++i) p.caches[i] = bytes_of(*caches.cache[i], word, p.slices);
  p.page_table = integers(a.page_table, 1);
  p.table_row_stride = a.page_table.stride[0];
  p.max_pages = a.page_table.shape[1];
  p.seq_lens = integers(a.seq_lens);
  p.keep = integers(a.keep, 2);
  p.keep_sequence_stride = a.keep.stride[0];
  p.keep_head_stride = a.keep.shape[1] == 1 ? 0 : a.keep.stride[1];
  p.most = a.keep.shape[2];
  p.num_pages = a.k_cache.shape[0];
  p.page_size = a.k_cache.shape[1];
  p.new_seq_lens = a.new_seq_lens.data;
  p.wide_lens = a.new_seq_lens.dtype == Dtype::i64;
  const int64_t blocks = batch * p.num_caches * p.heads * p.slices;
  constexpr int64_t kShared = kCompactThreads / 32 * sizeof(int);
  with_word(word, [&](auto w) {
    launch(op, ctx, compact<decltype(w)>, blocks, kCompactThreads, kShared, p);
  });
}

}  // namespace memkernels::attention::cuda
