// From the arguments of attention_colstats to the kernel and its grid.
#include <algorithm>

#include "attention/plan.h"
#include "selection/attention_colstats_kernel.cuh"

namespace memkernels::selection::cuda {

void attention_colstats(const char* op, const ColstatsArgs& args, const attention::Shapes& shapes,
                        const Context& ctx) {
  const attention::PagedAttentionArgs& inputs = args.attention;
  ColstatsParams p{};
  p.a = params_of(op, inputs, shapes);
  p.lse = static_cast<const float*>(inputs.lse.data);
  p.lse_stride = inputs.lse.stride[0];
  p.lse_head_stride = inputs.lse.stride[1];
  p.reduce = args.reduce;
  p.threshold = static_cast<float>(args.threshold);
  p.accumulate = args.accumulate;
  p.decay = static_cast<float>(args.decay);
  p.stats = static_cast<float*>(args.stats.data);
  p.stats_stride = args.stats.shape[2];
  const int64_t owners = shapes.batch * shapes.kv_heads;
  if (owners == 0) return;
  const DeviceGuard guard(op, ctx.device);

  const int64_t pitch = pitch_of(shapes.dim * item_size(inputs.q.dtype));
  const auto bytes_of = [&](int keys, int rows) {
    return keys * (pitch + int64_t{sizeof(Key)}) + 2 * rows * (pitch + int64_t{sizeof(SeeingRow)});
  };
  const Limits limits = limits_of(op, ctx.device);
  // Large blocks are worth it for many rows, where two of them share a multiprocessor.
  const int64_t mean_rows = ceil_div(shapes.total_q, shapes.batch) * p.a.group;
  constexpr int64_t kReserved = 1024;  // of each block, by the system
  const bool large =
      mean_rows > 16 && 2 * (bytes_of(128, 32) + kReserved) <= limits.of_multiprocessor;
  const int keys = large ? 128 : 64;
  const int64_t bytes = large ? bytes_of(128, 32) : bytes_of(64, 16);
  check(bytes <= limits.of_block, op, "head dim ", shapes.dim, " in ", name(inputs.q.dtype),
        " needs more than the ", limits.of_block, " bytes of shared memory of a block on this GPU");
  // The host knows no lengths, so most tiles may be empty; where there are very many, blocks share.
  const int64_t tiles = ceil_div(p.a.max_length, keys), most = 512 * limits.multiprocessors;
  const int blocks = static_cast<int>(std::min(tiles, ceil_div(most, owners)));
  with_type(inputs.q.dtype, [&](auto type) {
    using T = decltype(type);
    launch(op, ctx, large ? find_colstats<T, 128, 32> : find_colstats<T, 64, 16>, owners * blocks,
           kColstatsThreads, bytes, p, blocks);
  });
}

}  // namespace memkernels::selection::cuda
