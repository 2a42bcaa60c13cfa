#include "lookup/bags.h"

#include <algorithm>
#include <utility>

#include "core/check.h"

namespace memkernels::lookup {

namespace {

OwnedLists allocate(const char* op, int64_t count, int64_t entries, Dtype accumulator,
                    int64_t** starts, int64_t** rows, void** factors) {
  constexpr int64_t kMost = int64_t{1} << 48;  // far beyond any memory, far from overflow
  check(count < kMost && entries < kMost, op, entries, " indices in ", count, " bags are too many");
  const size_t start_bytes = align_up((count + 1) * sizeof(int64_t));
  const size_t row_bytes = align_up(entries * sizeof(int64_t));
  OwnedLists lists;
  lists.memory = allocate_workspace(start_bytes + row_bytes + entries * item_size(accumulator));
  char* base = static_cast<char*>(lists.memory.get());
  lists.count = count;
  lists.starts = *starts = reinterpret_cast<int64_t*>(base);
  lists.rows = *rows = reinterpret_cast<int64_t*>(base + start_bytes);
  lists.factors = *factors = base + start_bytes + row_bytes;
  return lists;
}

int bits_for(uint64_t values) { return values <= 1 ? 0 : 64 - __builtin_clzll(values - 1); }

// Sorts keys by the bits from `shift` on, keeping the order of equal ones; returns where they end
// up, `keys` or `other`.
uint64_t* sort_by_upper_bits(uint64_t* keys, uint64_t* other, int64_t n, int shift, int bits) {
  constexpr int kMostDigitBits = 11;
  const int passes = (bits + kMostDigitBits - 1) / kMostDigitBits;
  for (int pass = 0; pass < passes; ++pass) {
    const int first = shift + bits * pass / passes;
    const int digit_bits = shift + bits * (pass + 1) / passes - first;
    const uint64_t mask = (uint64_t{1} << digit_bits) - 1;
    int64_t places[1 << kMostDigitBits] = {};
    for (int64_t i = 0; i < n; ++i) ++places[keys[i] >> first & mask];
    int64_t place = 0;
    for (uint64_t digit = 0; digit <= mask; ++digit) {
      place += std::exchange(places[digit], place);
    }
    for (int64_t i = 0; i < n; ++i) other[places[keys[i] >> first & mask]++] = keys[i];
    std::swap(keys, other);
  }
  return keys;
}

}  // namespace

void check_bags(const char* op, const char* input, const char* factors, const Bags& bags,
                Device device, Dtype main) {
  check_index(op, input, bags.input);
  check_device(op, input, bags.input, device);
  if (given(bags.offsets)) {
    check_shape(op, input, bags.input, "[n] beside offsets", {-1});
    check_shape(op, "offsets", bags.offsets, "[T]", {-1});
    check_index(op, "offsets", bags.offsets);
    check_device(op, "offsets", bags.offsets, device);
    check(bags.offsets.shape[0] > 0 || bags.input.shape[0] == 0, op,
          "offsets must be of at least one bag, got [0] beside ", bags.input.shape[0], " indices");
  } else {
    check(bags.input.ndim == 2, op, input, " must be [T, K]",
          bags.input.ndim == 1 ? ", or [n] with offsets" : "", ", got ", shape_of(bags.input));
    check(bags.input.shape[1] > 0, op, input, " lists no rows, got K = 0");
  }
  if (!given(bags.factors)) return;
  const bool alike =
      bags.factors.ndim == bags.input.ndim &&
      std::equal(bags.input.shape, bags.input.shape + bags.input.ndim, bags.factors.shape);
  check(alike, op, factors, " must have the shape ", shape_of(bags.input), " of ", input, ", got ",
        shape_of(bags.factors));
  check_companion(op, factors, bags.factors, main);
  check_device(op, factors, bags.factors, device);
}

int64_t num_bags(const Bags& bags) {
  return given(bags.offsets) ? bags.offsets.shape[0] : bags.input.shape[0];
}

OwnedLists make_lists(const char* op, const char* input, const Bags& bags, int64_t num_rows,
                      Dtype accumulator) {
  const TensorView& index = bags.input;
  const int64_t count = num_bags(bags), entries = numel(index);
  const bool flat = given(bags.offsets);
  int64_t *starts, *rows;
  void* factors;
  OwnedLists lists = allocate(op, count, entries, accumulator, &starts, &rows, &factors);

  const int64_t width = flat ? entries : index.shape[1];
  for (int64_t t = 0; t < count; ++t) {
    starts[t] = flat ? index_at(bags.offsets, t * bags.offsets.stride[0]) : t * width;
    const int64_t least = t == 0 ? 0 : starts[t - 1];
    check(starts[t] >= least && (t > 0 || starts[t] == 0) && starts[t] <= entries, op,
          "offsets must rise from 0 to at most ", entries, ", got ", starts[t], " at [", t, "]");
  }
  starts[count] = entries;

  const int64_t outer = flat ? 1 : index.shape[0];
  const int64_t stride = index.stride[index.ndim - 1];
  bool out_of_range = false;
  for (int64_t t = 0; t < outer; ++t) {
    const int64_t base = flat ? 0 : t * index.stride[0];
    int64_t* to = rows + t * width;
    const auto copy = [&](const auto* from, int64_t step) {
      for (int64_t j = 0; j < width; ++j) to[j] = from[j * step];
    };
    const auto read = [&](const auto* from) {
      stride == 1 ? copy(from + base, 1) : copy(from + base, stride);
    };
    index.dtype == Dtype::i64 ? read(static_cast<const int64_t*>(index.data))
                              : read(static_cast<const int32_t*>(index.data));
    for (int64_t j = 0; j < width; ++j) out_of_range |= (to[j] < -1) | (to[j] >= num_rows);
  }
  for (int64_t i = 0; out_of_range && i < entries; ++i) {
    if (rows[i] >= -1 && rows[i] < num_rows) continue;
    const int64_t place[] = {i / width, i % width};
    fail(op, input, " must be -1 or below ", num_rows, ", got ", rows[i], " at ",
         flat ? Sizes{&i, 1} : Sizes{place, 2});
  }

  if (!given(bags.factors)) fill_scalars(factors, accumulator, 0, entries, 1);
  if (!given(bags.factors) || entries == 0) return lists;
  const TensorView& f = bags.factors;
  const int64_t factor_stride = f.stride[f.ndim - 1];
  const WidenKernel widen = MEMKERNELS_CPU(cpu_isa(), widen_kernel)(f.dtype);
  for (int64_t t = 0; t < outer; ++t) {
    const int64_t base = flat ? 0 : t * f.stride[0], at = t * width;
    if (factor_stride == 1 && accumulator == Dtype::f32) {
      widen(static_cast<const char*>(f.data) + base * item_size(f.dtype), width,
            static_cast<float*>(factors) + at);
      continue;
    }
    for (int64_t j = 0; j < width; ++j) {
      store_scalar(factors, accumulator, at + j,
                   load_scalar(f.data, f.dtype, base + j * factor_stride));
    }
  }
  return lists;
}

Readers invert(const char* op, const Lists& lists, int64_t num_rows, Dtype accumulator) {
  const int64_t entries = lists.starts[lists.count];
  const int place_bits = bits_for(entries), row_bits = bits_for(num_rows);
  check(place_bits + row_bits <= 64, op, entries, " indices into ", num_rows,
        " rows are more than can be sorted");
  const Workspace memory = allocate_workspace(3 * entries * sizeof(uint64_t));
  uint64_t* keys = static_cast<uint64_t*>(memory.get());
  int64_t* bag_of = reinterpret_cast<int64_t*>(keys + 2 * entries);
  int64_t n = 0;
  for (int64_t t = 0; t < lists.count; ++t) {
    for (int64_t i = lists.starts[t]; i < lists.starts[t + 1]; ++i) {
      bag_of[i] = t;
      keys[n] = static_cast<uint64_t>(lists.rows[i]) << place_bits | static_cast<uint64_t>(i);
      n += lists.rows[i] >= 0;
    }
  }
  const uint64_t* sorted = sort_by_upper_bits(keys, keys + entries, n, place_bits, row_bits);

  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    count += i == 0 || sorted[i] >> place_bits != sorted[i - 1] >> place_bits;
  }
  Readers readers;
  int64_t *starts, *bags;
  void* factors;
  readers.lists = allocate(op, count, n, accumulator, &starts, &bags, &factors);
  readers.rows.reserve(count);
  const uint64_t place_mask = (uint64_t{1} << place_bits) - 1;
  const auto fill = [&](auto zero) {
    using A = decltype(zero);
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t row = sorted[i] >> place_bits;
      if (i == 0 || row != sorted[i - 1] >> place_bits) {
        starts[readers.rows.size()] = i;
        readers.rows.push_back(static_cast<int64_t>(row));
      }
      const int64_t place = static_cast<int64_t>(sorted[i] & place_mask);
      bags[i] = bag_of[place];
      static_cast<A*>(factors)[i] = static_cast<const A*>(lists.factors)[place];
    }
  };
  accumulator == Dtype::f64 ? fill(double{}) : fill(float{});
  starts[count] = n;
  return readers;
}

std::vector<Cut> cut_lists(const Lists& lists, int64_t dim, int workers, bool whole_rows) {
  constexpr int64_t kLeastColumns = 64;
  const int64_t entries = lists.starts[lists.count] - lists.starts[0];
  const int64_t size = workers > 1 ? std::max<int64_t>(1, entries / (8 * workers)) : entries + 1;
  std::vector<Cut> cuts;
  for (int64_t begin = 0, end; begin < lists.count; begin = end) {
    end = begin + 1;
    const int64_t bound = lists.starts[begin] + size;
    while (end < lists.count && lists.starts[end + 1] <= bound) ++end;
    // Lists that are empty are work too.
    if (workers > 1) end = std::min(end, begin + std::max<int64_t>(1, lists.count / workers));
    const int64_t length = lists.starts[end] - lists.starts[begin];
    const int64_t most = whole_rows ? 1 : std::max<int64_t>(1, dim / kLeastColumns);
    const int64_t parts = std::min(most, std::max<int64_t>(1, length / size));
    const int64_t columns = (dim / kLeastColumns + parts - 1) / parts * kLeastColumns;
    for (int64_t column = 0; column < dim; column += columns) {
      const bool last = parts == 1 || column + 2 * columns > dim;
      cuts.push_back({begin, end, column, last ? dim - column : columns});
      if (last) break;
    }
  }
  return cuts;
}

}  // namespace memkernels::lookup
