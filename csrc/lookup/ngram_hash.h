// Rows of hashed n-gram tables for each token.
#pragma once

#include "core/context.h"
#include "core/isa.h"
#include "core/tensor.h"

namespace memkernels::lookup {

struct NgramHashArgs {
  TensorView token_ids;    // [B, T]
  TensorView multipliers;  // [max(orders)]
  TensorView moduli;       // [num_orders * heads], the heads of the first order first
  TensorView offsets;      // [num_orders * heads]
  TensorView past_ids;     // [N, max(orders) - 1], or absent: pad_id
  TensorView cu_seqlens;   // [N + 1] with B = 1, or absent: N = B
  const int64_t* orders = nullptr;
  int64_t num_orders = 0;
  int64_t eos_id = -1;  // a negative one is none: it hides only what it blocks already
  int64_t pad_id = 0;
  TensorView rows;  // [B, T, num_orders * heads], contiguous
};

void ngram_hash(const NgramHashArgs& args, const Context& ctx);

namespace cuda {
void ngram_hash(const NgramHashArgs& args, const Context& ctx);  // checked ones
}  // namespace cuda

// Up to eight heads of one order, what a kernel knows of each side by side.
struct HashHeads {
  static constexpr int kHeads = 8;
  // Two steps: by a multiple of the modulus, and, if some modulus is small, by itself.
  uint64_t multiple[kHeads], modulus[kHeads], offset[kHeads];
  double multiple_inverse[kHeads], modulus_inverse[kHeads];
  bool small, wide;  // some modulus is
  int64_t order, count;
};

// Of 64 tokens, their n-grams of one order: what is to be reduced, and -1 where there is none.
struct HashGrams {
  static constexpr int kTokens = 64;
  uint64_t mix[kTokens];
  int64_t blocked[kTokens];
};

struct NgramHashJob {
  const int64_t* multipliers;  // [longest]
  int64_t longest;             // of the orders
  const HashHeads* groups;     // in the order of the results
  int64_t num_groups;
  int64_t width;  // heads of all orders
  int64_t eos_id;
};

struct NgramHashKernel {
  void (*set_head)(HashHeads& group, int head, int64_t modulus, int64_t offset);
  // For the tokens ids[0, num_tokens), before which stand longest - 1 more; after them up to
  // kTokens are read in vain. grams: scratch [longest].
  void (*run)(const NgramHashJob& job, const int64_t* ids, int64_t num_tokens, HashGrams* grams,
              int64_t* rows);
};

MEMKERNELS_DECLARE_CPU(NgramHashKernel, ngram_hash_kernel, ())

}  // namespace memkernels::lookup
