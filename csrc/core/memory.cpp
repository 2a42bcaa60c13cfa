#include "core/memory.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
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

void zero_lazily(void* data, size_t bytes) {
  if (bytes == 0) return;
#if defined(__linux__)
  constexpr size_t kThreshold = size_t{32} << 20;
  constexpr uintptr_t kPage = 65536;  // at least that of any system
  char* const begin =
      reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage);
  char* const end =
      reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage);
  if (bytes >= kThreshold) {
    // Memory of a file or shared with others would come back as it was: these marks tell.
    volatile char* const marks[] = {begin, end - 1};
    for (volatile char* mark : marks) *mark = 1;
    const bool given_back = madvise(begin, end - begin, MADV_DONTNEED) == 0;
    if (given_back && *marks[0] == 0 && *marks[1] == 0) {
      std::memset(data, 0, begin - static_cast<char*>(data));
      std::memset(end, 0, static_cast<char*>(data) + bytes - end);
      return;
    }
  }
#endif
  std::memset(data, 0, bytes);
}

void copy_around_caches(void* to, const void* from, size_t bytes) {
#if defined(__SSE2__)
  constexpr size_t kLine = 64;
  if (reinterpret_cast<uintptr_t>(to) % kLine == 0 && bytes % kLine == 0) {
    auto* target = static_cast<__m128i*>(to);
    const auto* source = static_cast<const __m128i*>(from);
    for (size_t i = 0; i < bytes / sizeof(__m128i); ++i) {
      _mm_stream_si128(target + i, _mm_loadu_si128(source + i));
    }
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

void finish_copies_around_caches() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

namespace {

constexpr size_t kKeptBytes = size_t{16} << 20;

struct Kept {
  void* data = nullptr;
  size_t bytes = 0;
  ~Kept() { std::free(data); }
};

thread_local Kept kept;

}  // namespace

void ReleaseWorkspace::operator()(void* p) const {
  if (bytes <= kKeptBytes && bytes > kept.bytes) {
    std::swap(p, kept.data);
    kept.bytes = bytes;
  }
  std::free(p);
}

Workspace allocate_workspace(size_t bytes) {
  if (kept.data != nullptr && bytes <= kept.bytes) {
    const size_t size = std::exchange(kept.bytes, 0);
    return Workspace(std::exchange(kept.data, nullptr), ReleaseWorkspace{size});
  }
  bytes = align_up(bytes ? bytes : 1);
  void* data = std::aligned_alloc(kAlignment, bytes);
  check(data != nullptr, "memkernels", "out of memory: no workspace of ", bytes, " bytes");
  advise_huge_pages(data, bytes);
  return Workspace(data, ReleaseWorkspace{bytes});
}

}  // namespace memkernels
