#include "emulation/shared_memory.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "emulation/emulator.h"
#include "emulation/report.h"
#include "emulation/scheduler.h"
#include "emulation/statistics.h"

namespace attn_ext::emulation {
namespace {

constexpr size_t kMargin = 64 << 10, kMaxStaticBytes = 256 << 10;
constexpr uint32_t kFirstAddress = 1024;  // as PTX counts: address 0 is no array's
constexpr uint32_t kMaxWindow = kMaxStaticBytes + kMaxDynamicBytes + kMargin, kBeforeArray = kMaxWindow;

alignas(1024) unsigned char dynamic_memory[kMargin + kMaxDynamicBytes + kMargin];
unsigned char* const dynamic_start = dynamic_memory + kMargin;
thread_local unsigned char static_anchor;  // __shared__ variables are thread-local: they lie where this does

uintptr_t static_start;
uint32_t static_bytes, dynamic_offset;  // static_bytes rounded up to 1024, where the dynamic array starts

// Stamps by offset; a flag in a write: a cp.async is on its way; in a read: by several lanes.
constexpr size_t kStampBytes = (1 + size_t{kMaxWarps}) * kMaxWindow * sizeof(uint32_t);
uint32_t* const write_stamps = [] {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* p = mmap(nullptr, kStampBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<uint32_t*>(p);
}();
uint32_t first_time;  // of the running block: earlier stamps are of earlier blocks

uint32_t* read_stamps(int warp) { return write_stamps + (1 + static_cast<size_t>(warp)) * kMaxWindow; }
size_t window_bytes() { return dynamic_offset + block.dynamic_bytes; }

bool of_this_block(uint32_t stamp) { return Stamp::time(stamp) >= first_time; }
long from_start(uint32_t offset) { return static_cast<long>(offset) - static_cast<long>(dynamic_offset); }

void check_bounds(uint32_t offset, int bytes, Site site) {
  if (offset + static_cast<uint32_t>(bytes) <= window_bytes() && offset < kMaxWindow) [[likely]]
    return;
  report("shared out of bounds", site, "thread %d accesses %d bytes at offset %ld of an array of %zu", current->id,
         bytes, offset == kBeforeArray ? -1 : from_start(offset), block.dynamic_bytes);
  stop_block();
}

void check_flight(uint32_t stamp, uint32_t offset, Site site) {
  if (stamp & Stamp::kFlag) {
    report("cp.async race", site, "thread %d accesses a byte for which a cp.async is in flight; shared offset %ld",
           current->id, from_start(offset));
  }
}

// for_warp: lanes of the own warp have to have written before its last synchronisation.
void check_read(uint32_t offset, int bytes, Site site, bool for_warp) {
  const Thread& thread = *current;
  for_runs(write_stamps + offset, bytes, [&](uint32_t stamp, int byte) {
    const uint32_t at = offset + static_cast<uint32_t>(byte);
    if (!of_this_block(stamp)) [[unlikely]] {
      report("uninitialised shared read", site, "thread %d, shared offset %ld", thread.id, from_start(at));
      return;
    }
    check_flight(stamp, at, site);
    const bool own = for_warp && Stamp::thread(stamp) / kLanes == thread.warp && Stamp::time(stamp) >= now(thread);
    if (own || !happened_before(stamp, thread)) {
      report("shared race (read after write)", site,
             "thread %d reads what thread %d wrote, with no barrier between; shared "
             "offset %ld",
             thread.id, Stamp::thread(stamp), from_start(at));
    }
  });
}

void note_read(uint32_t offset, int bytes, bool for_warp) {
  const Thread& thread = *current;
  uint32_t* const stamps = read_stamps(thread.warp) + offset;
  const uint32_t mine = stamp_now(thread), ours = mine | Stamp::kFlag;
  for (int i = 0; i < bytes; i++) {
    const bool same_time = Stamp::time(stamps[i]) == now(thread);
    stamps[i] = for_warp || (same_time && stamps[i] != mine) ? ours : mine;
  }
}

void check_write(uint32_t offset, int bytes, Site site) {
  const Thread& thread = *current;
  for_runs(write_stamps + offset, bytes, [&](uint32_t stamp, int byte) {
    if (!of_this_block(stamp)) return;
    const uint32_t at = offset + static_cast<uint32_t>(byte);
    check_flight(stamp, at, site);
    if (!happened_before(stamp, thread)) {
      report("shared race (write after write)", site, "threads %d and %d, with no barrier between; shared offset %ld",
             thread.id, Stamp::thread(stamp), from_start(at));
    }
  });
  for (int warp = 0; warp < block.warps; warp++) {
    for_runs(read_stamps(warp) + offset, bytes, [&](uint32_t stamp, int byte) {
      if (!of_this_block(stamp)) return;
      if (!(stamp & Stamp::kFlag) && Stamp::thread(stamp) == thread.id) return;
      if (warp_happened_before(Stamp::time(stamp), warp, thread)) return;
      report("shared race (write after read)", site,
             "thread %d overwrites what warp %d may still be reading; shared offset %ld", thread.id, warp,
             from_start(offset + static_cast<uint32_t>(byte)));
    });
  }
}

void note_write(uint32_t offset, int bytes, uint32_t flag) {
  std::fill_n(write_stamps + offset, bytes, stamp_now(*current) | flag);
}

int find_static_memory(dl_phdr_info* image, size_t, void*) {
  const auto anchor = reinterpret_cast<uintptr_t>(&static_anchor);
  for (int i = 0; i < image->dlpi_phnum; i++) {
    if (image->dlpi_phdr[i].p_type != PT_TLS) continue;
    const auto start = reinterpret_cast<uintptr_t>(image->dlpi_tls_data);
    if (anchor - start >= image->dlpi_phdr[i].p_memsz) continue;
    static_start = start;
    static_bytes = static_cast<uint32_t>(image->dlpi_phdr[i].p_memsz);
    return 1;
  }
  return 0;
}

}  // namespace

uint32_t shared_offset(uintptr_t address) {
  const uintptr_t dynamic = address - reinterpret_cast<uintptr_t>(dynamic_memory);
  if (dynamic < sizeof dynamic_memory) {
    const auto offset = static_cast<uint32_t>(dynamic) - static_cast<uint32_t>(kMargin);
    return dynamic < kMargin ? kBeforeArray : offset + dynamic_offset;
  }
  return address - static_start < static_bytes ? static_cast<uint32_t>(address - static_start) : kOutside;
}

void shared_read(uint32_t offset, int bytes, Site site) {
  check_bounds(offset, bytes, site);
  check_read(offset, bytes, site, false);
  note_read(offset, bytes, false);
  count_access(offset + kFirstAddress, bytes, Space::shared, false, site);
}

void shared_read_for_warp(uint32_t offset, int bytes, Site site) {
  check_bounds(offset, bytes, site);
  check_read(offset, bytes, site, true);
  note_read(offset, bytes, true);
  count_access(offset + kFirstAddress, bytes, Space::shared, false, site);
}

void shared_write(uint32_t offset, int bytes, Site site) {
  check_bounds(offset, bytes, site);
  check_write(offset, bytes, site);
  note_write(offset, bytes, 0);
  count_access(offset + kFirstAddress, bytes, Space::shared, true, site);
}

void shared_atomic(uint32_t offset, int bytes, Site site) {
  check_bounds(offset, bytes, site);
  check_read(offset, bytes, site, false);
}

uint32_t cvta_shared(const void* p) {
  const uint32_t offset = shared_offset(reinterpret_cast<uintptr_t>(p));
  if (offset == kOutside) {
    report("not shared", ATTN_EXT_SITE, "thread %d takes the shared address of %p", current->id, p);
    stop_block();
  }
  return offset + kFirstAddress;
}

unsigned char* dyn_smem() { return dynamic_start; }

unsigned char* shared_pointer(uint32_t address, int bytes, Site site) {
  const uint32_t offset = address - kFirstAddress;
  check_bounds(offset, bytes, site);
  if (offset >= dynamic_offset) return dynamic_start + (offset - dynamic_offset);
  return reinterpret_cast<unsigned char*>(static_start) + offset;
}

void start_async_copy(unsigned char* to, int bytes, Site site) {
  const uint32_t offset = shared_offset(reinterpret_cast<uintptr_t>(to));
  check_write(offset, bytes, site);
  note_write(offset, bytes, Stamp::kFlag);
  count_access(offset + kFirstAddress, bytes, Space::shared, true, site);
}

void async_copy_arrived(const unsigned char* to, int bytes) {
  note_write(shared_offset(reinterpret_cast<uintptr_t>(to)), bytes, 0);
}

void locate_shared_memory() {
  static_anchor = 0;  // the arrays of a thread exist from its first use on
  dl_iterate_phdr(find_static_memory, nullptr);
  dynamic_offset = (static_bytes + 1023) / 1024 * 1024;
  if (static_bytes > kMaxStaticBytes) report("launch", 0, "%u bytes of static shared memory", static_bytes);
}

uint32_t start_shared_memory(uint32_t time) {
  if (time > Stamp::kMaxTime / 2) {
    madvise(write_stamps, kStampBytes, MADV_DONTNEED);  // zeros
    time = 0;
  }
  first_time = time + 1;
  return time;
}

}  // namespace attn_ext::emulation
