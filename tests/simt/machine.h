// Runs CUDA kernels on the host: one block at a time, a fiber for each of its threads.
//
// Threads switch only where they meet: barriers, warp operations, waits. Options choose the order
// in which they go on, and when asynchronous copies land, so that a missing barrier or wait shows
// as a wrong number. Threads that meet in different places, or wait forever, are errors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>

namespace simt {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class Async : int { eager, lazy, random };  // copies land: at once, when waited for, either

struct Options {
  uint64_t seed = 0;  // 0: threads in order; odd: any order; even: some warps far ahead of others
  Async async = Async::lazy;
};
extern Options options;

// A call in the kernel's source. Functions take its two parts as default arguments.
struct Site {
  const char* file;
  int line;
};
#define SIMT_SITE const char *site_file = __builtin_FILE(), int site_line = __builtin_LINE()
#define SIMT_HERE \
  ::simt::Site { site_file, site_line }

// Stops the kernel with a message that names block, thread and seed.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

struct Index3 {
  unsigned x = 1, y = 1, z = 1;
};
extern Index3 thread_index, block_index, block_size, grid_size;

int thread();  // of the block, from 0
inline int lane() { return thread() & 31; }
inline int warp() { return thread() >> 5; }

// Lets others run; whoever polls must call it.
void yield();
uint32_t random_bits();

// The lanes of `mask` meet here; the last to come runs act for all of them, on the `argument` of
// each lane that came. With `aligned` the instruction needs the whole warp.
using Act = void (*)(void* const* arguments, uint32_t lanes);
void meet(const char* what, uint32_t mask, void* argument, Act act, bool aligned, Site site);

inline constexpr int kAllThreads = -1;
inline constexpr int kBlockBarrier = 16;  // 0 to 15 are the named ones
void barrier(int id, int threads, const char* what, Site site, bool arrive_only = false);

// The dynamic shared memory of the block, filled with NaN before the block starts.
char* shared_memory();
size_t shared_bytes();
bool in_shared(const void* p, size_t bytes);

// cp.async: `valid` of `bytes` bytes are copied, the rest zeroed.
void copy_async(void* to, const void* from, int bytes, int valid, Site site);
void commit_copies();
void wait_copies(int groups_in_flight);

// Work of others than the threads (bulk copies): run in any order, when a thread polls.
void defer(std::function<void()> work);
bool run_deferred();
// Called before each block, to forget what extensions keep of the last one.
void on_block(void (*reset)());

void launch(const char* name, Index3 grid, Index3 block, size_t shared_bytes,
            std::function<void()> kernel);

// What a race detector may define (race.cpp).
extern "C" {
void simt_race_block(int threads, const void* shared, size_t bytes) __attribute__((weak));
void simt_race_join(const uint16_t* threads, int count) __attribute__((weak));
void simt_race_switch(int thread) __attribute__((weak));
void simt_race_access(const void* p, size_t bytes, int write, const char* what)
    __attribute__((weak));
void simt_race_suspend(int on) __attribute__((weak));
}

// Within it, accesses are not the kernel's own.
class Unwatched {
 public:
  Unwatched() {
    if (simt_race_suspend) simt_race_suspend(1);
  }
  ~Unwatched() {
    if (simt_race_suspend) simt_race_suspend(0);
  }
};

}  // namespace simt
