// The nearest entries of a bank for each query and head.
#pragma once

#include <stddef.h>

#include "core/context.h"
#include "core/isa.h"
#include "core/tensor.h"

namespace memkernels::selection {

enum class Metric { dot, cosine, l2 };

struct KnnArgs {
  TensorView q;          // [Q, H, D]
  TensorView bank;       // [H, N, D]
  TensorView valid_len;  // [H], or absent: N
  Metric metric = Metric::dot;
  int64_t buckets = 0;  // 0: exact search
  TensorView values;    // [Q, H, k] float32 (float64 for float64), contiguous, written
  TensorView indices;   // [Q, H, k] int64, contiguous, written
};

void knn_topk(const KnnArgs& args, const Context& ctx);

namespace cuda {
void knn_topk(const KnnArgs& args, const Context& ctx);  // checked ones
}

// Queries of a task at most.
inline constexpr int64_t kKnnQueries = 64;

// The search of some queries of one head in entries [begin, end); or, with buckets, in entries of
// buckets [begin, end).
struct KnnTask {
  int64_t head, first_query, num_queries;
  int64_t begin, end;
  int64_t valid_len;
  // [num_queries][room]: what was found, unordered, indices -1 where there is nothing; with
  // buckets, the best of each of them.
  void* values;
  int64_t* indices;
  int64_t room;
};

// Values rank entries, larger ones first: for l2 they are negated.
struct KnnKernel {
  size_t (*scratch_bytes)(const KnnArgs& args, int64_t room);
  void (*run)(const KnnArgs& args, const KnnTask& task, void* scratch);
};

MEMKERNELS_DECLARE_CPU(KnnKernel, knn_kernel, (Dtype dtype))

}  // namespace memkernels::selection
