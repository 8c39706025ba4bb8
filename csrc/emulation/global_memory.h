// Global memory: the ranges of host memory that kernels may access.
//
// Each access must lie within one range, exact to the byte, be aligned to its size, and not write where only reading is
// allowed.  Parameters of the kernel and the program's own data may be read.  For each writable byte there is a stamp
// of the last write.  Faults: a read of an undefined byte; two threads, one of them writing, of which neither happened
// before the other (block.h); threads of two blocks, unless the writer's block called __threadfence and then an atomic
// operation, and the other's an atomic operation of its own, as where the last block to finish adds up.
// Out of sight: a write to what another block has read before.
#pragma once
#include <cstddef>

#include "emulation/block.h"

namespace attn_ext::emulation {
#pragma GCC visibility push(hidden)

void global_read(uintptr_t address, int bytes, Site site);
void global_write(uintptr_t address, int bytes, Site site);
void global_atomic(uintptr_t address, int bytes, Site site);

// The ranges, one by one; false: there are not so many.
bool memory_range(size_t index, uintptr_t* start, size_t* bytes);

bool is_parameter(const void* p, size_t bytes);
void start_global_memory(const void* parameters, size_t bytes);  // of a launch

#pragma GCC visibility pop
}  // namespace attn_ext::emulation
