// Where an op runs: its device, the host framework's workers or stream, and device memory.
#pragma once

#include "core/tensor.h"

namespace memkernels {

struct Context {
  Device device;
  int num_workers = 1;
  // Calls body(arg, w) for every w in [0, n), on up to n threads of the framework's pool.
  void (*run)(int n, void (*body)(void* arg, int worker), void* arg) = nullptr;

  // On CUDA:
  void* stream = nullptr;      // a cudaStream_t
  bool check_indices = false;  // read what indices and lengths hold, and refuse what the CPU would
  // Device memory, uninitialised, that lives until what the op launches has run.
  void* (*allocate)(const Context& ctx, int64_t bytes) = nullptr;
  void* arena = nullptr;  // the allocator's own
};

// Runs task(i, worker) for i in [0, num_tasks) on at most `workers` workers, which take the
// tasks in order from a shared counter. Tasks must not throw. Determinism is the caller's:
// every output has one owning task.
template <class Task>
void run_tasks(const Context& ctx, int workers, int64_t num_tasks, const Task& task) {
  struct Shared {
    const Task& task;
    int64_t num_tasks;
    int64_t next;
  } shared{task, num_tasks, 0};
  auto body = [](void* arg, int worker) {
    auto& s = *static_cast<Shared*>(arg);
    for (;;) {
      const int64_t i = __atomic_fetch_add(&s.next, 1, __ATOMIC_RELAXED);
      if (i >= s.num_tasks) return;
      s.task(i, worker);
    }
  };
  if (workers > num_tasks) workers = static_cast<int>(num_tasks);
  if (workers <= 1) {
    body(&shared, 0);
  } else {
    ctx.run(workers, body, &shared);
  }
}

}  // namespace memkernels
