// Operations in which the lanes of a warp take part together.
//
// The lanes of the mask wait for each other; the last one carries the operation out for all.  Faults: a lane calls
// without being in its mask; lanes whose masks overlap are at different operations, by kind, mask or line.  Lanes of
// the mask that never come show as a deadlock.
#pragma once
#include "emulation/block.h"
#include "emulation/report.h"
#include "emulation/scheduler.h"
#include "emulation/statistics.h"

namespace attn_ext::emulation {
#pragma GCC visibility push(hidden)

enum Operation : int { kSyncWarp, kShuffle = 16, kVote = 32, kReduce = 48, kLdmatrix = 64, kMma = 96 };  // and variants

constexpr uint32_t kAllLanes = ~0u;

// The operation that the current lane joins: under way, or a new one.
Collective& find_collective(int operation, uint32_t mask, Site site);

inline Collective& join_collective(int operation, uint32_t mask, Site site) {
  Warp& warp = warp_of(*current);
  Collective& first = warp.collective[0];
  const bool joins = warp.collectives > 0 && first.operation == operation && first.mask == mask && first.site == site;
  return joins && mask >> current->lane & 1 ? first : find_collective(operation, mask, site);
}

// complete(collective), once; each lane finds its results in its argument.
template <class Complete>
void collective(int operation, uint32_t mask, Site site, void* argument, const Complete& complete) {
  count_step(site);
  const Thread& thread = *current;
  Warp& warp = warp_of(thread);
  Collective& joined = join_collective(operation, mask & warp.present, site);
  joined.arguments[thread.lane] = argument;
  joined.arrived |= 1u << thread.lane;
  if (joined.arrived != joined.mask) {
    wait(State::in_collective, site);
    return;
  }
  complete(joined);
  warp.ready |= joined.mask & ~(1u << thread.lane);
  if (joined.mask == warp.alive) accesses_complete(thread.warp);
  const Collective& last = warp.collective[--warp.collectives];
  if (&joined != &last) joined = last;
}

template <class F>
void for_lanes(const Collective& collective, const F& f) {
  for (uint32_t lanes = collective.mask; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
}

#pragma GCC visibility pop
}  // namespace attn_ext::emulation
