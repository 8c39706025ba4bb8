// Kernels run on torch's own thread pool, so that torch.set_num_threads() governs them too.
#pragma once
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <exception>

#include "cpu/executor.h"

namespace attn_ext::bindings {

namespace detail {

struct Team {
  void (*body)(void* state, int index);
  void* state;
  int count;
  std::atomic<int> next{0};  // indices are handed out one by one: bodies differ in cost (causal masks, key lengths)
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error{};  // the first; no exception may leave a thread of the pool

  void work() noexcept {
    try {
      for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(state, i);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
      next.store(count, std::memory_order_relaxed);
    }
  }
};

inline void run_on_torch_pool(int count, void (*body)(void*, int), void* state) {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  Team team{.body = body, .state = state, .count = count};
  const auto work = [](int64_t begin, int64_t end, void* team_pointer) {
    for (; begin < end; ++begin) static_cast<Team*>(team_pointer)->work();
  };
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, std::min<int64_t>(threads, count), 1, work, &team));
  if (team.error) std::rethrow_exception(team.error);
}

}  // namespace detail

inline cpu::Executor torch_executor() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return {.threads = static_cast<int>(threads), .run = detail::run_on_torch_pool};
}

}  // namespace attn_ext::bindings
