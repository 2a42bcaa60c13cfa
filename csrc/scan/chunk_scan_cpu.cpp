// Chunks of tokens, one after the other, for a panel of columns of V at a time:
//   U = V                                              linear attention
//   U = beta (V - (k before) S),  U = U - (beta keys) U    delta rule: a triangular solve
//   O = (scale q before) S + scores U
//   S = total S + (k after)^T U
// and with a normaliser, z = total z + sum of (k after), O / (read . z + sum of scores + eps).
//
// Cost: a token and head takes 4 K V + C (K + V) flops, the delta rule 2 K V + C (K + V) more, with
// chunks of C tokens. A panel of S, 4 K kPanel bytes, stays in L1 for its three products, and the
// left operands, which all panels share, in L2.
#include "scan/chunk_cpu.h"

namespace memkernels::scan {
namespace {

template <class T>
struct Forward {
  using A = Acc<T>;
  static constexpr int W = kLanes<A>, P = kPanel<A>;

  struct Scratch {
    Arena arena;
    Chunk<T> chunk;
    Panels<A> state;           // [panels of V][k_rows][P]
    A *u, *out;                // [kChunk][P]
    A *state_right, *u_right;  // as right operands: [k_rows][P], [kChunk][P]
    A* z;                      // [ld]
    A* inverse;                // [kChunk] of the normaliser

    Scratch(const ChunkScanArgs& args, const ChunkTask& task, void* base)
        : arena{static_cast<char*>(base)}, chunk(args, task, arena) {
      state.stride = chunk.k_rows * P;
      state.data = arena.take<A>(round_up(chunk.V, P) / P * state.stride);
      u = arena.take<A>(kChunk * P);
      out = arena.take<A>(kChunk * P);
      state_right = arena.take<A>(chunk.k_rows * P);
      u_right = arena.take<A>(kChunk * P);
      z = arena.take<A>(chunk.ld);
      inverse = arena.take<A>(kChunk);
    }
  };

  static size_t scratch_bytes(const ChunkScanArgs& args) {
    return Scratch(args, {}, nullptr).arena.used;
  }

  static void forward(const ChunkScanArgs& args, const ChunkTask& task, int64_t begin, int64_t end,
                      void* scratch) {
    Scratch s(args, task, scratch);
    Chunk<T>& chunk = s.chunk;
    const Span span = task.tokens;
    load_state(args.initial_state, task.sequence, task.head, begin, end, s.state, chunk.k_rows);
    if (args.normalize) load_z(args.initial_z, task.sequence, task.head, chunk.ld, s.z);
    for (int64_t t = span.begin; t < span.end; t += kChunk) {
      chunk.prepare(t);
      if (args.normalize) normalizers(s);
      for (int64_t p = begin; p < end; ++p) panel(s, p, s.state[p - begin]);
    }
    if (args.state.data != nullptr) {
      store_state(args.state, task.sequence, task.head, begin, end, s.state);
    }
    if (args.z.data != nullptr && begin == 0) {
      memcpy(static_cast<A*>(args.z.data) + (task.sequence * args.v.shape[2] + task.head) * chunk.K,
             s.z, chunk.K * sizeof(A));
    }
  }

  static void panel(const Scratch& s, int64_t p, A* state) {
    const Chunk<T>& chunk = s.chunk;
    const ChunkScanArgs& args = chunk.args;
    const auto* const before = chunk.right(state, chunk.k_rows, s.state_right);
    chunk.values(p, before, s.u);
    multiply_panel(chunk.rows, chunk.K, chunk.reads, before, s.out, P, Fresh{});
    const auto* const u = chunk.right(s.u, chunk.rows, s.u_right);
    multiply_panel<Part::lower>(chunk.rows, chunk.count, chunk.weights, u, s.out, P, Added{});
    chunk.advance(u, state);
    const int64_t heads = args.v.shape[2], row = chunk.task.tokens.batch * args.v.shape[1];
    T* to = static_cast<T*>(args.out.data) +
            ((row + chunk.begin) * heads + chunk.task.head) * chunk.V + p * P;
    for (int64_t i = 0; i < chunk.count; ++i, to += heads * chunk.V) {
      const A factor = args.normalize ? s.inverse[i] : A(1);
      for_columns<A>(chunk.columns_of(p),
                     [&](int64_t c, auto vector, int) __attribute__((always_inline)) {
                       vector.store(to + c, load(s.out + i * P + c) * factor);
                     });
    }
  }

  static void normalizers(Scratch& s) {
    const Chunk<T>& chunk = s.chunk;
    for (int64_t i = 0; i < chunk.count; ++i) {
      s.inverse[i] = 1 / (chunk.normalizer(i, s.z) + static_cast<A>(chunk.args.eps));
    }
    chunk.advance_z(s.z);
  }
};

template <class T>
constexpr ChunkScanKernel kernel_for() {
  return {kPanel<Acc<T>>, Forward<T>::scratch_bytes, Forward<T>::forward};
}

}  // namespace

namespace cpu::MEMKERNELS_ISA {

ChunkScanKernel chunk_scan_kernel(Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16:
      return kernel_for<bf16>();
    case Dtype::f16:
      return kernel_for<f16>();
#if defined(MEMKERNELS_BASELINE)
    case Dtype::f64:
      return kernel_for<double>();
#endif
    default:
      return kernel_for<float>();
  }
}

}  // namespace cpu::MEMKERNELS_ISA
}  // namespace memkernels::scan
