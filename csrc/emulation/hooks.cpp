// Where a kernel's loads and stores arrive: the calls that -fsanitize=thread puts before them, and atomic operations.
#include "emulation/emulator.h"
#include "emulation/global_memory.h"
#include "emulation/report.h"
#include "emulation/scheduler.h"
#include "emulation/shared_memory.h"
#include "emulation/statistics.h"

namespace attn_ext::emulation {
namespace {

void check_alignment(uintptr_t address, int bytes, Site site) {
  if (address % static_cast<uintptr_t>(bytes) == 0) [[likely]]
    return;
  report("misaligned access", site, "thread %d accesses %d bytes at %#lx", current->id, bytes, address);
  stop_block();
}

void check_access(uintptr_t address, int bytes, bool write, Site site) {
  count_step(site);
  const uint32_t offset = shared_offset(address);
  if (offset != kOutside) {
    write ? shared_write(offset, bytes, site) : shared_read(offset, bytes, site);
  } else {
    write ? global_write(address, bytes, site) : global_read(address, bytes, site);
  }
}

inline bool is_private(const void* p) { return reinterpret_cast<uintptr_t>(p) - private_base < private_bytes; }

inline void aligned_access(const void* p, int bytes, bool write, Site site) {
  if (is_private(p) || (!write && is_parameter(p, static_cast<size_t>(bytes)))) return;
  check_alignment(reinterpret_cast<uintptr_t>(p), bytes, site);
  check_access(reinterpret_cast<uintptr_t>(p), bytes, write, site);
}

// Of any size and alignment: a device makes it of words or bytes.
void access_in_pieces(const void* p, size_t bytes, bool write, Site site) {
  if (is_private(p) || (!write && is_parameter(p, bytes))) return;
  const auto address = reinterpret_cast<uintptr_t>(p);
  const int piece = (address | bytes) % 4 ? 1 : 4;
  for (size_t i = 0; i < bytes; i += piece) check_access(address + i, piece, write, site);
}

template <class Update>
uint64_t atomically(void* p, int bytes, Site site, const Update& update) {
  if (!is_private(p)) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    count_step(site);
    reschedule();  // others may come first
    check_alignment(address, bytes, site);
    const uint32_t offset = shared_offset(address);
    offset != kOutside ? shared_atomic(offset, bytes, site) : global_atomic(address, bytes, site);
  }
  counters.atomics++;
  uint64_t old = 0;
  std::memcpy(&old, p, static_cast<size_t>(bytes));
  const uint64_t updated = update(old);
  std::memcpy(p, &updated, static_cast<size_t>(bytes));
  return old;
}

}  // namespace

uint64_t atomic(void* p, int bytes, uint64_t (*combine)(uint64_t old, uint64_t operand), uint64_t operand) {
  return atomically(p, bytes, ATTN_EXT_SITE, [&](uint64_t old) { return combine(old, operand); });
}

uint64_t atomic_cas(void* p, int bytes, uint64_t expected, uint64_t desired) {
  return atomically(p, bytes, ATTN_EXT_SITE, [&](uint64_t old) { return old == expected ? desired : old; });
}

void count_sfu() { counters.sfu++; }

extern "C" {
#define ATTN_EXT_HOOKS(bytes)                                                                      \
  void __tsan_read##bytes(void* p) { aligned_access(p, bytes, false, ATTN_EXT_SITE); }             \
  void __tsan_write##bytes(void* p) { aligned_access(p, bytes, true, ATTN_EXT_SITE); }             \
  void __tsan_unaligned_read##bytes(void* p) { access_in_pieces(p, bytes, false, ATTN_EXT_SITE); } \
  void __tsan_unaligned_write##bytes(void* p) { access_in_pieces(p, bytes, true, ATTN_EXT_SITE); }
ATTN_EXT_HOOKS(1)
ATTN_EXT_HOOKS(2)
ATTN_EXT_HOOKS(4)
ATTN_EXT_HOOKS(8)
ATTN_EXT_HOOKS(16)
#undef ATTN_EXT_HOOKS
void __tsan_read_range(void* p, size_t bytes) { access_in_pieces(p, bytes, false, ATTN_EXT_SITE); }
void __tsan_write_range(void* p, size_t bytes) { access_in_pieces(p, bytes, true, ATTN_EXT_SITE); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_init() {}
}

}  // namespace attn_ext::emulation
