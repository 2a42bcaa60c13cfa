// Host memory: scratch that lives for one call, and huge pages for large fresh buffers.
#pragma once

#include <cstddef>
#include <memory>

namespace memkernels {

inline constexpr size_t kAlignment = 64;

inline constexpr size_t align_up(size_t n) {
  return (n + kAlignment - 1) / kAlignment * kAlignment;
}

// First touch of a large buffer by 4 KiB pages costs more than most kernels that fill it; asks
// for huge pages from 32 MiB up. Advice only: contents and mapping do not change.
void advise_huge_pages(void* data, size_t bytes);

// Fills with zeros. A large buffer's pages are given back instead, so that those never written
// cost nothing, and the others only their first touch.
void zero_lazily(void* data, size_t bytes);

struct ReleaseWorkspace {
  size_t bytes = 0;
  void operator()(void* p) const;
};

// A copy that does not read what it overwrites, for large targets that are not needed again soon;
// finished for other threads after finish_copies_around_caches().
void copy_around_caches(void* to, const void* from, size_t bytes);
void finish_copies_around_caches();

// Uninitialised, aligned to kAlignment; raises Error when the system has no memory left. A thread
// keeps its last workspace of up to 16 MiB for its next call, since fresh pages cost more than a
// small kernel.
using Workspace = std::unique_ptr<void, ReleaseWorkspace>;
Workspace allocate_workspace(size_t bytes);

}  // namespace memkernels
