#include <algorithm>
#include <cmath>

#include "scan/feature_map.h"
#include "scan/feature_map_kernel.cuh"

namespace memkernels::scan::cuda {

namespace {

MapRows rows_of(const TensorView& t) {
  MapRows rows{t.data, 0, {}, {}};
  for (int i = 0; i + 1 < t.ndim; ++i) {
    const int last = rows.num_dims - 1;
    if (t.shape[i] == 1) continue;
    if (last >= 0 && rows.stride[last] == t.shape[i] * t.stride[i]) {
      rows.shape[last] *= t.shape[i];
      rows.stride[last] = t.stride[i];
    } else {
      rows.shape[rows.num_dims] = t.shape[i];
      rows.stride[rows.num_dims++] = t.stride[i];
    }
  }
  if (rows.num_dims == 0) rows.num_dims = 1, rows.shape[0] = 1;
  return rows;
}

// Whether elements follow one another from row to row.
bool contiguous(const MapRows& rows, int64_t dim) {
  return rows.num_dims == 1 && (rows.shape[0] <= 1 || rows.stride[0] == dim);
}

void as_one_row(FeatureMapParams& p) {
  p.dim *= p.rows;
  p.rows = p.x.shape[0] = p.dout.shape[0] = 1;
}

// Whether rows begin at 16 bytes.
bool aligned(const MapRows& rows, Dtype dtype) {
  int64_t offsets = static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows.data));
  for (int i = 0; i < rows.num_dims; ++i) {
    if (rows.shape[i] > 1) offsets |= rows.stride[i] * item_size(dtype);
  }
  return offsets % 16 == 0;
}

FeatureMapParams params_of(const char* op, const FeatureMapArgs& a, const TensorView& to) {
  check_supported(op, "x", a.x);
  FeatureMapParams p{};
  p.x = rows_of(a.x);
  p.dim = a.x.shape[a.x.ndim - 1];
  p.rows = numel(a.x) / p.dim;
  p.features = num_features(op, a.kind, p.dim, a.nu);
  as_int(op, "features", p.features);
  p.nu = a.nu;
  p.relu = a.kind == FeatureKind::relu2;
  p.to = to.data;
  const double root = std::sqrt(static_cast<double>(p.dim));
  p.first = static_cast<float>(1 / std::sqrt(root));
  p.second = static_cast<float>(1 / root);
  p.diagonal = static_cast<float>(std::sqrt(0.5));
  return p;
}

// run(type, count) for 16 bytes of elements at a time, or one by one.
template <class Run>
void with_chunks(const FeatureMapParams& p, Dtype dtype, const Run& run) {
  const bool whole = p.dim * item_size(dtype) % 16 == 0 && aligned(p.x, dtype) &&
                     aligned(p.dout, dtype) && reinterpret_cast<uintptr_t>(p.to) % 16 == 0;
  with_type(dtype, [&](auto type) {
    constexpr int kCount = 16 / sizeof(type);
    if (whole) {
      run(type, std::integral_constant<int, kCount>());
    } else {
      run(type, std::integral_constant<int, 1>());
    }
  });
}

// Groups of rows, as many as there are and a block can use, of that many bytes each.
int groups_of(const FeatureMapParams& p, int64_t most, int64_t bytes) {
  constexpr int64_t kBytes = 48 << 10;  // several blocks of a multiprocessor
  int groups = 1;
  while (2 * groups <= most && 2 * groups * bytes <= kBytes && groups * kMapRows < p.rows) {
    groups *= 2;
  }
  return groups;
}

void check_pairs(const char* op, const FeatureMapParams& p, const Limits& limits) {
  const int64_t most = limits.of_block / sizeof(FourRows);
  check(p.dim <= most, op, "x has ", p.dim, " columns; taylor2 supported on CUDA: up to ", most);
}

}  // namespace

void feature_map(const FeatureMapArgs& a, const Context& ctx) {
  constexpr char op[] = "feature_map";
  FeatureMapParams p = params_of(op, a, a.out);
  const DeviceGuard guard(op, ctx.device);
  switch (a.kind) {
    case FeatureKind::taylor2: {
      check_pairs(op, p, limits_of(op, ctx.device));
      const int64_t bytes = p.dim * sizeof(FourRows);
      p.groups = groups_of(p, 8, bytes);
      const int64_t blocks =
          ceil_div(p.rows, p.groups * kMapRows) * ceil_div(p.features, kMapFeatures);
      const int64_t threads = std::min<int64_t>(kMapThreads, ceil_div(p.features, 32) * 32);
      return with_type(a.x.dtype, [&](auto type) {
        launch(op, ctx, multiply_pairs<decltype(type)>, blocks, static_cast<int>(threads),
               p.groups * bytes, p);
      });
    }
    case FeatureKind::dpfp:
      return with_chunks(p, a.x.dtype, [&](auto type, auto count) {
        launch(op, ctx, multiply_neighbours<decltype(type), count>,
               ceil_div(p.rows * 2 * p.dim / count, kMapThreads), kMapThreads, 0, p);
      });
    default:
      if (contiguous(p.x, p.dim)) as_one_row(p);
      return with_chunks(p, a.x.dtype, [&](auto type, auto count) {
        launch(op, ctx, map_elements<decltype(type), count>,
               ceil_div(p.rows * p.dim / count, kMapThreads), kMapThreads, 0, p);
      });
  }
}

void feature_map_backward(const FeatureMapArgs& a, const FeatureMapGrads& g, const Context& ctx) {
  constexpr char op[] = "feature_map_backward";
  FeatureMapParams p = params_of(op, a, g.dx);
  p.dout = rows_of(g.dout);
  const DeviceGuard guard(op, ctx.device);
  switch (a.kind) {
    case FeatureKind::taylor2: {
      const Limits limits = limits_of(op, ctx.device);
      check_pairs(op, p, limits);
      int64_t bytes = p.dim * sizeof(FourRows);
      const int64_t staged = bytes + p.features * sizeof(FourRows);
      p.staged = staged <= limits.of_block;
      if (p.staged) bytes = staged;
      p.groups = groups_of(p, std::max<int64_t>(1, kMapThreads / p.dim), bytes);
      return with_type(a.x.dtype, [&](auto type) {
        launch(op, ctx, multiply_pairs_backward<decltype(type)>,
               ceil_div(p.rows, p.groups * kMapRows), kMapThreads, p.groups * bytes, p);
      });
    }
    case FeatureKind::dpfp:
      return with_chunks(p, a.x.dtype, [&](auto type, auto count) {
        launch(op, ctx, multiply_neighbours_backward<decltype(type), count>,
               ceil_div(p.rows * p.dim / count, kMapThreads), kMapThreads, 0, p);
      });
    default:
      if (contiguous(p.x, p.dim) && contiguous(p.dout, p.dim)) as_one_row(p);
      return with_chunks(p, a.x.dtype, [&](auto type, auto count) {
        launch(op, ctx, map_elements_backward<decltype(type), count>,
               ceil_div(p.rows * p.dim / count, kMapThreads), kMapThreads, 0, p);
      });
  }
}

}  // namespace memkernels::scan::cuda
