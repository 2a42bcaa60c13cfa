#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#error "the context switch is written for x86-64"
#endif

// Saves the callee-saved registers and the stack pointer of one fiber, takes up those of another.
extern "C" void simt_swap(void** save, void* to) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden simt_swap
.globl simt_swap
.type simt_swap,@function
simt_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_swap, .-simt_swap
)");

namespace simt {

Options options;
Index3 thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr size_t kGuard = 4096;

enum class State { ready, waiting, done };

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
  bool landed;
};

struct Thread {
  int id = 0;
  Index3 index;
  State state = State::done;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  const char* what = "";  // where it waits
  Site site{};
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // of copies: where each committed one ends
  void* fake_stack = nullptr;  // of the address sanitizer
};

struct Meeting {
  uint32_t mask, arrived;
  const char* what;
  Site site;
  Act act;
  int first;
  void* arguments[32];
};

struct Warp {
  std::vector<Meeting> meetings;
  std::vector<uint16_t> ready;
  uint32_t exited = 0;
};

struct Barrier {
  std::vector<uint16_t> arrived;
  std::vector<uint16_t> waiting;
  int threads = 0;
};

struct Machine {
  const char* kernel = "";
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> priority;
  uint32_t ready = 0;  // warps with threads that can go on
  Barrier barriers[kBlockBarrier + 1];
  std::function<void()> body;
  std::vector<std::function<void()>> deferred;
  std::string error;
  uint64_t random = 1;
  int num_threads = 0, alive = 0;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  void* stack_pointer = nullptr;  // of the caller of launch
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
} m;

Thread* current = nullptr;
std::vector<void (*)()>& resets() {
  static std::vector<void (*)()> list;
  return list;
}

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
bool same(Site a, Site b) { return a.line == b.line && same(a.file, b.file); }

Warp& warp_of(const Thread& t) { return m.warps[t.id >> 5]; }

void make_ready(Thread& t) {
  t.state = State::ready;
  warp_of(t).ready.push_back(static_cast<uint16_t>(t.id));
  m.ready |= 1u << (t.id >> 5);
}

// One of the warps in a set, any.
int any_of(uint32_t warps) {
  for (uint32_t skip = random_bits() % __builtin_popcount(warps); skip > 0; --skip) {
    warps &= warps - 1;
  }
  return __builtin_ctz(warps);
}

// The warp to go on with. Whoever polls, in warp `avoid`, must not starve the others.
int next_warp(int avoid) {
  if (avoid >= 0) {
    const uint32_t others = m.ready & ~(1u << avoid);
    return any_of(others ? others : m.ready);
  }
  if (options.seed == 0) return __builtin_ctz(m.ready);
  if (options.seed & 1) return any_of(m.ready);
  if (random_bits() % 61 == 0) {
    std::swap(m.priority[random_bits() % m.priority.size()], m.priority[0]);
  }
  for (const int w : m.priority) {
    if (m.ready >> w & 1) return w;
  }
  return -1;
}

Thread* next_thread(int avoid) {
  if (m.ready == 0) return nullptr;
  const int w = next_warp(avoid);
  std::vector<uint16_t>& ready = m.warps[w].ready;
  const size_t i = options.seed == 0 ? 0 : random_bits() % ready.size();
  Thread* t = &m.threads[ready[i]];
  ready.erase(ready.begin() + i);
  if (ready.empty()) m.ready &= ~(1u << w);
  return t;
}

void enter(Thread* t) {
  current = t;
  thread_index = t->index;
  if (simt_race_switch) simt_race_switch(t->id);
}

void switch_to(Thread* from, Thread* to) {
  enter(to);
#ifdef __SANITIZE_ADDRESS__
  void** keep = from->state == State::done ? nullptr : &from->fake_stack;
  __sanitizer_start_switch_fiber(keep, to->stack, kStack);
#endif
  simt_swap(&from->stack_pointer, to->stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

[[noreturn]] void leave_block() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(nullptr, m.stack_bottom, m.stack_size);
#endif
  void* unused;
  simt_swap(&unused, m.stack_pointer);
  __builtin_unreachable();
}

[[noreturn]] void report_deadlock() {
  std::string text;
  int last_warp = -1;
  for (int i = 0; i < m.num_threads; ++i) {
    const Thread& t = m.threads[i];
    if (t.state != State::waiting || t.id >> 5 == last_warp) continue;
    last_warp = t.id >> 5;
    text += "\n  warp " + std::to_string(last_warp) + ", thread " + std::to_string(t.id) +
            " waits in " + t.what + " at " + t.site.file + ":" + std::to_string(t.site.line);
  }
  fail("deadlock, %d threads alive:%s", m.alive, text.c_str());
}

// The current thread has changed its state; another goes on.
void reschedule(int avoid = -1) {
  Thread* me = current;
  Thread* next = next_thread(avoid);
  if (next == nullptr) {
    if (m.alive == 0) leave_block();
    report_deadlock();
  }
  if (next != me) switch_to(me, next);
}

void wait(const char* what, Site site) {
  current->state = State::waiting;
  current->what = what;
  current->site = site;
  reschedule();
}

// After some waits the one that ended them goes on, after others it does not.
void maybe_yield() {
  if (options.seed != 0 && (random_bits() & 1)) yield();
}

bool complete(const Meeting& meeting, const Warp& w) {
  return ((meeting.arrived | w.exited) & meeting.mask) == meeting.mask;
}

void finish_meeting(Warp& w, size_t i) {
  const Meeting meeting = w.meetings[i];
  w.meetings.erase(w.meetings.begin() + i);
  {
    Unwatched unwatched;
    meeting.act(meeting.arguments, meeting.arrived);
  }
  uint16_t met[32];
  int count = 0;
  const int base = current->id & ~31;
  for (int l = 0; l < 32; ++l) {
    if (meeting.arrived >> l & 1) met[count++] = static_cast<uint16_t>(base + l);
  }
  // Shuffles, votes and mma do not order memory.
  if (simt_race_join && same(meeting.what, "__syncwarp")) simt_race_join(met, count);
  for (int i = 0; i < count; ++i) {
    if (&m.threads[met[i]] != current) make_ready(m.threads[met[i]]);
  }
}

void release(Barrier& b) {
  if (simt_race_join) simt_race_join(b.arrived.data(), static_cast<int>(b.arrived.size()));
  const std::vector<uint16_t> waiting = std::move(b.waiting);
  b = Barrier();
  for (const uint16_t t : waiting) make_ready(m.threads[t]);
}

void land(Copy& c) {
  if (c.landed) return;
  c.landed = true;
  if (simt_race_access) simt_race_access(c.to, c.bytes, 1, "cp.async");
  Unwatched unwatched;
  std::memcpy(c.to, c.from, c.valid);
  std::memset(static_cast<char*>(c.to) + c.valid, 0, c.bytes - c.valid);
}

void end_thread() {
  Thread& t = *current;
  Warp& w = warp_of(t);
  t.state = State::done;
  --m.alive;
  w.exited |= 1u << (t.id & 31);
  const Barrier& all = m.barriers[kBlockBarrier];
  if (!all.arrived.empty()) {
    const Thread& other = m.threads[all.arrived[0]];
    fail("ends while thread %d waits in %s at %s:%d", other.id, other.what, other.site.file,
         other.site.line);
  }
  for (size_t i = w.meetings.size(); i-- > 0;) {
    if (complete(w.meetings[i], w)) finish_meeting(w, i);
  }
}

void run_thread() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, m.stack_bottom ? nullptr : &m.stack_bottom,
                                  m.stack_size ? nullptr : &m.stack_size);
#endif
  m.body();
  end_thread();
  reschedule();
  __builtin_unreachable();
}

void prepare_thread(int i, Index3 block) {
  Thread& t = m.threads[i];
  if (t.stack == nullptr) {
    void* p = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw Error("no memory for the stacks of a block");
    mprotect(p, kGuard, PROT_NONE);
    t.stack = static_cast<char*>(p) + kGuard;
  }
  t.id = i;
  const unsigned u = i;
  t.index = {u % block.x, u / block.x % block.y, u / (block.x * block.y)};
  t.copies.clear();
  t.groups.clear();
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(t.stack, kStack);  // earlier frames were never unwound
#endif
  // Stacks at equal offsets of their pages would share few lines of the L1 cache.
  void** sp = reinterpret_cast<void**>(t.stack + kStack - static_cast<size_t>(i) * 448 % 32768);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(&run_thread);
  for (int saved = 0; saved < 6; ++saved) *--sp = nullptr;
  t.stack_pointer = sp;
  make_ready(t);
}

void run_block(Index3 index) {
  block_index = index;
  std::memset(m.shared, 0xff, m.shared_bytes);
  m.random = options.seed * 0x9e3779b97f4a7c15ull + index.x * 7919u + index.y * 104729u + index.z;
  m.random += m.random == 0;
  m.alive = m.num_threads;
  m.ready = 0;
  m.warps.assign((m.num_threads + 31) / 32, Warp());
  m.priority.resize(m.warps.size());
  for (size_t w = 0; w < m.priority.size(); ++w) m.priority[w] = static_cast<int>(w);
  for (size_t w = m.priority.size(); w > 1; --w) {
    std::swap(m.priority[w - 1], m.priority[random_bits() % w]);
  }
  if (m.num_threads % 32) m.warps.back().exited = ~0u << (m.num_threads % 32);
  for (Barrier& b : m.barriers) b = Barrier();
  m.deferred.clear();
  for (const auto reset : resets()) reset();
  if (simt_race_block) simt_race_block(m.num_threads, m.shared, m.shared_bytes);
  for (int i = 0; i < m.num_threads; ++i) prepare_thread(i, block_size);

  Thread* first = next_thread(-1);
  enter(first);
#ifdef __SANITIZE_ADDRESS__
  m.stack_bottom = nullptr;
  m.stack_size = 0;
  __sanitizer_start_switch_fiber(&m.fake_stack, first->stack, kStack);
#endif
  simt_swap(&m.stack_pointer, first->stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(m.fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
  if (simt_race_switch) simt_race_switch(-1);
  if (!m.error.empty()) throw Error(std::exchange(m.error, {}));
}

}  // namespace

void fail(const char* format, ...) {
  char text[1024], where[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  snprintf(where, sizeof where, "%s, block (%u, %u, %u), thread %d, seed %llu: ", m.kernel,
           block_index.x, block_index.y, block_index.z, current ? current->id : -1,
           static_cast<unsigned long long>(options.seed));
  m.error = std::string(where) + text;
  if (current == nullptr) throw Error(std::exchange(m.error, {}));
  leave_block();
}

int thread() { return current->id; }

uint32_t random_bits() {
  uint64_t x = m.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  m.random = x;
  return static_cast<uint32_t>(x * 0x9e3779b97f4a7c15ull >> 32);
}

void yield() {
  make_ready(*current);
  reschedule(current->id >> 5);
}

void meet(const char* what, uint32_t mask, void* argument, Act act, bool aligned, Site site) {
  Warp& w = warp_of(*current);
  const int l = lane();
  const uint32_t bit = 1u << l;
  if (!(mask & bit)) {
    fail("%s at %s:%d: lane %d is not in its own mask %08x", what, site.file, site.line, l, mask);
  }
  if (aligned && (mask != ~0u || w.exited)) {
    fail("%s at %s:%d needs all 32 lanes, but %08x have ended", what, site.file, site.line,
         w.exited);
  }
  size_t i = 0;
  while (i < w.meetings.size() && !(w.meetings[i].mask & bit)) ++i;
  if (i == w.meetings.size()) w.meetings.push_back({mask, 0, what, site, act, l, {}});
  Meeting& meeting = w.meetings[i];
  if (meeting.mask != mask || !same(meeting.what, what) || !same(meeting.site, site)) {
    fail(
        "divergent warp: lane %d is in %s (mask %08x) at %s:%d, lane %d in %s (mask %08x) at "
        "%s:%d",
        l, what, mask, site.file, site.line, meeting.first, meeting.what, meeting.mask,
        meeting.site.file, meeting.site.line);
  }
  meeting.arrived |= bit;
  meeting.arguments[l] = argument;
  if (complete(meeting, w)) {
    finish_meeting(w, i);
    maybe_yield();
  } else {
    wait(what, site);
  }
}

void barrier(int id, int threads, const char* what, Site site, bool arrive_only) {
  Barrier& b = m.barriers[id];
  const bool all = threads == kAllThreads;
  const int wanted = all ? m.num_threads : threads;
  if (!b.arrived.empty()) {
    const Thread& other = m.threads[b.arrived[0]];
    if (all && !same(other.site, site)) {
      fail("divergent %s: thread %d at %s:%d, thread %d at %s:%d", what, current->id, site.file,
           site.line, other.id, other.site.file, other.site.line);
    }
    if (!all && b.threads != threads) {
      fail("named barrier %d: %d threads here, %d at the first arrival", id, threads, b.threads);
    }
  }
  if (all && m.alive < m.num_threads) {
    fail("%s at %s:%d after %d threads of the block have ended", what, site.file, site.line,
         m.num_threads - m.alive);
  }
  b.threads = threads;
  b.arrived.push_back(static_cast<uint16_t>(current->id));
  if (static_cast<int>(b.arrived.size()) >= wanted) {
    release(b);
    maybe_yield();
  } else if (!arrive_only) {
    b.waiting.push_back(static_cast<uint16_t>(current->id));
    wait(what, site);
  }
}

char* shared_memory() { return m.shared; }
size_t shared_bytes() { return m.shared_bytes; }

bool in_shared(const void* p, size_t bytes) {
  const auto at = static_cast<const char*>(p);
  return at >= m.shared && at + bytes <= m.shared + m.shared_bytes;
}

void copy_async(void* to, const void* from, int bytes, int valid, Site site) {
  const auto misaligned = [&](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % static_cast<unsigned>(bytes) != 0;
  };
  if (misaligned(to) || (valid && misaligned(from))) {
    fail("cp.async of %d bytes at %s:%d: misaligned address", bytes, site.file, site.line);
  }
  if (!in_shared(to, bytes)) {
    fail("cp.async at %s:%d: destination outside shared memory", site.file, site.line);
  }
  Copy copy{to, from, bytes, valid, false};
  if (simt_race_access) simt_race_access(to, bytes, 1, "cp.async");
  const bool at_once =
      options.async == Async::eager || (options.async == Async::random && (random_bits() & 1));
  if (at_once) {
    land(copy);
  } else {
    Unwatched unwatched;
    std::memset(to, 0xff, bytes);  // whoever reads before the wait reads NaN
  }
  current->copies.push_back(copy);
}

void commit_copies() { current->groups.push_back(current->copies.size()); }

void wait_copies(int groups_in_flight) {
  std::vector<size_t>& groups = current->groups;
  std::vector<Copy>& copies = current->copies;
  if (static_cast<int>(groups.size()) <= groups_in_flight) return;
  const size_t finished = groups.size() - groups_in_flight, end = groups[finished - 1];
  for (size_t i = 0; i < end; ++i) land(copies[i]);
  copies.erase(copies.begin(), copies.begin() + end);
  groups.erase(groups.begin(), groups.begin() + finished);
  for (size_t& g : groups) g -= end;
}

void defer(std::function<void()> work) { m.deferred.push_back(std::move(work)); }

bool run_deferred() {
  if (m.deferred.empty()) return false;
  const size_t i = options.seed == 0 ? 0 : random_bits() % m.deferred.size();
  const std::function<void()> work = std::move(m.deferred[i]);
  m.deferred.erase(m.deferred.begin() + i);
  Unwatched unwatched;
  work();
  return true;
}

int num_launches = 0;

void on_block(void (*reset)()) { resets().push_back(reset); }

void launch(const char* name, Index3 grid, Index3 block, size_t bytes,
            std::function<void()> kernel) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024) {
    throw Error(std::string(name) + ": a block of " + std::to_string(threads) + " threads");
  }
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) {
    throw Error(std::string(name) + ": the grid is too large");
  }
  m.kernel = name;
  m.num_threads = static_cast<int>(threads);
  block_size = block;
  grid_size = grid;
  m.threads.resize(std::max<size_t>(m.threads.size(), threads));
  m.body = std::move(kernel);
  m.shared_bytes = bytes;
  // Exactly as large as asked for, so that the address sanitizer sees what lies behind.
  m.shared = static_cast<char*>(std::aligned_alloc(1024, (bytes + 1023) / 1024 * 1024 + 1024));
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(m.shared + bytes, (bytes + 1023) / 1024 * 1024 + 1024 - bytes);
#endif
  const struct Cleanup {
    ~Cleanup() {
#ifdef __SANITIZE_ADDRESS__
      __asan_unpoison_memory_region(m.shared, (m.shared_bytes + 1023) / 1024 * 1024 + 1024);
#endif
      std::free(m.shared);
      m.shared = nullptr;
      m.body = nullptr;
      current = nullptr;
    }
  } cleanup;
  ++num_launches;
  std::vector<Index3> blocks;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
    }
  }
  if (options.seed != 0) {
    std::shuffle(blocks.begin(), blocks.end(), std::mt19937_64(options.seed));
  }
  for (const Index3& block : blocks) run_block(block);
}

}  // namespace simt

// How many kernels were launched since the last call.
extern "C" __attribute__((visibility("default"))) int simt_launches() {
  return std::exchange(simt::num_launches, 0);
}

extern "C" __attribute__((visibility("default"))) void simt_configure(uint64_t seed, int async) {
  simt::options = {seed, static_cast<simt::Async>(async)};
}
