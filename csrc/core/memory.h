// Host memory: scratch that lives for one call, and huge pages for large fresh buffers.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>

namespace memkernels {

inline constexpr size_t kAlignment = 64;

inline constexpr size_t align_up(size_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

// First touch of a large buffer by 4 KiB pages costs more than most kernels that fill it; asks
// for huge pages from 32 MiB up. Advice only: contents and mapping do not change.
void advise_huge_pages(void* data, size_t bytes);

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

// Uninitialised, aligned to kAlignment; raises Error when the system has no memory left.
using Workspace = std::unique_ptr<void, FreeDeleter>;
Workspace allocate_workspace(size_t bytes);

}  // namespace memkernels
