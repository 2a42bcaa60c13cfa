#include "lookup/page_in.h"

#include <algorithm>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "core/check.h"

namespace memkernels::lookup {

#if defined(__linux__)

namespace {

struct Pages {
  uintptr_t base;
  int64_t row_bytes, stride_bytes;
  uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));

  explicit Pages(const TensorView& table)
      : base(reinterpret_cast<uintptr_t>(table.data)),
        row_bytes(table.shape[1] * item_size(table.dtype)),
        stride_bytes(table.stride[0] * item_size(table.dtype)) {}

  uintptr_t first(int64_t row) const { return (base + row * stride_bytes) / page; }
  uintptr_t last(int64_t row) const { return (base + row * stride_bytes + row_bytes - 1) / page; }
  void* address(uintptr_t number) const { return reinterpret_cast<void*>(number * page); }
};

}  // namespace

bool missing_pages(const TensorView& table, const Lists& lists) {
  constexpr int64_t kSmallTable = int64_t{256} << 20;
  constexpr int64_t kSamples = 8;
  if (numel(table) * item_size(table.dtype) < kSmallTable) return false;
  const Pages pages(table);
  const int64_t entries = lists.starts[lists.count] - lists.starts[0];
  const int64_t step = (entries + kSamples - 1) / kSamples;
  for (int64_t i = 0; i < entries; i += step) {
    const int64_t row = lists.rows[lists.starts[0] + i];
    if (row < 0) continue;
    unsigned char resident = 1;
    mincore(pages.address(pages.first(row)), pages.page, &resident);
    if (!(resident & 1)) return true;
  }
  return false;
}

void page_in(const TensorView& table, const Lists& lists) {
  const Pages pages(table);
  std::vector<int64_t> rows(lists.rows + lists.starts[0], lists.rows + lists.starts[lists.count]);
  std::sort(rows.begin(), rows.end());
  uintptr_t begin = 0, end = 0;
  const auto ask = [&] {
    if (begin < end) madvise(pages.address(begin), (end - begin) * pages.page, MADV_WILLNEED);
  };
  for (int64_t row : rows) {
    if (row < 0) continue;
    const uintptr_t first = pages.first(row);
    if (first > end) {
      ask();
      begin = first;
    }
    end = std::max(end, pages.last(row) + 1);
  }
  ask();
}

#else

bool missing_pages(const TensorView&, const Lists&) { return false; }
void page_in(const TensorView&, const Lists&) {}

#endif

}  // namespace memkernels::lookup
