#include "core/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/check.h"

namespace memkernels {

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr size_t kThreshold = size_t{32} << 20;
  constexpr size_t kHugePage = size_t{2} << 20;
  if (bytes < kThreshold) return;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

Workspace allocate_workspace(size_t bytes) {
  void* data = std::aligned_alloc(kAlignment, align_up(bytes ? bytes : 1));
  check(data != nullptr, "memkernels", "out of memory: no workspace of ", bytes, " bytes");
  advise_huge_pages(data, bytes);
  return Workspace(data);
}

}  // namespace memkernels
