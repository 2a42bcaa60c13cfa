#include "attention/append_kv.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "attention/cache.h"
#include "core/check.h"
#include "core/cuda/host_copy.h"

namespace memkernels::attention {

namespace {

constexpr char kOp[] = "append_kv";

std::vector<int64_t> checked_slots(const AppendKvArgs& a) {
  const int64_t tokens = a.k.shape[0];
  const int64_t num_slots = a.k_cache.shape[0] * a.k_cache.shape[1];
  std::vector<int64_t> slots(tokens);
  bool rising = true;
  int64_t last = -1;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t slot = index_at(a.slot_mapping, t * a.slot_mapping.stride[0]);
    check(slot >= -1 && slot < num_slots, kOp, "slot_mapping[", t, "] = ", slot,
          " is outside [-1, ", num_slots, ")");
    slots[t] = slot;
    if (slot < 0) continue;
    rising = rising && slot > last;
    last = slot;
  }
  if (!rising) {
    std::vector<int64_t> sorted = slots;
    std::sort(sorted.begin(), sorted.end());
    const auto first = std::lower_bound(sorted.begin(), sorted.end(), 0);
    const auto twice = std::adjacent_find(first, sorted.end());
    check(twice == sorted.end(), kOp, "slot_mapping has slot ", twice == sorted.end() ? 0 : *twice,
          " twice");
  }
  return slots;
}

void copy_token(const TensorView& from, int64_t token, const TensorView& to, int64_t slot) {
  const int64_t size = item_size(from.dtype), page_size = to.shape[1];
  char* source = static_cast<char*>(from.data) + token * from.stride[0] * size;
  char* target = static_cast<char*>(to.data) +
                 (slot / page_size * to.stride[0] + slot % page_size * to.stride[1]) * size;
  copy_heads({source, from.stride[1] * size}, {target, to.stride[2] * size}, from.shape[1],
             from.shape[2] * size);
}

}  // namespace

void append_kv(const AppendKvArgs& a, const Context& ctx) {
  check_caches(kOp, a.k_cache, a.v_cache);
  const int64_t* kc = a.k_cache.shape;
  check_shape(kOp, "k", a.k, "[T, Hkv, D]", {-1, kc[2], kc[3]});
  check_shape(kOp, "v", a.v, "[T, Hkv, Dv]", {a.k.shape[0], kc[2], a.v_cache.shape[3]});
  check_shape(kOp, "slot_mapping", a.slot_mapping, "[T]", {a.k.shape[0]});
  check_index(kOp, "slot_mapping", a.slot_mapping);
  for (const auto& [arg, t] : {std::pair{"k", &a.k}, {"v", &a.v}}) {
    check_dtype(kOp, arg, *t, a.k_cache.dtype);
    check_rows_contiguous(kOp, arg, *t);
    check_device(kOp, arg, *t, a.k_cache.device);
  }
  check_device(kOp, "slot_mapping", a.slot_mapping, a.k_cache.device);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    if (ctx.check_indices) {
      HostCopies copies(kOp, ctx);
      AppendKvArgs read = a;
      copies.replace(read.slot_mapping);
      checked_slots(read);
    }
    return cuda::append_kv(a, ctx);
  }
#endif
  const std::vector<int64_t> slots = checked_slots(a);

  // A task copies some 64 KiB.
  const int64_t token_bytes =
      std::max<int64_t>(1, kc[2] * (kc[3] + a.v_cache.shape[3]) * item_size(a.k.dtype));
  const int64_t per_task = std::max<int64_t>(1, (int64_t{1} << 16) / token_bytes);
  const int64_t tokens = a.k.shape[0];
  const int64_t num_tasks = (tokens + per_task - 1) / per_task;
  run_tasks(ctx, num_tasks > 2 ? ctx.num_workers : 1, num_tasks, [&](int64_t task, int) {
    const int64_t end = std::min(tokens, (task + 1) * per_task);
    for (int64_t t = task * per_task; t < end; ++t) {
      if (slots[t] < 0) continue;
      copy_token(a.k, t, a.k_cache, slots[t]);
      copy_token(a.v, t, a.v_cache, slots[t]);
    }
  });
}

}  // namespace memkernels::attention
