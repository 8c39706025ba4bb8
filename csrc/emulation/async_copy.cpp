// cp.async: data arrive when the thread waits for them, never earlier.
//
// Until then the bytes belong to nobody: reading or writing them is a fault, as is a thread that ends without having
// waited.  After the wait they are the thread's own; others see them after a barrier, as they would a store.
#include "emulation/async_copy.h"

#include <cstring>

#include "emulation/emulator.h"
#include "emulation/global_memory.h"
#include "emulation/report.h"
#include "emulation/scheduler.h"
#include "emulation/shared_memory.h"
#include "emulation/statistics.h"

namespace attn_ext::emulation {
namespace {

void complete(const AsyncCopy& copy) {
  std::memcpy(copy.to, copy.from, copy.source_bytes);
  std::memset(copy.to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  async_copy_arrived(copy.to, copy.bytes);
}

}  // namespace

void cp_async(uint32_t to, const void* from, int bytes, int source_bytes) {
  const Site site = ATTN_EXT_SITE;
  count_step(site);
  unsigned char* const p = shared_pointer(to, bytes, site);
  const bool sizes = (bytes == 4 || bytes == 8 || bytes == 16) && source_bytes >= 0 && source_bytes <= bytes;
  if (!sizes || to % bytes || reinterpret_cast<uintptr_t>(from) % bytes) {
    report("misaligned access", site, "cp.async of %d of %d bytes from %p to %u", source_bytes, bytes, from, to);
    stop_block();
  }
  if (source_bytes) global_read(reinterpret_cast<uintptr_t>(from), source_bytes, site);
  start_async_copy(p, bytes, site);
  counters.cp_async++;
  counters.cp_async_bytes += source_bytes;
  current->copies.push_back({p, from, bytes, source_bytes, current->copy_group, site});
}

void cp_async_commit() { current->copy_group++; }

void cp_async_wait(int keep) {
  Thread& thread = *current;
  if (keep < 0) {
    cp_async_commit();
    keep = 0;
  }
  while (thread.first_copy < thread.copies.size()) {
    const AsyncCopy& copy = thread.copies[thread.first_copy];
    if (copy.group >= thread.copy_group - keep) return;
    complete(copy);
    thread.first_copy++;
  }
  thread.copies.clear();
  thread.first_copy = 0;
}

void finish_copies(Thread& thread) {
  if (thread.first_copy == thread.copies.size()) return;
  report("cp.async never waited for", thread.copies[thread.first_copy].site, "thread %d ends with %zu copies in flight",
         thread.id, thread.copies.size() - thread.first_copy);
}

}  // namespace attn_ext::emulation
