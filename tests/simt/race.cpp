// A happens-before race detector for shared memory. Kernels are compiled with -fsanitize=thread,
// which calls __tsan_read and __tsan_write at every access, and linked without its runtime: these
// are our own. A vector clock for each thread of the block, joined by barriers and __syncwarp only.
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

namespace {

constexpr uint16_t kNobody = 0xffff;

struct Access {
  uint16_t thread = kNobody;
  uint32_t clock = 0;
  void* pc = nullptr;
  const char* what = nullptr;
};

struct Cell {  // a byte of shared memory
  Access write, reads[2];
};

struct Detector {
  const char* shared = nullptr;
  std::vector<Cell> cells;
  std::vector<uint32_t> clocks;  // [thread][thread]
  int num_threads = 0, current = -1, suspended = 0, count = 0;
  std::string first;  // report
};

// Never destroyed: accesses are still watched while the process ends.
Detector& d = *new Detector;

uint32_t* clock_of(int thread) { return &d.clocks[static_cast<size_t>(thread) * d.num_threads]; }

bool before(const Access& a) {
  return a.thread == kNobody || a.thread == d.current || a.clock <= clock_of(d.current)[a.thread];
}

void report(const char* kind, const Access& other, size_t at, const Access& mine) {
  if (d.count++ > 0) return;
  char text[256];
  snprintf(text, sizeof text, "%s at shared byte %zu: thread %d, %s at %p, and thread %d, %s at %p",
           kind, at, mine.thread, mine.what, mine.pc, other.thread, other.what, other.pc);
  d.first = text;
}

void access(const void* p, size_t bytes, bool write, void* pc, const char* what) {
  if (d.suspended || d.current < 0) return;
  const auto at = reinterpret_cast<uintptr_t>(p), base = reinterpret_cast<uintptr_t>(d.shared);
  if (at < base || at >= base + d.cells.size()) return;
  const Access mine{static_cast<uint16_t>(d.current), clock_of(d.current)[d.current], pc, what};
  for (size_t i = at - base; i < at - base + bytes && i < d.cells.size(); ++i) {
    Cell& cell = d.cells[i];
    if (!before(cell.write)) {
      report(write ? "write after write" : "read after write", cell.write, i, mine);
    }
    if (write) {
      for (Access& read : cell.reads) {
        if (!before(read)) report("write after read", read, i, mine);
        read = Access();
      }
      cell.write = mine;
    } else {
      Access& slot = cell.reads[cell.reads[0].thread != d.current && !before(cell.reads[0])];
      slot = mine;
    }
  }
}

}  // namespace

extern "C" {

// How many races there were, and the first of them; forgets them.
__attribute__((visibility("default"))) int simt_races(char* text, int size) {
  if (text != nullptr) snprintf(text, size, "%s", d.first.c_str());
  const int count = d.count;
  d.count = 0;
  d.first.clear();
  return count;
}

void simt_race_block(int threads, const void* shared, size_t bytes) {
  d.shared = static_cast<const char*>(shared);
  d.cells.assign(bytes, Cell());
  d.num_threads = threads;
  d.current = -1;
  d.suspended = 0;
  d.clocks.assign(static_cast<size_t>(threads) * threads, 0);
  for (int t = 0; t < threads; ++t) clock_of(t)[t] = 1;
}

void simt_race_join(const uint16_t* threads, int count) {
  std::vector<uint32_t> latest(d.num_threads);
  for (int i = 0; i < count; ++i) {
    const uint32_t* clock = clock_of(threads[i]);
    for (int t = 0; t < d.num_threads; ++t) latest[t] = clock[t] > latest[t] ? clock[t] : latest[t];
  }
  for (int i = 0; i < count; ++i) {
    uint32_t* clock = clock_of(threads[i]);
    for (int t = 0; t < d.num_threads; ++t) clock[t] = latest[t];
    ++clock[threads[i]];
  }
}

void simt_race_switch(int thread) { d.current = thread; }
void simt_race_suspend(int on) { d.suspended += on ? 1 : -1; }
void simt_race_access(const void* p, size_t bytes, int write, const char* what) {
  access(p, bytes, write, __builtin_return_address(0), what);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define SIMT_ACCESS(name, bytes, write, what) \
  void name(void* p) { access(p, bytes, write, __builtin_return_address(0), what); }
#define SIMT_ACCESSES(bytes)                                      \
  SIMT_ACCESS(__tsan_read##bytes, bytes, false, "read")           \
  SIMT_ACCESS(__tsan_write##bytes, bytes, true, "write")          \
  SIMT_ACCESS(__tsan_unaligned_read##bytes, bytes, false, "read") \
  SIMT_ACCESS(__tsan_unaligned_write##bytes, bytes, true, "write")
SIMT_ACCESSES(1)
SIMT_ACCESSES(2)
SIMT_ACCESSES(4)
SIMT_ACCESSES(8)
SIMT_ACCESSES(16)

void __tsan_read_range(void* p, size_t bytes) {
  access(p, bytes, false, __builtin_return_address(0), "read");
}
void __tsan_write_range(void* p, size_t bytes) {
  access(p, bytes, true, __builtin_return_address(0), "write");
}

// Atomics of the host code around the kernels (static guards, shared pointers).
#define SIMT_ATOMICS(bits, T)                                                               \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { return *p; }                     \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) { *p = v; }                     \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) {                              \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                      \
  }                                                                                         \
  T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) {                              \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                      \
  }                                                                                         \
  T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) {                               \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                     \
  }                                                                                         \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* e, T v, int, int) {   \
    return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }
SIMT_ATOMICS(8, uint8_t)
SIMT_ATOMICS(32, uint32_t)
SIMT_ATOMICS(64, uint64_t)

}  // extern "C"
