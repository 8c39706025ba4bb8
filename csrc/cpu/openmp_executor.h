// Threads for programs that use the kernel library without torch.
#pragma once
#include <omp.h>

#include <exception>

#include "cpu/executor.h"

namespace attn_ext::cpu {

inline Executor openmp_executor() {
  const auto run = [](int count, void (*body)(void*, int), void* state) {
    std::exception_ptr error;  // no exception may leave an OpenMP region
#pragma omp parallel for schedule(dynamic, 1)
    for (int i = 0; i < count; ++i) {
      try {
        body(state, i);
      } catch (...) {
#pragma omp critical(attn_ext_executor_error)
        error = std::current_exception();
      }
    }
    if (error) std::rethrow_exception(error);
  };
  return {.threads = omp_get_max_threads(), .run = run};
}

}  // namespace attn_ext::cpu
