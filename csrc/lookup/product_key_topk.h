// The best of N * N keys, each made of two halves, for every token and head.
#pragma once

#include <stddef.h>

#include "core/context.h"
#include "core/isa.h"
#include "core/tensor.h"

namespace memkernels::lookup {

struct ProductKeyArgs {
  TensorView query;    // [T, H, 2, Dk]
  TensorView keys;     // [H, 2, N, Dk]
  TensorView scores;   // [T, H, k] float32 (float64 for float64), contiguous, written
  TensorView indices;  // [T, H, k] int64, contiguous, written
};

void product_key_topk(const ProductKeyArgs& args, const Context& ctx);

namespace cuda {
void product_key_topk(const ProductKeyArgs& args, const Context& ctx);  // checked ones
}  // namespace cuda

// Tokens of a task at most: whole tiles of a product for every instruction set.
inline constexpr int64_t kProductKeyTokens = 48;
// So few tokens are multiplied with the keys where they lie; the bits are the same.
inline constexpr int64_t kFewTokens = 8;
// Keys of a half whose scores are held at once.
inline constexpr int64_t kHalfBlock = 1024;

struct ProductKeyKernel {
  // Of one half, packed for the product.
  size_t (*packed_bytes)(const ProductKeyArgs& args);
  void (*pack)(const ProductKeyArgs& args, int64_t head, int half, int64_t begin, int64_t end,
               void* packed);
  size_t (*scratch_bytes)(const ProductKeyArgs& args);
  // `packed`: the halves of this head, or null for few tokens.
  void (*run)(const ProductKeyArgs& args, int64_t head, int64_t first_token, int64_t num_tokens,
              const void* packed, void* scratch);
};

MEMKERNELS_DECLARE_CPU(ProductKeyKernel, product_key_kernel, (Dtype dtype))

}  // namespace memkernels::lookup
