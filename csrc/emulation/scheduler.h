// Which fiber runs, and the barriers of a block.
//
// A warp runs until all its lanes wait, a lane until it waits: the fewest switches, and with seed 0 the order of the
// ids.  Other seeds permute blocks, warps and lanes.  Faults: a barrier or collective operation that not every thread
// reaches (deadlock), threads that meet in barriers of different lines, too many steps.
#pragma once
#include <cstddef>

#include "emulation/block.h"

namespace attn_ext::emulation {
#pragma GCC visibility push(hidden)

struct Configuration {
  int seed = 0;
  bool access_sites = false;                   // count at each place of access (statistics.h)
  int64_t steps_per_block = int64_t{1} << 30;  // accesses and collective operations
};
extern Configuration configuration;

// What runs the kernels instead of the emulator, if anything: with the name, blocks, threads, dynamic shared memory, and the
// arguments, which lie in `bytes` bytes.  Returns whether it did.
using Launcher = bool (*)(const char* name, int64_t blocks, int64_t threads, int64_t smem, const void* arguments, int64_t bytes);
extern Launcher launcher;

// The current thread waits, until another makes its lane ready.
void wait(State state, Site site);
// It could go on, but other warps may run first.
void reschedule();
// Gives up the block, after a fault that leaves no way on.
[[noreturn]] void stop_block();
[[noreturn]] void stop_after_too_many_steps(Site site);

inline void count_step(Site site) {
  if (--steps_left < 0) [[unlikely]]
    stop_after_too_many_steps(site);
}

// A warp has synchronised: what it does from now on has a later stamp.
void advance_clock(int warp, Site site);

// Accesses to the stack of the running fiber are its own affair: private_base, private_bytes.  All memory is while no
// kernel runs.
constexpr uintptr_t kEverything = ~uintptr_t{0};
extern uintptr_t private_base, private_bytes;

#pragma GCC visibility pop
}  // namespace attn_ext::emulation
