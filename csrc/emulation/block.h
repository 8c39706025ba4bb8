// The block that runs: its threads, warps and barriers, and which of their actions happened before which.
//
// Actions are stamped with the time of their warp, a count of its synchronisations (FastTrack's vector clocks, one a
// warp).  A barrier makes everything before it, in all the warps that meet, happen before everything after it;
// __syncwarp does so in its warp.  Shuffles, votes and products synchronise registers, not memory.
#pragma once
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace attn_ext::emulation {

using Site = uintptr_t;  // an instruction of a kernel: the address to which a call of the emulator returns
#define ATTN_EXT_SITE reinterpret_cast<attn_ext::emulation::Site>(__builtin_return_address(0))

#pragma GCC visibility push(hidden)

constexpr int kLanes = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes, kBarriers = 16;

struct AsyncCopy {
  unsigned char* to;
  const void* from;
  int bytes, source_bytes;
  int group;
  Site site;
};

enum class State { at_barrier, in_collective, finished };

struct Thread {
  uint3 index;
  int id, warp, lane;
  State state;  // of one that does not run
  Site waits_at;
  void* stack_pointer;
  uintptr_t stack;
  std::vector<AsyncCopy> copies;  // in flight, from first_copy on
  size_t first_copy;
  int copy_group;  // that the next copy joins
};

struct Collective {
  int operation;
  uint32_t mask, arrived;
  Site site;
  void* arguments[kLanes];
};

struct Warp {
  uint32_t present;  // lanes that exist
  uint32_t alive;
  uint32_t ready;  // lanes that could run, but not the one that does
  int first_lane;  // the search for the next lane starts here
  int collectives;
  Collective collective[kLanes];  // under way: their masks are disjoint
  uint32_t clock[kMaxWarps];      // what this warp knows of each warp's time
};

struct Barrier {
  uint32_t waiting[kMaxWarps];  // lanes
  int arrived, expected, agreeing;
  int threads_last, agreeing_last;  // of the meeting before
  Site site;
};

struct Block {
  uint64_t serial;  // counts the blocks of all launches
  uint3 index;
  dim3 dim, grid;
  int threads, warps, alive;
  size_t dynamic_bytes;
  bool fenced, acquired;  // a thread ran __threadfence; then an atomic operation
  Thread thread[kMaxThreads];
  Warp warp[kMaxWarps];
  Barrier barrier[kBarriers];
};

extern Block block;
extern Thread* current;  // null: no kernel runs
extern int64_t steps_left;

inline Warp& warp_of(const Thread& thread) { return block.warp[thread.warp]; }

// Time and thread of an action in 31 bits, never 0.
struct Stamp {
  static constexpr int kThreadBits = 10, kFlagBit = kThreadBits, kTimeShift = kThreadBits + 1;
  static constexpr uint32_t kFlag = 1u << kFlagBit, kMaxTime = (1u << 20) - 1;

  static uint32_t make(uint32_t time, int thread) { return time << kTimeShift | static_cast<uint32_t>(thread); }
  static uint32_t time(uint32_t stamp) { return stamp >> kTimeShift; }
  static int thread(uint32_t stamp) { return static_cast<int>(stamp & (kMaxThreads - 1)); }
};

inline uint32_t now(const Thread& thread) { return warp_of(thread).clock[thread.warp]; }
inline uint32_t stamp_now(const Thread& thread) { return Stamp::make(now(thread), thread.id); }

// Calls f(stamp, byte) for each run of equal stamps: nearly always one.
template <class T, class F>
void for_runs(const T* stamps, int bytes, const F& f) {
  T differ = 0;
  for (int i = 1; i < bytes; i++) differ |= stamps[i] ^ stamps[0];
  f(stamps[0], 0);
  if (!differ) [[likely]]
    return;
  for (int i = 1; i < bytes; i++) {
    if (stamps[i] != stamps[i - 1]) f(stamps[i], i);
  }
}

// Did all that the warp did until then happen before what the thread does now?
inline bool warp_happened_before(uint32_t time, int warp, const Thread& thread) {
  const uint32_t known = warp_of(thread).clock[warp];
  return warp == thread.warp ? time < known : time <= known;
}
inline bool happened_before(uint32_t stamp, const Thread& thread) {
  const int other = Stamp::thread(stamp);
  return other == thread.id || warp_happened_before(Stamp::time(stamp), other / kLanes, thread);
}

#pragma GCC visibility pop
}  // namespace attn_ext::emulation
