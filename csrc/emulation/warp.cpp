// Shuffles, votes and reductions: registers of other lanes.
//
// A shuffle from a lane outside the mask is a fault, its result all ones.
#include "emulation/collective.h"
#include "emulation/emulator.h"

namespace attn_ext::emulation {
namespace {

struct Shuffled {
  uint32_t value, result;
  int arg, width;
};
struct Reduced {
  uint32_t value, result;
};

// The lane that `lane` reads; itself where the segment ends.  (PTX ISA, "shfl.sync")
int source_lane(Shfl kind, int lane, int arg, int width) {
  const int first = lane & ~(width - 1), end = first + width;
  int source = lane;
  if (kind == Shfl::idx) source = first + (arg & (width - 1));
  if (kind == Shfl::up) source = lane - arg < first ? lane : lane - arg;
  if (kind == Shfl::down) source = lane + arg >= end ? lane : lane + arg;
  if (kind == Shfl::bfly) source = (lane ^ arg) >= end ? lane : lane ^ arg;
  return source;
}

uint32_t combine(Reduce kind, uint32_t a, uint32_t b) {
  const auto as = static_cast<int32_t>(a), bs = static_cast<int32_t>(b);
  switch (kind) {
    case Reduce::add: return a + b;
    case Reduce::min_signed: return as < bs ? a : b;
    case Reduce::max_signed: return as > bs ? a : b;
    case Reduce::min_unsigned: return a < b ? a : b;
    case Reduce::max_unsigned: return a > b ? a : b;
  }
  return 0;
}

}  // namespace

Collective& find_collective(int operation, uint32_t mask, Site site) {
  const Thread& thread = *current;
  Warp& warp = warp_of(thread);
  if (!(mask >> thread.lane & 1)) {
    report("warp mask", site, "lane %d calls with the mask %#x, in which it is not", thread.lane, mask);
    stop_block();
  }
  for (int i = 0; i < warp.collectives; i++) {
    Collective& other = warp.collective[i];
    if (!(other.mask & mask)) continue;
    if (other.operation == operation && other.mask == mask && same_place(other.site, site)) return other;
    report("divergent warp operation", site, "lanes of warp %d are here with the mask %#x, and with %#x at %s",
           thread.warp, mask, other.mask, source_lines({other.site})[0].c_str());
    stop_block();
  }
  Collective& joined = warp.collective[warp.collectives++];
  joined.operation = operation;
  joined.mask = mask;
  joined.arrived = 0;
  joined.site = site;
  return joined;
}

void syncwarp(uint32_t mask) {
  collective(kSyncWarp, mask, ATTN_EXT_SITE, nullptr, [](Collective& all) { advance_clock(current->warp, all.site); });
}

uint32_t shfl(Shfl kind, uint32_t mask, uint32_t value, int arg, int width) {
  Shuffled mine{value, value, arg, width};
  collective(kShuffle + static_cast<int>(kind), mask, ATTN_EXT_SITE, &mine, [kind](Collective& all) {
    counters.shuffles++;
    for_lanes(all, [&](int lane) {
      auto& to = *static_cast<Shuffled*>(all.arguments[lane]);
      const int source = source_lane(kind, lane, to.arg, to.width);
      if (all.mask >> source & 1) {
        to.result = static_cast<Shuffled*>(all.arguments[source])->value;
      } else {
        report("shuffle from an inactive lane", all.site, "lane %d reads lane %d", lane, source);
        to.result = ~0u;
      }
    });
  });
  return mine.result;
}

uint32_t vote(Vote kind, uint32_t mask, bool predicate) {
  Reduced mine{predicate, 0};
  collective(kVote + static_cast<int>(kind), mask, ATTN_EXT_SITE, &mine, [kind](Collective& all) {
    counters.votes++;
    uint32_t ballot = 0;
    for_lanes(all, [&](int lane) { ballot |= static_cast<Reduced*>(all.arguments[lane])->value << lane; });
    const uint32_t result = kind == Vote::ballot ? ballot : kind == Vote::any ? ballot != 0 : ballot == all.mask;
    for_lanes(all, [&](int lane) { static_cast<Reduced*>(all.arguments[lane])->result = result; });
  });
  return mine.result;
}

uint32_t reduce(Reduce kind, uint32_t mask, uint32_t value) {
  Reduced mine{value, 0};
  collective(kReduce + static_cast<int>(kind), mask, ATTN_EXT_SITE, &mine, [kind](Collective& all) {
    counters.reductions++;
    uint32_t result = static_cast<Reduced*>(all.arguments[__builtin_ctz(all.mask)])->value;
    const uint32_t rest = all.mask & (all.mask - 1);
    for (uint32_t lanes = rest; lanes; lanes &= lanes - 1) {
      result = combine(kind, result, static_cast<Reduced*>(all.arguments[__builtin_ctz(lanes)])->value);
    }
    for_lanes(all, [&](int lane) { static_cast<Reduced*>(all.arguments[lane])->result = result; });
  });
  return mine.result;
}

}  // namespace attn_ext::emulation
