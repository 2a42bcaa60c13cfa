#include "lookup/ngram_hash.h"

#include <algorithm>
#include <vector>

#include "core/check.h"
#include "core/cuda/host_copy.h"
#include "core/memory.h"

namespace memkernels::lookup {

namespace {

constexpr char kOp[] = "ngram_hash";

// The sequences that token_ids hold: rows of it, or stretches of its one row.
struct Sequences {
  const NgramHashArgs& args;
  int64_t count, reach;

  int64_t start(int64_t s) const {  // among all tokens
    return given(args.cu_seqlens) ? index_at(args.cu_seqlens, s * args.cu_seqlens.stride[0])
                                  : s * args.token_ids.shape[1];
  }

  int64_t sequence_of(int64_t token) const {
    int64_t low = 0, high = count - 1;
    while (low < high) {
      const int64_t middle = low + (high - low + 1) / 2;
      start(middle) <= token ? low = middle : high = middle - 1;
    }
    return low;
  }

  // Ids of a sequence at [begin, end); from -reach on, before its first token.
  void read(int64_t s, int64_t begin, int64_t end, int64_t* ids) const {
    const TensorView &tokens = args.token_ids, &past = args.past_ids;
    for (; begin < 0; ++begin) {
      *ids++ = given(past) ? index_at(past, s * past.stride[0] + (reach + begin) * past.stride[1])
                           : args.pad_id;
    }
    const int64_t row = given(args.cu_seqlens) ? 0 : s;
    const int64_t first = start(s) - row * tokens.shape[1];
    for (; begin < end; ++begin) {
      *ids++ = index_at(tokens, row * tokens.stride[0] + (first + begin) * tokens.stride[1]);
    }
  }
};

// How many sequences there are.
int64_t checked_sequences(const NgramHashArgs& a) {
  const int64_t length = a.token_ids.shape[1];
  if (!given(a.cu_seqlens)) return a.token_ids.shape[0];
  const TensorView& offsets = a.cu_seqlens;
  check(a.token_ids.shape[0] == 1, kOp, "token_ids must be [1, T] with cu_seqlens, got ",
        shape_of(a.token_ids));
  check(offsets.ndim == 1 && offsets.shape[0] >= 1, kOp, "cu_seqlens must be [N + 1], got ",
        shape_of(offsets));
  check_index(kOp, "cu_seqlens", offsets);
  check_device(kOp, "cu_seqlens", offsets, a.token_ids.device);
  const int64_t count = offsets.shape[0] - 1;
  check(count > 0 || length == 0, kOp, "cu_seqlens has no sequences, token_ids has ", length,
        " tokens");
  return count;
}

void check_contents(const NgramHashArgs& a) {
  for (int64_t i = 0; i < a.moduli.shape[0]; ++i) {
    const int64_t modulus = index_at(a.moduli, i * a.moduli.stride[0]);
    check(modulus >= 1, kOp, "moduli must be at least 1, got ", modulus, " at ", i);
  }
  if (!given(a.cu_seqlens)) return;
  const TensorView& offsets = a.cu_seqlens;
  int64_t last = 0;
  for (int64_t s = 0; s < offsets.shape[0]; ++s) {
    const int64_t start = index_at(offsets, s * offsets.stride[0]);
    check(start >= last && (s > 0 || start == 0), kOp,
          "cu_seqlens must start at 0 and never fall, got ", start, " at ", s);
    last = start;
  }
  const int64_t length = a.token_ids.shape[1];
  check(last == length, kOp, "cu_seqlens ends at ", last, ", token_ids has ", length, " tokens");
}

#ifdef MEMKERNELS_WITH_CUDA
void check_on_host(NgramHashArgs a, const Context& ctx) {
  HostCopies copies(kOp, ctx);
  for (TensorView* t : {&a.moduli, &a.cu_seqlens}) copies.replace(*t);
  check_contents(a);
}
#endif

std::vector<HashHeads> prepare(const NgramHashArgs& a, const NgramHashKernel& kernel) {
  const int64_t heads = a.moduli.shape[0] / a.num_orders;
  std::vector<HashHeads> groups;
  for (int64_t i = 0; i < a.moduli.shape[0]; ++i) {
    if (i % heads % HashHeads::kHeads == 0) {
      groups.push_back({});
      groups.back().order = a.orders[i / heads];
    }
    HashHeads& group = groups.back();
    kernel.set_head(group, static_cast<int>(group.count++),
                    index_at(a.moduli, i * a.moduli.stride[0]),
                    index_at(a.offsets, i * a.offsets.stride[0]));
  }
  return groups;
}

}  // namespace

void ngram_hash(const NgramHashArgs& a, const Context& ctx) {
  const Device device = a.token_ids.device;
  check_shape(kOp, "token_ids", a.token_ids, "[B, T]", {-1, -1});
  check_index(kOp, "token_ids", a.token_ids);
  check(a.num_orders > 0, kOp, "orders must not be empty");
  int64_t longest = 0;
  for (int64_t i = 0; i < a.num_orders; ++i) {
    check(a.orders[i] >= 1, kOp, "orders must be at least 1 each, got ", a.orders[i]);
    longest = std::max(longest, a.orders[i]);
  }
  check_shape(kOp, "multipliers", a.multipliers, "[max(orders)]", {longest});
  check_shape(kOp, "moduli", a.moduli, "[len(orders) * heads]", {-1});
  const int64_t width = a.moduli.shape[0];
  check(width > 0 && width % a.num_orders == 0, kOp, "moduli must be [len(orders) * heads] with ",
        a.num_orders, " orders of one head or more, got ", shape_of(a.moduli));
  check_shape(kOp, "offsets", a.offsets, "[len(orders) * heads]", {width});
  for (const auto& [arg, t] :
       {std::pair{"multipliers", &a.multipliers}, {"moduli", &a.moduli}, {"offsets", &a.offsets}}) {
    check_dtype(kOp, arg, *t, Dtype::i64);
    check_device(kOp, arg, *t, device);
  }
  const Sequences sequences{a, checked_sequences(a), longest - 1};
  if (given(a.past_ids)) {
    check_shape(kOp, "past_ids", a.past_ids, "[N, max(orders) - 1]",
                {sequences.count, sequences.reach});
    check_index(kOp, "past_ids", a.past_ids);
    check_device(kOp, "past_ids", a.past_ids, device);
  }
  check_shape(kOp, "rows", a.rows, "[B, T, len(moduli)]",
              {a.token_ids.shape[0], a.token_ids.shape[1], width});
  check_dtype(kOp, "rows", a.rows, Dtype::i64);
  check_contiguous(kOp, "rows", a.rows);
#ifdef MEMKERNELS_WITH_CUDA
  if (ctx.device.type == DeviceType::cuda) {
    if (ctx.check_indices) check_on_host(a, ctx);
    return cuda::ngram_hash(a, ctx);
  }
#endif
  check_contents(a);

  const NgramHashKernel kernel = MEMKERNELS_CPU(cpu_isa(), ngram_hash_kernel)();
  const std::vector<HashHeads> groups = prepare(a, kernel);
  std::vector<int64_t> multipliers(longest);
  for (int64_t j = 0; j < longest; ++j) {
    multipliers[j] = index_at(a.multipliers, j * a.multipliers.stride[0]);
  }
  const NgramHashJob job{multipliers.data(),
                         longest,
                         groups.data(),
                         static_cast<int64_t>(groups.size()),
                         width,
                         a.eos_id};

  const int64_t tokens = numel(a.token_ids);
  const int64_t per_task = std::max<int64_t>(1, 8192 / width);
  const int64_t num_tasks = (tokens + per_task - 1) / per_task;
  const int workers = num_tasks > 2 ? ctx.num_workers : 1;
  const size_t ids_bytes =
      align_up((sequences.reach + per_task + HashGrams::kTokens) * sizeof(int64_t));
  const size_t scratch_bytes = ids_bytes + align_up(longest * sizeof(HashGrams));
  const Workspace workspace = allocate_workspace(workers * scratch_bytes);
  run_tasks(ctx, workers, num_tasks, [&](int64_t task, int worker) {
    char* scratch = static_cast<char*>(workspace.get()) + worker * scratch_bytes;
    int64_t* ids = reinterpret_cast<int64_t*>(scratch);
    HashGrams* grams = reinterpret_cast<HashGrams*>(scratch + ids_bytes);
    const int64_t end = std::min(tokens, (task + 1) * per_task);
    int64_t t = task * per_task;
    for (int64_t s = sequences.sequence_of(t); t < end; ++s) {
      const int64_t start = sequences.start(s), stop = std::min(end, sequences.start(s + 1));
      if (t == stop) continue;
      sequences.read(s, t - start - sequences.reach, stop - start, ids);
      kernel.run(job, ids + sequences.reach, stop - t, grams,
                 static_cast<int64_t*>(a.rows.data) + t * width);
      t = stop;
    }
  });
}

}  // namespace memkernels::lookup
