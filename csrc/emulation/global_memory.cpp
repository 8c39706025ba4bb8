#include "emulation/global_memory.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <unordered_set>

#include "emulation/emulator.h"
#include "emulation/report.h"
#include "emulation/scheduler.h"
#include "emulation/statistics.h"

namespace attn_ext::emulation {
namespace {

// A stamp of the block's time and thread, below the block's serial number; 0: written by the host.
constexpr int kStampBits = 31;
constexpr uint64_t kUndefined = 1;

struct Unmap {
  size_t bytes;
  void operator()(void* p) const { munmap(p, bytes); }
};
using Stamps = std::unique_ptr<uint64_t[], Unmap>;

// Zeros that take memory only where they are touched.
Stamps make_stamps(size_t count) {
  const size_t bytes = count * sizeof(uint64_t);
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return Stamps(static_cast<uint64_t*>(p), Unmap{bytes});
}

struct Range {
  uintptr_t start, end;
  Stamps stamps;  // of the bytes; none: read-only

  size_t bytes() const { return end - start; }
};
std::vector<Range> ranges;
size_t last_found = 0;

struct Span {
  uintptr_t start, bytes;
  bool contains(uintptr_t address, size_t n) const { return address - start < bytes && address - start + n <= bytes; }
};
Span parameters;
std::vector<Span> program;              // the segments of this library
uint64_t first_serial;                  // of the launch
std::unordered_set<uint64_t> released;  // blocks whose writes others may rely on

const char* verb(bool write) { return write ? "writes" : "reads"; }

Range* find(uintptr_t address, size_t bytes) {
  const auto holds = [&](const Range& r) { return address >= r.start && address + bytes <= r.end; };
  if (last_found < ranges.size() && holds(ranges[last_found])) return &ranges[last_found];
  const auto found = std::find_if(ranges.begin(), ranges.end(), holds);
  if (found == ranges.end()) return nullptr;
  last_found = static_cast<size_t>(found - ranges.begin());
  return &*found;
}

[[noreturn]] void out_of_bounds(uintptr_t address, int bytes, bool write, Site site) {
  const char* kind = "global out of bounds";
  const unsigned x = block.index.x, y = block.index.y, z = block.index.z;
  for (const Range& r : ranges) {  // name the range if the access is close to one
    if (address + 4096 < r.start || address > r.end + 4096) continue;
    report(kind, site, "block (%u,%u,%u) thread %d %s %d bytes at offset %ld of a range of %zu", x, y, z, current->id,
           verb(write), bytes, static_cast<long>(address - r.start), r.bytes());
    stop_block();
  }
  report(kind, site, "block (%u,%u,%u) thread %d %s %d bytes at %#lx, which is no device memory", x, y, z, current->id,
         verb(write), bytes, address);
  stop_block();
}

// Null: nothing more to check.
Range* checked_range(uintptr_t address, int bytes, bool write, Site site) {
  if (Range* range = find(address, static_cast<size_t>(bytes))) {
    if (write && !range->stamps) {
      report("write to read-only memory", site, "block (%u,%u,%u) thread %d writes %d bytes at offset %ld",
             block.index.x, block.index.y, block.index.z, current->id, bytes,
             static_cast<long>(address - range->start));
      stop_block();
    }
    count_access(address, bytes, Space::global, write, site);
    return range;
  }
  const auto holds = [&](const Span& s) { return s.contains(address, static_cast<size_t>(bytes)); };
  if (write || std::none_of(program.begin(), program.end(), holds)) out_of_bounds(address, bytes, write, site);
  return nullptr;
}

// May the current thread rely on the write, or write there as well?
bool ordered(uint64_t stamp) {
  const uint64_t serial = stamp >> kStampBits;
  if (serial < first_serial) return true;  // an earlier launch, or the host
  if (serial == block.serial) return happened_before(static_cast<uint32_t>(stamp & ((1u << kStampBits) - 1)), *current);
  return block.acquired && released.contains(serial);
}

void report_byte(const char* kind, const Range& range, uintptr_t address, uint64_t stamp, Site site) {
  const uint64_t serial = stamp >> kStampBits;
  char other[64] = "";
  if (serial) {
    snprintf(other, sizeof other, " and thread %d of %s block", Stamp::thread(static_cast<uint32_t>(stamp)),
             serial == block.serial ? "the same" : "another");
  }
  report(kind, site, "block (%u,%u,%u) thread %d%s, at offset %ld of a range of %zu bytes", block.index.x,
         block.index.y, block.index.z, current->id, other, static_cast<long>(address - range.start), range.bytes());
}

void check_stamps(const Range& range, uintptr_t address, int bytes, bool defined, const char* kind, Site site) {
  for_runs(range.stamps.get() + (address - range.start), bytes, [&](uint64_t stamp, int byte) {
    if (defined && stamp == kUndefined) {
      report_byte("uninitialised global read", range, address + byte, stamp, site);
    } else if (!ordered(stamp)) {
      report_byte(kind, range, address + byte, stamp, site);
    }
  });
}

int note_segments(dl_phdr_info* image, size_t, void*) {
  std::vector<Span> segments;
  bool own = false;
  for (int i = 0; i < image->dlpi_phnum; i++) {
    const auto& header = image->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    segments.push_back({image->dlpi_addr + header.p_vaddr, header.p_memsz});
    own |= segments.back().contains(reinterpret_cast<uintptr_t>(&ranges), 1);
  }
  if (own) program = segments;
  return own;
}

void fill_undefined(Range& range, uintptr_t start, size_t bytes) {
  std::memset(reinterpret_cast<void*>(start), 0xff, bytes);  // what a kernel forgets to write is NaN
  std::fill_n(range.stamps.get() + (start - range.start), bytes, kUndefined);
}

// Takes the place of the ranges that overlap it: it becomes their union.
Range& add_range(Range range, bool writable) {
  const auto overlaps = [&](const Range& r) { return r.start < range.end && range.start < r.end; };
  std::vector<Range> overlapping;
  for (auto r = std::find_if(ranges.begin(), ranges.end(), overlaps); r != ranges.end();
       r = std::find_if(ranges.begin(), ranges.end(), overlaps)) {
    range.start = std::min(range.start, r->start);
    range.end = std::max(range.end, r->end);
    writable |= r->stamps != nullptr;
    overlapping.push_back(std::move(*r));
    ranges.erase(r);
  }
  if (writable) range.stamps = make_stamps(range.bytes());
  for (const Range& r : overlapping) {
    if (r.stamps) std::copy_n(r.stamps.get(), r.bytes(), range.stamps.get() + (r.start - range.start));
  }
  ranges.push_back(std::move(range));
  return ranges.back();
}

}  // namespace

void global_read(uintptr_t address, int bytes, Site site) {
  const Range* range = checked_range(address, bytes, false, site);
  if (range && range->stamps) check_stamps(*range, address, bytes, true, "global race (read after write)", site);
}

void global_write(uintptr_t address, int bytes, Site site) {
  const Range& range = *checked_range(address, bytes, true, site);
  check_stamps(range, address, bytes, false, "global race (write after write)", site);
  const uint64_t stamp = block.serial << kStampBits | stamp_now(*current);
  std::fill_n(range.stamps.get() + (address - range.start), bytes, stamp);
}

// The stamp of a plain write stays: atomic operations do not race with each other.
void global_atomic(uintptr_t address, int bytes, Site site) {
  const Range& range = *checked_range(address, bytes, true, site);
  check_stamps(range, address, bytes, true, "global race (atomic after write)", site);
  if (block.fenced) released.insert(block.serial);
  block.acquired = true;
}

bool is_parameter(const void* p, size_t bytes) { return parameters.contains(reinterpret_cast<uintptr_t>(p), bytes); }

void threadfence() { block.fenced = true; }

void start_global_memory(const void* body, size_t bytes) {
  parameters = {reinterpret_cast<uintptr_t>(body), bytes};
  first_serial = block.serial + 1;
  released.clear();
  if (program.empty()) dl_iterate_phdr(note_segments, nullptr);
}

void register_memory(const void* pointer, size_t bytes, Access access) {
  if (!bytes) return;
  const auto start = reinterpret_cast<uintptr_t>(pointer);
  Range* range = find(start, bytes);
  const bool writable = access != Access::read_only;
  if (!range || (writable && !range->stamps)) range = &add_range({start, start + bytes, nullptr}, writable);
  if (access == Access::undefined) fill_undefined(*range, start, bytes);
}

void forget_memory() { ranges.clear(); }

bool memory_range(size_t index, uintptr_t* start, size_t* bytes) {
  if (index >= ranges.size()) return false;
  *start = ranges[index].start;
  *bytes = ranges[index].bytes();
  return true;
}

}  // namespace attn_ext::emulation
