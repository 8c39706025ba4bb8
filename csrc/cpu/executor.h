// How kernels get threads.  The library owns none: the caller passes a function that runs a body on a team
// (torch's own pool in the extension, OpenMP in the standalone build), so there is never a second pool.
#pragma once

namespace attn_ext::cpu {

struct Executor {
  int threads = 1;
  // Calls body(state, index) once for every index in [0, count), in parallel where it can; returns when all have.
  // Bodies never wait for each other.  Null: the calling thread runs all of them.
  void (*run)(int count, void (*body)(void* state, int index), void* state) = nullptr;
};

}  // namespace attn_ext::cpu
