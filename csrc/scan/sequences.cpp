#include "scan/sequences.h"

#include <vector>

#include "core/check.h"
#include "core/cuda/host_copy.h"

namespace memkernels::scan {

Span Sequences::operator[](int64_t n) const {
  if (!given(cu_seqlens)) return {n, 0, tokens};
  const int64_t stride = cu_seqlens.stride[0];
  return {0, index_at(cu_seqlens, n * stride), index_at(cu_seqlens, (n + 1) * stride)};
}

Sequences make_sequences(const char* op, const TensorView& cu_seqlens, int64_t batch,
                         int64_t tokens, Device device) {
  if (!given(cu_seqlens)) return {cu_seqlens, batch, tokens};
  constexpr char arg[] = "cu_seqlens";
  check_index(op, arg, cu_seqlens);
  check_device(op, arg, cu_seqlens, device);
  check_shape(op, arg, cu_seqlens, "[N + 1]", {-1});
  check(cu_seqlens.shape[0] >= 1, op, "cu_seqlens needs at least one entry");
  check(batch == 1, op, "cu_seqlens packs sequences into a batch of 1, got a batch of ", batch);
  const int64_t count = cu_seqlens.shape[0] - 1;
  return {cu_seqlens, count, tokens};
}

void check_contents(const char* op, Sequences sequences, [[maybe_unused]] const Context& ctx) {
  TensorView& cu_seqlens = sequences.cu_seqlens;
  if (!given(cu_seqlens)) return;
#ifdef MEMKERNELS_WITH_CUDA
  HostCopies copies(op, ctx);
  if (ctx.device.type == DeviceType::cuda) {
    if (!ctx.check_indices) return;
    copies.replace(cu_seqlens);
  }
#endif
  int64_t before = 0;
  for (int64_t n = 0; n <= sequences.count; ++n) {
    const int64_t at = index_at(cu_seqlens, n * cu_seqlens.stride[0]);
    check(n > 0 || at == 0, op, "cu_seqlens must begin with 0, got ", at);
    check(at >= before, op, "cu_seqlens falls from ", before, " to ", at, " at ", n);
    before = at;
  }
  check(before == sequences.tokens, op, "cu_seqlens ends with ", before, ", but there are ",
        sequences.tokens, " tokens");
}

void check_state_indices(const char* op, TensorView state_indices, int64_t rows, int64_t slots,
                         const Context& ctx) {
  constexpr char arg[] = "state_indices";
  if (!given(state_indices)) {
    check(rows <= slots, op, "state has ", slots, " slots for ", rows,
          " rows; give state_indices, or as many");
    return;
  }
  check_index(op, arg, state_indices);
  check_device(op, arg, state_indices, ctx.device);
  check_shape(op, arg, state_indices, "[B]", {rows});
#ifdef MEMKERNELS_WITH_CUDA
  HostCopies copies(op, ctx);
  if (ctx.device.type == DeviceType::cuda) {
    if (!ctx.check_indices) return;
    copies.replace(state_indices);
  }
#endif
  std::vector<bool> taken(slots);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t slot = slot_of(state_indices, row);
    check(slot >= -1 && slot < slots, op, "state_indices[", row, "] is ", slot,
          ", outside of -1 to ", slots - 1);
    if (slot < 0) continue;
    check(!taken[slot], op, "state_indices holds slot ", slot, " twice");
    taken[slot] = true;
  }
}

int64_t slot_of(const TensorView& state_indices, int64_t row) {
  return given(state_indices) ? index_at(state_indices, row * state_indices.stride[0]) : row;
}

}  // namespace memkernels::scan
