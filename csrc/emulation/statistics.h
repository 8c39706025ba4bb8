// What the kernels did: instructions of each launch, and transactions at each place of access.
//
// The n-th executions of an access by the lanes of a warp, since they last met in a collective operation, are one
// request.  Shared memory serves 128 bytes a wavefront, a word from each of 32 banks; requests of 8 and 16 bytes take
// the lanes in halves and quarters.  Global memory moves sectors of 32 bytes.  `ideal` is what the request's bytes
// need.
#pragma once
#include <string>

#include "emulation/block.h"

namespace attn_ext::emulation {
#pragma GCC visibility push(hidden)

struct Counters {
  long mma_m16n8k16 = 0, mma_m16n8k8 = 0, ldmatrix = 0, shuffles = 0, votes = 0, reductions = 0;  // by warps
  long barriers = 0;                                                                              // by blocks
  long sfu = 0, cp_async = 0, cp_async_bytes = 0, atomics = 0;                                    // by threads
};
extern Counters counters;  // of the running launch

enum class Space { shared, global };

void start_statistics(const char* kernel_name);
void count_access(uintptr_t address, int bytes, Space space, bool write, Site site);
void accesses_complete(int warp);  // its lanes have met
void clear_statistics();
std::string statistics_json();

#pragma GCC visibility pop
}  // namespace attn_ext::emulation
