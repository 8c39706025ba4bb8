// Tasks on a team of threads.
#pragma once
#include <atomic>
#include <cstdint>

#include "cpu/executor.h"

namespace attn_ext::cpu {

// Threads worth waking for `work` multiply-adds in `tasks` independent pieces.
inline int useful_threads(const Executor& executor, double work, int64_t tasks) {
  constexpr double kWorkPerThread = 1e6;  // about 20 microseconds; waking a team costs a few
  int64_t threads = executor.run ? executor.threads : 1;
  if (threads > tasks) threads = tasks;
  if (static_cast<double>(threads) > work / kWorkPerThread) threads = static_cast<int64_t>(work / kWorkPerThread);
  return threads < 1 ? 1 : static_cast<int>(threads);
}

// body(thread, task) once for every task in [0, tasks), handed out in order to whichever thread is free.
template <class Body>
void parallel_tasks(const Executor& executor, int threads, int64_t tasks, const Body& body) {
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; task++) body(0, task);
    return;
  }
  struct State {
    const Body& body;
    const int64_t tasks;
    std::atomic<int64_t> next{0};
  } state{body, tasks};
  executor.run(
      threads,
      [](void* opaque, int thread) {
        State& s = *static_cast<State*>(opaque);
        for (int64_t task; (task = s.next.fetch_add(1, std::memory_order_relaxed)) < s.tasks;) s.body(thread, task);
      },
      &state);
}

// The order in which unequal tasks are best handed out: those of the largest cost first, equal ones as they are.
void longest_first(const int64_t* costs, int64_t* tasks, int64_t count);

}  // namespace attn_ext::cpu
