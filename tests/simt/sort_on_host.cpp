// csrc/core/cuda/sort.cu for the host.
#include "core/cuda/sort.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace memkernels::cuda {

void sort_by_key(const char*, uint32_t*& keys, int*& values, int n, int, const Context&) {
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return keys[a] < keys[b]; });
  const std::vector<uint32_t> old_keys(keys, keys + n);
  const std::vector<int> old_values(values, values + n);
  for (int i = 0; i < n; ++i) {
    keys[i] = old_keys[order[i]];
    values[i] = old_values[order[i]];
  }
}

}  // namespace memkernels::cuda
