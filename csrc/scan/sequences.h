// The sequences of a scan: rows of a batch, or packed one after another.
#pragma once

#include "core/context.h"
#include "core/tensor.h"

namespace memkernels::scan {

struct Span {
  int64_t batch, begin, end;  // tokens [begin, end) of that row of the batch
};

struct Sequences {
  TensorView cu_seqlens;  // [count + 1], or absent: one sequence a row of the batch
  int64_t count, tokens;  // tokens: T
  Span operator[](int64_t n) const;
};

// Those of tensors [B, T]. What cu_seqlens holds is not read.
Sequences make_sequences(const char* op, const TensorView& cu_seqlens, int64_t batch,
                         int64_t tokens, Device device);
// Checks what it holds; on CUDA if the context asks for it.
void check_contents(const char* op, Sequences sequences, const Context& ctx);

// Checks state_indices [rows], or absent, against a pool of that many slots: -1, or a slot, none
// of them twice; on CUDA the slots themselves if the context asks for it.
void check_state_indices(const char* op, TensorView state_indices, int64_t rows, int64_t slots,
                         const Context& ctx);
// The slot of a row, or -1.
int64_t slot_of(const TensorView& state_indices, int64_t row);

}  // namespace memkernels::scan
