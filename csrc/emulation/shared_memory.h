// Shared memory of the running block: bounds, initialisation, races.
//
// The window of a block is its static arrays, then its dynamic array.  For each byte there is a stamp of the last
// write, and one of the last reads of each warp.  Faults: an access beyond the dynamic array; a read of a byte that
// nobody wrote; two accesses, one of them a write, of which neither happened before the other (block.h); an access to a
// byte that a cp.async in flight will write; an access off its alignment.
// Out of sight: an access beyond a static array that lands in another one.
#pragma once
#include <cstddef>

#include "emulation/block.h"

namespace attn_ext::emulation {
#pragma GCC visibility push(hidden)

constexpr size_t kMaxDynamicBytes = 227 << 10;  // of any device so far

// The offset in the window, or kOutside.  What lies close to the dynamic array is shared memory too, out of bounds.
constexpr uint32_t kOutside = ~0u;
uint32_t shared_offset(uintptr_t address);

void shared_read(uint32_t offset, int bytes, Site site);
void shared_write(uint32_t offset, int bytes, Site site);
void shared_atomic(uint32_t offset, int bytes, Site site);
// The row of a matrix that goes to other lanes: a warp's own writes count as another thread's.
void shared_read_for_warp(uint32_t offset, int bytes, Site site);

// From an address as PTX has it; bounds are checked.
unsigned char* shared_pointer(uint32_t address, int bytes, Site site);
void start_async_copy(unsigned char* to, int bytes, Site site);
void async_copy_arrived(const unsigned char* to, int bytes);

void locate_shared_memory();                  // of the thread that launches
uint32_t start_shared_memory(uint32_t time);  // of a block; the time it starts from, which may be 0 again

#pragma GCC visibility pop
}  // namespace attn_ext::emulation
